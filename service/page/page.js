// The page: what is asked stands in the browser's history, and the views show where history is.
//
//   #              the gallery
//   #id=…          lookalikes of an item
//   #picture       lookalikes of a picture of the visitor's, which history names by its key in `pictures`

import { focusAnswer, hideAnswer, showFailure, showHits, showQuery } from "./answer.js";
import { getInfo, searchById, searchByPicture, thumbnailOf } from "./api.js";
import { watchForPictures } from "./chooser.js";
import { startDrawing } from "./drawing.js";
import { fillGallery, toggleGallery } from "./gallery.js";
import { showInfo, showInfoError } from "./header.js";

const HITS = 24;
const ITEM = "#id=";
const DRAWING = "your drawing";

const pictures = new Map(); // {name, blob, address} by the time they came: kept for Back, as long as the page is open
let inFlight = new AbortController(); // the latest query; a newer one aborts it
let k = HITS;

/** Show what the browser's history says. */
function show() {
  inFlight.abort();
  const { hash } = location;
  const picture = pictures.get(history.state?.picture);
  if (hash.startsWith(ITEM)) {
    const id = decode(hash.slice(ITEM.length));
    answer(id, thumbnailOf(id), (signal) => searchById(id, k, signal));
  } else if (hash === "#picture" && picture) {
    answer(picture.name, picture.address, (signal) => searchByPicture(picture.blob, k, signal));
  } else {
    hideAnswer();
    toggleGallery(true);
  }
}

async function answer(name, address, search) {
  inFlight = new AbortController();
  const { signal } = inFlight;
  toggleGallery(false);
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

/** Search by a picture of the visitor's. */
function askByPicture(name, blob) {
  const key = Date.now();
  pictures.set(key, { name, blob, address: URL.createObjectURL(blob) });
  history.pushState({ picture: key }, "", "#picture");
  show();
}

/** Search by a drawing; one that goes on, while its answer is in view, takes the place of what it was before. */
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
    return text; // not of our making; the service will not know it
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
} catch (error) {
  showInfoError(error);
}
// Whoever was quicker than this has their answer, or waits for it; unless they asked for more than they may have.
if (inFlight === untouched || k < HITS) show();
if (/^(digits|mnist)\//.test((await first)?.id)) {
  startDrawing(askByDrawing);
}
