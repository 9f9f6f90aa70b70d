// The HTTP API as functions. A failure is an ApiError with a message for the visitor.

import { askForKey } from "./parts/key.js";

// The session storage keeps the API key until the tab closes.
const KEY = "lookalike-key";

/**
 * A JSON object that the service gave; its shape is that of /openapi.json.
 *
 * @typedef {{width: number | null, height: number | null, size_bytes: number | null, format: string | null,
 *   date: string | null, mtime_ns: number | null}} FileFacts
 * @typedef {{id: string, metadata: Record<string, unknown>, digest?: string, source?: string, variant?: string,
 *   file?: FileFacts, score?: number, embedding?: number[]}} Item
 * @typedef {Item & {score: number}} Hit
 * @typedef {{items: Item[], total: number, next: string | null}} Listing
 * @typedef {{model: string, fingerprint: string, dimension: number, count: number | null, variant: string,
 *   provider: string, queries: string[], notice: string | null, limits: Record<string, number>,
 *   versions: Record<string, string>, commit: string | null, card: {method?: string, licence?: string, origin?: string,
 *   data?: {source?: string, pictures?: number}, quality?: Record<string, Quality>}}} Info
 * @typedef {{pictures?: number, knn?: number, zero_shot?: number, cosine_p1?: number}} Quality of one file of the encoder
 * @typedef {{prefix?: string, name?: string, filter?: string, order?: string, offset?: number, limit?: number}} Listed
 */

/** A refusal of the service, or no answer from it. */
export class ApiError extends Error {
  /**
   * @param {string} message for the visitor
   * @param {number} status of HTTP; 0 if there was no answer
   * @param {string} code of the problem; "unreachable" if there was no answer
   * @param {number} [wait_s] seconds after which the service asks to be called again; 0 if it does not
   */
  constructor(message, status, code, wait_s = 0) {
    super(message);
    this.status = status;
    this.code = code;
    this.wait_s = wait_s;
  }
}

/** Facts about the service: encoder, number of pictures, notice, limits. @returns {Promise<Info>} */
export async function getInfo() {
  return (await ask("info")).json();
}

/**
 * Items of the gallery with their files and digests.
 *
 * @param {Listed} listed
 * @param {AbortSignal} [signal]
 * @returns {Promise<Listing>}
 */
export async function listItems(listed, signal) {
  const query = new URLSearchParams([["include", "file"], ["include", "digest"]]);
  for (const [key, value] of Object.entries(listed)) if (value !== undefined && value !== "") query.set(key, String(value));
  return (await ask(`images?${query}`, { signal })).json();
}

/**
 * One item, with its file, digest and source.
 *
 * @param {string} id
 * @param {AbortSignal} [signal]
 * @returns {Promise<Item>}
 */
export async function getItem(id, signal) {
  return (await ask(`${pathOf(id)}?include=digest&include=source`, { signal })).json();
}

/**
 * Get, send or remove something.
 *
 * @param {string} path relative to the page, with its query
 * @param {unknown} [body] goes as JSON
 * @param {{method?: string, signal?: AbortSignal}} [options]
 * @returns {Promise<any>} the answer's JSON; null if it has none
 */
export async function askJson(path, body, options = {}) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  const response = await ask(path, { method: body === undefined ? "GET" : "POST", ...options, ...sent });
  return response.status === 204 ? null : response.json();
}

/**
 * Call the API as fetch does, with the visitor's key, which is asked for where the service wants one.
 *
 * @param {string} path relative to the page
 * @param {RequestInit} [options]
 * @returns {Promise<Response>} with a status of success
 */
export async function ask(path, options = {}) {
  const sent = sessionStorage.getItem(KEY);
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...keyHeader() } });
  } catch (error) {
    if (/** @type {Error} */ (error).name === "AbortError") throw error;
    throw new ApiError("The service cannot be reached. Is it still running?", 0, "unreachable");
  }
  if (response.ok) return response;
  if (response.status === 401 && (await hasAnotherKey(sent))) return ask(path, options);
  const told = await response.json().catch(() => ({}));
  const message = told.detail || `The service answered ${response.status} without saying why.`;
  throw new ApiError(message, response.status, told.code ?? "", Number(response.headers.get("Retry-After")) || 0);
}

/** Forget the key, and ask for another with the next request. */
export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

/** Whether the visitor has given a key. */
export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/**
 * Show a picture of the API in an <img>, which cannot send a key by itself.
 *
 * @param {HTMLImageElement} image
 * @param {string} address of the API, or a blob's
 */
export async function showPicture(image, address) {
  if (!hasKey() || address.startsWith("blob:")) {
    image.src = address;
    return;
  }
  try {
    const response = await ask(address);
    const local = URL.createObjectURL(await response.blob());
    const free = () => URL.revokeObjectURL(local);
    image.addEventListener("load", free, { once: true });
    image.addEventListener("error", free, { once: true });
    image.src = local;
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

/** The address of an item. An id may hold any character; "/" stays "/". @param {string} id */
export function pathOf(id) {
  const segments = id.split("/").map(encodeURIComponent);
  // A browser would resolve "." and ".." between slashes, and "thumbnail" at the end is another route.
  const last = segments[segments.length - 1];
  const isOdd = ["thumbnail", "content", "preview"].includes(last) || segments.some((one) => one === "." || one === "..");
  return `images/${segments.join(isOdd ? "%2F" : "/")}`;
}

/**
 * The address of an item's small picture, of 128 px. With the item's digest a browser may keep it for good.
 *
 * @param {Item} item
 */
export function thumbnailOf(item) {
  return `${pictureOf(item.id)}/thumbnail${item.digest ? `?v=${item.digest.slice(0, 16)}` : ""}`;
}

/**
 * The address of an item's picture in a size.
 *
 * @param {Item} item
 * @param {512 | 1024} size longest side in px
 */
export function previewOf(item, size) {
  return `${pictureOf(item.id)}/preview?size=${size}${item.digest ? `&v=${item.digest.slice(0, 16)}` : ""}`;
}

/** The address of an item's own file. @param {string} id */
export function contentOf(id) {
  return `${pictureOf(id)}/content`;
}

/** The address of an item that a picture's name follows. @param {string} id */
function pictureOf(id) {
  const segments = id.split("/").map(encodeURIComponent);
  const isOdd = segments.some((one) => one === "." || one === "..");
  return `images/${segments.join(isOdd ? "%2F" : "/")}`;
}

/** @returns {Record<string, string>} */
function keyHeader() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/**
 * Whether a key other than the one sent is available: another request may have asked for it; else ask the visitor.
 *
 * @param {string | null} sent
 */
async function hasAnotherKey(sent) {
  if (sessionStorage.getItem(KEY) === sent) {
    const key = await askForKey(sent !== null);
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  }
  const now = sessionStorage.getItem(KEY);
  return now !== null && now !== sent;
}
