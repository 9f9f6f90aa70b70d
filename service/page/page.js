// The page: the browser's history holds the query, and the views show the current entry.
//
//   #              the gallery
//   #id=…          lookalikes of an item
//   #text=…        the pictures most like words
//   #picture       lookalikes of the visitor's picture; the history entry holds its key in `pictures`

import { focusAnswer, hideAnswer, showFailure, showHits, showQuery } from "./answer.js";
import { getInfo, searchById, searchByPicture, searchByText, thumbnailOf } from "./api.js";
import { watchForPictures } from "./chooser.js";
import { startDrawing } from "./drawing.js";
import { fillField, startField } from "./field.js";
import { fillGallery, toggleGallery } from "./gallery.js";
import { showInfo, showInfoError } from "./header.js";

const HITS = 24;
const ITEM = "#id=";
const TEXT = "#text=";
const TITLE = document.title;
const DRAWING = "your drawing";

// {name, blob, address} by time of arrival. Back needs them until the page closes.
const pictures = new Map();
// The latest query; a newer one aborts it.
let inFlight = new AbortController();
let k = HITS;

/** Show the current entry of the browser's history. */
function show() {
  inFlight.abort();
  const { hash } = location;
  const picture = pictures.get(history.state?.picture);
  const text = hash.startsWith(TEXT) ? decode(hash.slice(TEXT.length)) : "";
  fillField(text);
  if (text) {
    answer(`“${text}”`, "", (signal) => searchByText(text, k, signal));
  } else if (hash.startsWith(ITEM)) {
    const id = decode(hash.slice(ITEM.length));
    answer(id, thumbnailOf(id), (signal) => searchById(id, k, signal));
  } else if (hash === "#picture" && picture) {
    answer(picture.name, picture.address, (signal) => searchByPicture(picture.blob, k, signal));
  } else {
    document.title = TITLE;
    hideAnswer();
    toggleGallery(true);
  }
}

async function answer(name, address, search) {
  inFlight = new AbortController();
  const { signal } = inFlight;
  toggleGallery(false);
  document.title = `${name} · ${TITLE}`;
  showQuery(name, address);
  try {
    const hits = await search(signal);
    if (!signal.aborted) showHits(hits, askById);
  } catch (error) {
    if (!signal.aborted) showFailure(name, error);
  }
}

/** Search by an item of the gallery. */
function askById({ id }) {
  history.pushState(null, "", ITEM + encodeURIComponent(id));
  window.scrollTo(0, 0);
  show();
  focusAnswer();
}

/** Search by words. */
function askByText(text) {
  history.pushState(null, "", TEXT + encodeURIComponent(text));
  show();
}

/** Search by the visitor's picture. */
function askByPicture(name, blob) {
  const key = Date.now();
  pictures.set(key, { name, blob, address: URL.createObjectURL(blob) });
  history.pushState({ picture: key }, "", "#picture");
  show();
}

/** Search by a drawing. A continued drawing replaces its earlier version while the answer is in view. */
function askByDrawing(blob, isNew) {
  const shown = pictures.get(history.state?.picture);
  if (isNew || shown?.name !== DRAWING) {
    askByPicture(DRAWING, blob);
    return;
  }
  URL.revokeObjectURL(shown.address);
  Object.assign(shown, { blob, address: URL.createObjectURL(blob) });
  show();
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    // The visitor edited the address; the service will report an unknown id.
    return text;
  }
}

window.addEventListener("popstate", show);
watchForPictures((file) => askByPicture(file.name || "your picture", file));
const first = fillGallery(askById);
const untouched = inFlight;
try {
  const info = await getInfo();
  k = Math.min(HITS, info.limits.max_k);
  showInfo(info);
  if (info.queries.includes("text")) startField(info.limits.max_text_characters, askByText);
} catch (error) {
  showInfoError(error);
}
// A query made before this point is already running. It runs again only if the service allows fewer hits.
if (inFlight === untouched || k < HITS) show();
if (/^(digits|mnist)\//.test((await first)?.id)) {
  startDrawing(askByDrawing);
}
