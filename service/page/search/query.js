// What a search is made by: an item, words, or a picture of the visitor's.

import { ask, askJson, contentOf, previewOf } from "../api.js";
import { keptFiles } from "../parts/kept.js";
import { cropOf, queryOf } from "../parts/shrink.js";
import { fileName } from "../parts/words.js";

/**
 * @typedef {{name: string, id?: string, text?: string, file?: Blob}} Query with one of id, text and file
 * @typedef {{k: number, folder: string, filter: string, part: import("../parts/shrink.js").Part | null, plus: string,
 *   isShrunk: boolean}} QueryOptions plus holds words that are added to a picture
 * @typedef {{hits: import("../api.js").Hit[], digest: string, note: string, k: number}} Found
 *   digest is the sha256 of the query's file, "" if it is unknown or only a part was searched by
 */

/**
 * The queries that an address names; none if the pictures are not kept any more.
 *
 * @param {URLSearchParams} params
 * @returns {Promise<Query[]>}
 */
export async function queriesOf(params) {
  const [id, text, kept] = ["id", "text", "kept"].map((key) => params.get(key));
  if (id) return [{ name: fileName(id), id }];
  if (text) return [{ name: `“${text}”`, text }];
  return kept ? (await keptFiles(kept)).map(({ name, blob }) => ({ name, file: blob })) : [];
}

/**
 * Ask for the items most like a query.
 *
 * @param {Query} query
 * @param {QueryOptions} options
 * @param {Record<string, number>} limits of the service
 * @param {AbortSignal} signal
 * @returns {Promise<Found>}
 */
export async function searchBy(query, options, limits, signal) {
  const { k, part, plus } = options;
  const address = `search?${new URLSearchParams([
    ["k", String(k)],
    ["include", "metadata"],
    ["include", "digest"],
    ...(options.filter ? [["filter", options.filter]] : []),
    ...(options.folder ? [["prefix", options.folder]] : []),
  ])}`;
  const asked = { query, part, limits, isShrunk: options.isShrunk };
  if (query.text || (query.id && !part)) {
    const one = query.text ? { text: query.text } : { id: query.id };
    const found = await askJson(address, plus ? { all: [one, { text: plus }] } : one, { signal });
    return { hits: found.hits, digest: found.digest ?? "", note: "", k };
  }
  const sent = await pictureOf(asked, signal);
  const found = plus
    ? await askJson(address, { all: [{ image: await base64Of(sent.blob) }, { text: plus }] }, { signal })
    : await (await ask(address, { method: "POST", headers: { "Content-Type": typeOf(sent.blob) }, body: sent.blob, signal })).json();
  const digest = part ? "" : sent.digest || (sent.note ? "" : (found.digest ?? ""));
  return { hits: found.hits, digest, note: sent.note, k };
}

/**
 * The picture that goes to the service.
 *
 * @param {{query: Query, part: QueryOptions["part"], limits: Record<string, number>, isShrunk: boolean}} asked
 * @param {AbortSignal} signal
 * @returns {Promise<import("../parts/shrink.js").Sent>}
 */
async function pictureOf({ query, part, limits, isShrunk }, signal) {
  const { file, id } = query;
  if (file && !part) {
    // A folder, or a file that was moved, cannot be read.
    await file.slice(0, 1).arrayBuffer().catch(() => {
      throw new Error("The file cannot be read. Is it a folder, or has it been moved?");
    });
    return queryOf(file, limits, isShrunk);
  }
  const whole = /** @type {import("../parts/shrink.js").Part} */ (part);
  if (file) return { blob: await cropOf(file, whole), digest: "", note: "" };
  const own = contentOf(/** @type {string} */ (id));
  const preview = previewOf({ id: /** @type {string} */ (id), metadata: {} }, 1024);
  const cropped = async (/** @type {string} */ address) => cropOf(await (await ask(address, { signal })).blob(), whole);
  // Not each item has its file, and a browser cannot decode each format.
  return { blob: await cropped(own).catch(() => cropped(preview)), digest: "", note: "" };
}

/**
 * The type to send a file with. A JSON or text file must not be taken for another kind of request, and the service
 * recognises pictures by their bytes.
 *
 * @param {Blob} blob
 */
function typeOf(blob) {
  return blob.type.startsWith("image/") ? blob.type : "application/octet-stream";
}

/** @param {Blob} blob @returns {Promise<string>} */
export async function base64Of(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return btoa(text);
}
