// A sheet to draw a digit on. The drawing becomes a picture in the layout of MNIST.

import { addressOf, go } from "../router.js";
import { make, makeButton } from "./elements.js";
import { keepFiles } from "./kept.js";

// All lengths are in px. The sheet is ten times MNIST's side.
const SIDE = 280;
// The pen's width on the sheet.
const BRUSH = 28;
// The ink's longer side in the picture: 20 of 28 in MNIST.
const INK_SIDE = 200;
// The pen's width in the picture. Of the ten pictures nearest to a drawn digit 83 % are that digit with 20 and 72 %
// with 28 (models/mnist, gallery digits, 60 synthetic drawings; in a gallery of MNIST over 99 % with both).
const PEN = 20;

/**
 * A point in px of the sheet.
 *
 * @typedef {[number, number]} Point
 */

/** Make the sheet. "Search" takes the drawing as a query. */
export function startDrawing() {
  const canvas = make("canvas", { id: "canvas", width: SIDE, height: SIDE, role: "img", "aria-label": "A sheet to draw a digit on" });
  const sheet = make("div", { class: "sheet", "data-empty": true }, canvas);
  /** @type {Point[][]} */
  let strokes = [];
  /** @type {Point[]} */
  let stroke = [];
  // The id of the finger, pen or mouse that draws; others are ignored meanwhile.
  /** @type {number | null} */
  let pointer = null;
  const redraw = () => paint(canvas, strokes, BRUSH);
  const clear = makeButton("Clear", () => {
    strokes = [];
    pointer = null;
    change();
  }, { id: "clear" });
  const search = makeButton("Search", async () => {
    const file = new File([await toPicture(strokes)], "your drawing", { type: "image/png" });
    go(addressOf("search", { kept: await keepFiles([file]) }));
  }, { id: "search-drawing", class: "strong" });
  const change = () => {
    sheet.toggleAttribute("data-empty", !strokes.length);
    clear.disabled = search.disabled = !strokes.length;
    redraw();
  };
  change();

  canvas.addEventListener("pointerdown", (event) => {
    if (pointer !== null || event.button !== 0) return;
    event.preventDefault();
    pointer = event.pointerId;
    canvas.setPointerCapture(pointer);
    stroke = [where(canvas, event)];
    strokes.push(stroke);
    change();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) stroke.push(where(canvas, one));
    redraw();
  });
  const finish = (/** @type {PointerEvent} */ event) => {
    if (event.pointerId === pointer) pointer = null;
  };
  canvas.addEventListener("pointerup", finish);
  canvas.addEventListener("pointercancel", finish);
  return make(
    "section",
    { class: "drawing", "aria-label": "Draw a digit" },
    sheet,
    make(
      "div",
      {},
      make("h2", {}, "Draw a digit"),
      make("p", { class: "soft" }, "These are scanned digits. Draw one and search by it, or open a picture to see what looks like it. "),
      make("p", { class: "buttons" }, search, clear),
    ),
  );
}

/**
 * A pointer's position in px of the sheet, independent of its size on the screen.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {PointerEvent} event
 * @returns {Point}
 */
function where(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
}

/**
 * The drawing as a PNG in MNIST's layout: the ink's longer side is 20 of 28, its centre of mass in the middle.
 *
 * The strokes are scaled and repainted, so that the lines of a small drawing do not become thick.
 *
 * @param {Point[][]} strokes
 * @returns {Promise<Blob>}
 */
function toPicture(strokes) {
  const [xs, ys] = [0, 1].map((axis) => strokes.flat().map((point) => point[axis]));
  const long = Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys));
  // The lower bound keeps a dot a dot.
  const scale = (INK_SIDE - PEN) / Math.max(long, BRUSH);
  const place = (/** @type {number} */ dx, /** @type {number} */ dy) =>
    strokes.map((stroke) => stroke.map(([x, y]) => /** @type {Point} */ ([x * scale + dx, y * scale + dy])));

  const page = document.createElement("canvas");
  page.width = page.height = SIDE;
  const middle = (/** @type {number[]} */ values) => SIDE / 2 - (scale * (Math.min(...values) + Math.max(...values))) / 2;
  const [left, top] = [middle(xs), middle(ys)];
  paint(page, place(left, top), PEN);
  const [x, y] = centreOfMass(page);
  // A larger shift would move ink out of the picture.
  const most = (SIDE - INK_SIDE) / 2;
  const towards = (/** @type {number} */ centre) => Math.min(most, Math.max(-most, SIDE / 2 - centre));
  paint(page, place(left + towards(x), top + towards(y)), PEN);
  return new Promise((resolve) => page.toBlob((blob) => resolve(/** @type {Blob} */ (blob)), "image/png"));
}

/**
 * Paint strokes white on black.
 *
 * @param {HTMLCanvasElement} on
 * @param {Point[][]} strokes
 * @param {number} width
 */
function paint(on, strokes, width) {
  const context = contextOf(on);
  context.fillStyle = "black";
  context.fillRect(0, 0, SIDE, SIDE);
  context.strokeStyle = "white";
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...stroke[0]);
    // A line back to the start makes a dot visible.
    for (const point of stroke) context.lineTo(...point);
    context.stroke();
  }
}

/** The ink's centre of mass in px. @param {HTMLCanvasElement} page @returns {Point} */
function centreOfMass(page) {
  const { data } = contextOf(page).getImageData(0, 0, SIDE, SIDE); // (SIDE, SIDE, 4)
  let [mass, x, y] = [0, 0, 0];
  for (let at = 0; at < SIDE * SIDE; at += 1) {
    const ink = data[4 * at];
    mass += ink;
    x += ink * ((at % SIDE) + 0.5);
    y += ink * (Math.floor(at / SIDE) + 0.5);
  }
  return [x / mass, y / mass];
}

/** @param {HTMLCanvasElement} canvas */
function contextOf(canvas) {
  return /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
}
