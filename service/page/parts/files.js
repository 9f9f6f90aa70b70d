// Files that the visitor hands over: folders are walked, and the pictures in them are told from other files.

import { make } from "./elements.js";
import { formatCount } from "./words.js";

const ENDINGS = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf])$/i;
const TYPES = /^image\/(jpeg|png|webp|gif|bmp|tiff|avif|hei[cf])/;

/**
 * @typedef {{path: string, file: File}} FoundFile path is its name, or its path within the folder that was handed over
 * @typedef {{files: FoundFile[], leftOut: string[], folder: string}} Handed
 *   leftOut holds the paths of what is no picture in a folder; folder is "" where files were handed over one by one
 */

/** What is in a file input. @param {HTMLInputElement} input @returns {Handed} */
export function filesOf(input) {
  const files = [...(input.files ?? [])].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
  return input.webkitdirectory ? picturesOf(files, files[0]?.path.split("/")[0] ?? "") : { files, leftOut: [], folder: "" };
}

/**
 * What was dropped or pasted. It must be called while the event is handled: its entries are gone afterwards.
 *
 * @param {DataTransfer | null} transfer
 * @returns {Promise<Handed>}
 */
export async function filesIn(transfer) {
  const entries = [...(transfer?.items ?? [])].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry());
  const folders = entries.filter((entry) => entry?.isDirectory);
  const single = [...(transfer?.files ?? [])].filter((file) => !folders.some((folder) => folder?.name === file.name));
  const files = single.map((file) => ({ path: file.name, file }));
  if (!folders.length) return { files, leftOut: [], folder: "" };
  for (const folder of folders) files.push(...(await walk(/** @type {FileSystemDirectoryEntry} */ (folder))));
  return picturesOf(files, folders.map((folder) => folder?.name).join(", "));
}

/** @param {FoundFile[]} files @param {string} folder @returns {Handed} */
function picturesOf(files, folder) {
  const sorted = files.sort((a, b) => a.path.localeCompare(b.path, undefined, { numeric: true }));
  const pictures = sorted.filter(isPicture);
  return { files: pictures, leftOut: sorted.filter((one) => !isPicture(one)).map(({ path }) => path), folder };
}

/** @param {FoundFile} found */
function isPicture({ path, file }) {
  // Some systems put hidden companions beside pictures, such as ._a.jpg.
  return !/(^|\/)\./.test(path) && (ENDINGS.test(path) || TYPES.test(file.type));
}

/** All files below a folder. @param {FileSystemDirectoryEntry} folder @returns {Promise<FoundFile[]>} */
async function walk(folder) {
  /** @type {FoundFile[]} */
  const found = [];
  const reader = folder.createReader();
  for (;;) {
    // A call returns some of the entries, and none at the end.
    const entries = await new Promise((/** @type {(entries: FileSystemEntry[]) => void} */ resolve, reject) =>
      reader.readEntries(resolve, reject),
    );
    if (!entries.length) return found;
    for (const entry of entries) {
      if (entry.isDirectory) found.push(...(await walk(/** @type {FileSystemDirectoryEntry} */ (entry))));
      else {
        const file = await new Promise((/** @type {(file: File) => void} */ resolve, reject) =>
          /** @type {FileSystemFileEntry} */ (entry).file(resolve, reject),
        );
        found.push({ path: entry.fullPath.replace(/^\//, ""), file });
      }
    }
  }
}

/** What was left out of a folder, as a list to open; null for nothing. @param {string[]} paths */
export function makeLeftOut(paths) {
  if (!paths.length) return null;
  const text = paths.length === 1 ? "1 other file is left out" : `${formatCount(paths.length)} other files are left out`;
  return make(
    "details",
    { class: "left-out soft" },
    make("summary", {}, text),
    make("ul", {}, ...paths.map((path) => make("li", {}, path))),
  );
}

/** @type {((handed: Handed) => void) | null} */
let receiver = null;
/** @type {Handed | null} */
let pending = null;

/**
 * Let a view take what is handed over while it is open.
 *
 * @param {(handed: Handed) => void} receive is told at once of what was handed over for it before
 * @param {AbortSignal} signal of the view
 */
export function receiveFiles(receive, signal) {
  receiver = receive;
  signal.addEventListener("abort", () => {
    if (receiver === receive) receiver = null;
  });
  const waiting = pending;
  pending = null;
  if (waiting) receive(waiting);
}

/** Give files to the view that takes them; return false if none is open. @param {Handed} handed */
export function deliver(handed) {
  receiver?.(handed);
  return receiver !== null;
}

/** Leave files for the view that is opened next. @param {Handed} handed */
export function leaveFiles(handed) {
  pending = handed;
}
