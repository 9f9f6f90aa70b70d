// Items are removed from the index, and put back: the page keeps all that the service knew of them. Files stay as they are.

import { ApiError, ask, contentOf, pathOf, thumbnailOf } from "../api.js";
import { refreshInfo } from "./header.js";
import { messageOf } from "./problem.js";

// Items at work at once.
const AT_ONCE = 4;
// Rows of a request that puts items back.
const MOST_ROWS = 100;

/**
 * An item with everything that belongs to it. Its JSON stays as it came: a number of JavaScript cannot hold a time in
 * nanoseconds. Its pictures are blobs, which a browser may keep on disk.
 *
 * @typedef {{id: string, json: string, thumbnail?: Blob, original?: Blob}} Whole
 * @typedef {{id: string, reason: string}} Failed
 * @typedef {{onProgress?: (done: number) => void, signal?: AbortSignal}} Options
 * @typedef {{done: number, failed: Failed[]}} Outcome how many, and those that failed
 * @typedef {(options?: Options) => Promise<Outcome>} Restore
 */

/**
 * Remove items, and return what puts them back.
 *
 * It stops where no other item would fare better: the service cannot be reached, or takes no changes.
 *
 * @param {string[]} ids
 * @param {Options} [options] the signal stops it before the next item
 * @returns {Promise<Outcome & {left: number, restore: Restore}>} left: not tried
 */
export async function removeItems(ids, { onProgress = () => {}, signal } = {}) {
  const { fingerprint } = await refreshInfo();
  /** @type {Whole[]} */
  const removed = [];
  /** @type {Failed[]} */
  const failed = [];
  const waiting = ids.values();
  let isOver = false;
  const work = async () => {
    for (const id of waiting) {
      try {
        const item = await readWhole(id);
        await ask(pathOf(id), { method: "DELETE" });
        removed.push(item);
      } catch (error) {
        failed.push({ id, reason: messageOf(error) });
        isOver ||= error instanceof ApiError && [0, 401, 403].includes(error.status);
      }
      onProgress(removed.length + failed.length);
      if (isOver || signal?.aborted) return;
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  void refreshInfo().catch(() => {});
  return {
    done: removed.length,
    failed,
    left: ids.length - removed.length - failed.length,
    restore: (options) => restoreItems(removed, fingerprint, options),
  };
}

/**
 * Read all that belongs to an item.
 *
 * @param {string} id
 * @returns {Promise<Whole>}
 */
async function readWhole(id) {
  const include = ["embedding", "digest", "source", "file"].map((name) => `include=${name}`).join("&");
  const json = await (await ask(`${pathOf(id)}?${include}&encoding_format=base64`)).text();
  const blobOf = async (/** @type {string} */ address) => {
    try {
      return await (await ask(address)).blob();
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return undefined;
      throw error;
    }
  };
  const thumbnail = await blobOf(thumbnailOf({ id, metadata: {} }));
  // The store reads the bytes of an indexed file from where it is.
  const original = JSON.parse(json).source ? undefined : await blobOf(contentOf(id));
  return { id, json, thumbnail, original };
}

/**
 * Put items back.
 *
 * @param {Whole[]} items
 * @param {string} fingerprint of the encoder that embedded them
 * @param {Options} [options]
 * @returns {Promise<Outcome>}
 */
async function restoreItems(items, fingerprint, { onProgress = () => {}, signal } = {}) {
  const { limits } = await refreshInfo();
  // The request has some bytes beside the rows.
  const mostBytes = limits.max_request_bytes - 1000;
  const mostRows = Math.min(MOST_ROWS, limits.max_bulk_images);
  /** @type {Outcome} */
  const outcome = { done: 0, failed: [] };
  /** @type {{id: string, row: Blob}[]} */
  let batch = [];
  let bytes = 0;
  const send = async () => {
    const sent = batch;
    [batch, bytes] = [[], 0];
    try {
      const parts = sent.flatMap(({ row }, place) => (place ? [",", row] : [row]));
      const body = new Blob([`{"fingerprint":${JSON.stringify(fingerprint)},"items":[`, ...parts, "]}"]);
      const answer = await ask("images", { method: "POST", headers: { "Content-Type": "application/json" }, body });
      for (const line of (await answer.text()).trim().split("\n").map((text) => JSON.parse(text))) {
        if (line.status < 300) outcome.done += 1;
        else outcome.failed.push({ id: sent[line.index].id, reason: messageOf(line.detail) });
      }
    } catch (error) {
      outcome.failed.push(...sent.map(({ id }) => ({ id, reason: messageOf(error) })));
    }
    onProgress(outcome.done + outcome.failed.length);
  };
  for (const item of items) {
    if (signal?.aborted) break;
    const pictures = JSON.stringify({ thumbnail: await base64Of(item.thumbnail), original: await base64Of(item.original) });
    // Two objects become one.
    const row = new Blob([item.json.trim().slice(0, -1), pictures === "{}" ? "" : ",", pictures.slice(1)]);
    if (batch.length && (batch.length >= mostRows || bytes + row.size > mostBytes)) await send();
    batch.push({ id: item.id, row });
    bytes += row.size + 1;
  }
  if (batch.length) await send();
  void refreshInfo().catch(() => {});
  return outcome;
}

/** @param {Blob | undefined} blob */
async function base64Of(blob) {
  if (!blob) return undefined;
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return btoa(text);
}
