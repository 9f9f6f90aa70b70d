// Adding many pictures: in requests within the limits of the service, some at a time, each picture's outcome told.

import { ApiError, ask, askJson } from "../api.js";
import { refreshInfo } from "./header.js";
import { messageOf } from "./problem.js";
import { shrink } from "./shrink.js";
import { formatBytes } from "./words.js";

// Small requests show progress often. A picture above MOST_BYTES goes by itself.
const MOST_FILES = 50;
const MOST_BYTES = 8_000_000;
const PARALLEL = 2;
// A service that is busy, without saying for how long, is asked again after so many seconds, so many times.
const WAIT_S = 2;
const MOST_TRIES = 10;
// After these statuses no other picture could be added either.
const HOPELESS = [0, 401, 403, 404, 409];

/**
 * @typedef {{id: string, file: Blob, isShrunk?: boolean}} Wanted isShrunk wants the picture to be made smaller
 * @typedef {Wanted & {status: number, reason: string}} Failed
 */

/**
 * The upload that runs, or the last one. Leaving the view does not end it.
 *
 * @type {Upload | null}
 */
let latest = null;

export function latestUpload() {
  return latest;
}

/** Forget the upload, once it has ended. */
export function forgetUpload() {
  latest = null;
}

/** An upload. It fires "change" whenever its figures have changed. */
export class Upload extends EventTarget {
  /** @type {"running" | "stopped" | "cancelled" | "done"} */
  state = "running";
  added = 0;
  replaced = 0;
  /** @type {Failed[]} */
  failed = [];
  /** Why it stopped. @type {unknown} */
  trouble = null;
  /** Whether the service has taken or refused a picture yet. */
  #hasAnswered = false;
  /** Pictures of a request, halved when a proxy finds a request too large. */
  #most = MOST_FILES;
  #startedAt = performance.now();
  #doneBefore = 0;
  #abort = new AbortController();

  /**
   * @param {Wanted[]} wanted with different ids
   * @param {number} skipped pictures that were left out because their ids exist
   * @param {Record<string, number>} limits of the service
   */
  constructor(wanted, skipped, limits) {
    super();
    this.queue = [...wanted];
    this.total = wanted.length;
    this.skipped = skipped;
    this.limits = limits;
    latest = this;
    void this.#run();
  }

  /** Pictures that were stored or refused. */
  get done() {
    return this.added + this.replaced + this.failed.length;
  }

