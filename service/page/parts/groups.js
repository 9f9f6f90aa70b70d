// The groups that the service finds, page after page.

import { ask, askJson } from "../api.js";

// The first page is small, so that it is there soon.
const FIRST = 100;
const LATER = 1000;

/**
 * @typedef {import("../duplicates/decisions.js").Group} Group
 * @typedef {{threshold: number, total: number, rest: number, rest_bytes: number, groups: Group[], next: string | null}} Answer
 */

/**
 * The groups of one question, as far as they are there.
 *
 * @typedef {object} Listing
 * @property {string} question
 * @property {number} threshold
 * @property {number} total of groups
 * @property {number} rest items beside the best copies
 * @property {number} restBytes of their files
 * @property {Group[]} groups
 * @property {(count: number, signal?: AbortSignal) => Promise<void>} load waits until so many groups are there
 */

/**
 * Ask for groups, and again until the service has found them.
 *
 * @param {string} question `preset=` or `threshold=`
 * @param {(progress: number) => void} onProgress
 * @param {AbortSignal} signal
 * @returns {Promise<Listing>}
 */
export async function findGroups(question, onProgress, signal) {
  for (;;) {
    const response = await ask(`duplicates?${question}&limit=${FIRST}`, { signal });
    const answer = await response.json();
    if (response.status === 200) return makeListing(question, answer);
    onProgress(answer.progress);
    await pause(1000 * Number(response.headers.get("Retry-After") ?? 1), signal);
  }
}

/** How many groups of exact copies there are; null if the service does not know yet. @returns {Promise<number | null>} */
export async function countKnown() {
  const answer = await askJson("duplicates?preset=exact&limit=1&begin=false");
  return answer.total ?? null;
}

/** @param {string} question @param {Answer} first @returns {Listing} */
function makeListing(question, first) {
  let { next } = first;
  /** @type {Promise<void>} */
  let loading = Promise.resolve();
  const listing = {
    question,
    threshold: first.threshold,
    total: first.total,
    rest: first.rest,
    restBytes: first.rest_bytes,
    groups: first.groups,
    load: (/** @type {number} */ count, /** @type {AbortSignal} */ signal) => {
      // A cursor leads to the next page only, so one call follows another.
      loading = loading.catch(() => {}).then(async () => {
        while (next !== null && listing.groups.length < count) {
          /** @type {Answer} */
          const answer = await askJson(`duplicates?${question}&limit=${LATER}&cursor=${next}`, undefined, { signal });
          listing.groups.push(...answer.groups);
          next = answer.next;
        }
      });
      return loading;
    },
  };
  return /** @type {Listing} */ (listing);
}

/** @param {number} ms @param {AbortSignal} signal @returns {Promise<void>} */
function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, ms);
    signal.addEventListener("abort", stop, { once: true });
  });
}
