// A frame on a picture: draw it with mouse or finger, or move it with the keys, and search by the part inside.

import { make, makeButton } from "../parts/elements.js";

// A frame is at least this share of each side, and a key moves it so far.
const LEAST = 0.02;
const STEP = 0.02;
/** Where the frame begins for the keyboard. @type {Part} */
const MIDDLE = { x: 0.2, y: 0.2, width: 0.6, height: 0.6 };

/** @typedef {import("../parts/shrink.js").Part} Part */

/** The part that "x,y,width,height" names; null if it is none. @param {string} text @returns {Part | null} */
export function parsePart(text) {
  const [x, y, width, height] = text.split(",").map(Number);
  const isPart = x >= 0 && y >= 0 && width > 0 && height > 0 && x + width <= 1.0001 && y + height <= 1.0001;
  return isPart ? { x, y, width, height } : null;
}

/** @param {Part} part */
export function formatPart({ x, y, width, height }) {
  return [x, y, width, height].map((share) => String(Number(share.toFixed(4)))).join(",");
}

/**
 * Lay a frame over a picture.
 *
 * @param {HTMLImageElement} picture
 * @param {Part | null} part the frame to begin with
 * @param {(part: Part | null) => void} search called with the part to search by; null for the whole picture
 */
export function makeCrop(picture, part, search) {
  let shown = part;
  // The pointer that draws or moves the frame, and where it began.
  /** @type {{id: number, x: number, y: number, moved: Part | null} | null} */
  let drag = null;
  const frame = make("div", { class: "crop-frame", tabindex: "0", role: "group", id: "crop-frame" });
  const sheet = make("div", { class: "crop-sheet" }, picture, frame);
  const begin = makeButton("Select a part", () => {
    sheet.classList.add("selecting");
    shown ??= MIDDLE;
    show();
    frame.focus();
  }, { id: "crop-begin" });
  const go = makeButton("Search by this part", () => search(shown), { class: "strong", id: "crop-search" });
  const whole = makeButton("Whole picture", () => {
    sheet.classList.remove("selecting");
    if (part) return search(null);
    shown = null;
    show();
    begin.focus();
  }, { id: "crop-whole" });

  function show() {
    frame.hidden = !shown;
    begin.hidden = shown !== null;
    whole.hidden = !shown;
    go.hidden = !shown || (part !== null && formatPart(shown) === formatPart(part));
    if (!shown) return;
    const percent = (/** @type {number} */ share) => `${Math.round(share * 100)} %`;
    frame.style.left = `${shown.x * 100}%`;
    frame.style.top = `${shown.y * 100}%`;
    frame.style.width = `${shown.width * 100}%`;
    frame.style.height = `${shown.height * 100}%`;
    frame.setAttribute(
      "aria-label",
      `Part of the picture, ${percent(shown.width)} by ${percent(shown.height)} from ${percent(shown.x)}, ${percent(shown.y)}. ` +
        "Arrows move it, Shift with arrows resizes it, Enter searches",
    );
  }

  /** A pointer's place as shares of the picture's sides. @param {PointerEvent} event */
  function where(event) {
    const box = picture.getBoundingClientRect();
    const within = (/** @type {number} */ share) => Math.min(1, Math.max(0, share));
    return { x: within((event.clientX - box.left) / box.width), y: within((event.clientY - box.top) / box.height) };
  }

  function move(/** @type {Part} */ from, /** @type {number} */ dx, /** @type {number} */ dy) {
    const x = Math.min(1 - from.width, Math.max(0, from.x + dx));
    const y = Math.min(1 - from.height, Math.max(0, from.y + dy));
    shown = { ...from, x, y };
    show();
  }

  sheet.addEventListener("pointerdown", (event) => {
    // A finger scrolls the page unless the visitor wants to select.
    if (drag || event.button !== 0 || (event.pointerType === "touch" && !sheet.classList.contains("selecting"))) return;
    if (picture.classList.contains("broken")) return;
    event.preventDefault();
    sheet.setPointerCapture(event.pointerId);
    drag = { id: event.pointerId, ...where(event), moved: event.target === frame ? shown : null };
  });
  sheet.addEventListener("pointermove", (event) => {
    if (event.pointerId !== drag?.id) return;
    const { x, y } = where(event);
    if (drag.moved) return move(drag.moved, x - drag.x, y - drag.y);
    const width = Math.abs(x - drag.x);
    const height = Math.abs(y - drag.y);
    if (width < LEAST || height < LEAST) return;
    shown = { x: Math.min(x, drag.x), y: Math.min(y, drag.y), width, height };
    show();
  });
  sheet.addEventListener("pointerup", (event) => {
    if (event.pointerId !== drag?.id) return;
    drag = null;
    // A click without a movement changes nothing.
    if (!go.hidden && !sheet.classList.contains("selecting")) search(shown);
  });
  sheet.addEventListener("pointercancel", () => {
    drag = null;
    shown = part;
    show();
  });
  frame.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !shown) return;
    if (event.key === "Enter") {
      event.preventDefault();
      return search(shown);
    }
    /** @type {Record<string, [number, number]>} */
    const ways = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
    if (!ways[event.key]) return;
    event.preventDefault();
    const [dx, dy] = ways[event.key];
    if (!event.shiftKey) return move(shown, dx, dy);
    const width = Math.min(1 - shown.x, Math.max(LEAST, shown.width + dx));
    const height = Math.min(1 - shown.y, Math.max(LEAST, shown.height + dy));
    shown = { ...shown, width, height };
    show();
  });
  picture.addEventListener("error", () => {
    // The file may still be searched by, as the service knows more formats.
    if (picture.classList.contains("broken")) begin.hidden = frame.hidden = go.hidden = whole.hidden = true;
  });
  show();
  return { sheet, buttons: [begin, go, whole] };
}