  /** Pictures a second since the start; 0 if that is not known yet. */
  get rate() {
    const seconds = (performance.now() - this.#startedAt) / 1000;
    return seconds > 0 ? (this.done - this.#doneBefore) / seconds : 0;
  }

  /** End it. What has been added stays. */
  cancel() {
    this.state = "cancelled";
    this.#abort.abort();
    this.#changed();
  }

  /** Go on after it stopped. */
  resume() {
    void this.#run();
  }

  /** Try failed pictures once more. @param {(one: Failed) => boolean} which @param {boolean} [isShrunk] make them smaller */
  retry(which, isShrunk = false) {
    const again = this.failed.filter(which);
    this.failed = this.failed.filter((one) => !which(one));
    this.queue.push(...again.map(({ id, file, isShrunk: was }) => ({ id, file, isShrunk: isShrunk || was })));
    void this.#run();
  }

  async #run() {
    this.state = "running";
    this.trouble = null;
    this.#abort = new AbortController();
    this.#startedAt = performance.now();
    this.#doneBefore = this.done;
    this.#changed();
    window.addEventListener("beforeunload", warn);
    // A refusal that concerns all pictures comes with the first one.
    if (!this.#hasAnswered) await this.#work(1);
    await Promise.all(Array.from({ length: PARALLEL }, () => this.#work(Infinity)));
    window.removeEventListener("beforeunload", warn);
    if (this.state === "running") this.state = "done";
    this.#changed();
    void refreshInfo().catch(() => {});
  }

  /** Send what waits, in so many requests at most. @param {number} requests */
  async #work(requests) {
    for (let tries = 0; requests > 0 && this.queue.length && this.state === "running"; requests -= 1) {
      const batch = await this.#nextBatch(requests === 1);
      if (!batch.length) continue;
      const left = new Set(batch);
      try {
        await this.#send(batch, left);
        tries = 0;
      } catch (error) {
        if (this.state !== "running") {
          this.queue.unshift(...left);
          return;
        }
        tries = left.size < batch.length ? 1 : tries + 1;
        await this.#handle(error, [...left], tries);
      }
      this.#changed();
    }
  }

  /** Take pictures for one request from the queue. @param {boolean} isFirst @returns {Promise<Wanted[]>} */
  async #nextBatch(isFirst) {
    /** @type {Wanted[]} */
    const batch = [];
    const mostFiles = isFirst ? 1 : Math.min(this.#most, this.limits.max_bulk_images);
    const mostBytes = Math.min(MOST_BYTES, this.limits.max_request_bytes / 2);
    for (let bytes = 0; batch.length < mostFiles; ) {
      const next = this.queue[0];
      if (!next || (batch.length && bytes + next.file.size > mostBytes)) break;
      this.queue.shift();
      let one = next;
      if (next.isShrunk) {
        try {
          one = { ...next, file: await shrink(next.file, this.limits), isShrunk: false };
        } catch {
          this.#fail(next, 415, "Your browser cannot decode it, so it was not made smaller.");
          continue;
        }
      }
      if (one.file.size > this.limits.max_image_bytes) {
        const most = formatBytes(this.limits.max_image_bytes);
        this.#fail(one, 413, `It has ${formatBytes(one.file.size)}; this service takes at most ${most}.`);
        continue;
      }
      bytes += one.file.size;
      batch.push(one);
    }
    return batch;
  }

  /** Send one request. @param {Wanted[]} batch @param {Set<Wanted>} left those without an outcome so far */
  async #send(batch, left) {
    const { body, type } = formOf(batch);
    const response = await ask("images", { method: "POST", body, headers: { "Content-Type": type }, signal: this.#abort.signal });
    /** @type {Wanted[]} */
    const later = [];
    for await (const line of linesOf(response)) {
      const told = JSON.parse(line);
      const one = batch[told.index];
      if (!one || !left.delete(one)) continue;
      this.#hasAnswered = true;
      if (told.status === 201) this.added += 1;
      else if (told.status === 200) this.replaced += 1;
      else if ([429, 503].includes(told.status)) later.push(one);
      else this.#fail(one, told.status, told.detail);
      this.#changed();
    }
    for (const one of later) left.add(one);
    // Sending a picture again is safe.
    if (left.size) throw new ApiError("The service did not answer for each picture.", 503, "unanswered");
  }

  /** Decide what becomes of pictures whose request failed. @param {unknown} error @param {Wanted[]} left @param {number} tries */
  async #handle(error, left, tries) {
    const { status, wait_s } = error instanceof ApiError ? error : { status: 0, wait_s: 0 };
    if ([429, 503].includes(status) && tries < MOST_TRIES) {
      this.queue.unshift(...left);
      await wait(wait_s || WAIT_S, this.#abort.signal);
    } else if (HOPELESS.includes(status) || status >= 500 || status === 429) {
      this.queue.unshift(...left);
      this.state = "stopped";
      this.trouble = error;
      this.#abort.abort();
    } else if (left.length > 1) {
      // One of them spoils the request, or all of them are too much for a proxy.
      this.#most = Math.max(1, Math.floor(left.length / 2));
      this.queue.unshift(...left);
    } else for (const one of left) this.#fail(one, status, messageOf(error));
  }

  /** @param {Wanted} one @param {number} status @param {string} reason */
  #fail(one, status, reason) {
    this.failed.push({ ...one, status, reason });
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** Keep the visitor from closing the page during an upload by mistake. @param {Event} event */
function warn(event) {
  event.preventDefault();
}

/** @param {number} seconds @param {AbortSignal} signal ends the wait early */
function wait(seconds, signal) {
  return new Promise((/** @type {(value: void) => void} */ resolve) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}

/**
 * Pictures as a form. A browser's own form cannot hold each id: it changes quotes in the names of files.
 *
 * @param {Wanted[]} batch
 */
function formOf(batch) {
  const boundary = `lookalike-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;
  /** @type {BlobPart[]} */
  const parts = [];
  for (const { id, file } of batch) {
    const name = encodeURIComponent(id).replace(/['()*]/g, (character) => `%${character.charCodeAt(0).toString(16)}`);
    parts.push(
      `--${boundary}\r\nContent-Disposition: form-data; name="file"; filename="picture"; filename*=UTF-8''${name}\r\n` +
        "Content-Type: application/octet-stream\r\n\r\n",
      file,
      "\r\n",
    );
  }
  return { body: new Blob([...parts, `--${boundary}--\r\n`]), type: `multipart/form-data; boundary=${boundary}` };
}

/** The lines of an answer as they come. @param {Response} response */
async function* linesOf(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    text += decoder.decode(value, { stream: !done });
    const lines = text.split("\n");
    text = done ? "" : /** @type {string} */ (lines.pop());
    for (const line of lines) if (line) yield line;
    if (done) return;
  }
}

/**
 * Which of some ids the collection has.
 *
 * @param {string[]} ids
 * @param {AbortSignal} signal
 * @returns {Promise<Set<string>>}
 */
export async function existing(ids, signal) {
  const wanted = new Set(ids);
  /** @type {Set<string>} */
  const found = new Set();
  const query = new URLSearchParams({ prefix: commonStart(ids), order: "id", limit: "1000" });
  for (;;) {
    const { items, next } = await askJson(`images?${query}`, undefined, { signal });
    for (const { id } of items) if (wanted.has(id)) found.add(id);
    if (!next) return found;
    query.set("cursor", next);
  }
}

/** The text that all of some texts begin with. @param {string[]} texts */
function commonStart(texts) {
  let start = texts[0] ?? "";
  for (const text of texts) while (!text.startsWith(start)) start = start.slice(0, -1);
  // Half a character is no text.
  return start.replace(/[\ud800-\udbff]$/, "");
}
