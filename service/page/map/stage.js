// A plane to look at: dragging, wheel, pinch, buttons and keys move the part in sight, and an outline can be drawn.

import { make, makeButton } from "../parts/elements.js";
import { SIDE } from "./points.js";

const STEP = 1.5;
// An arrow key moves by so many px.
const STRIDE = 80;
// A pointer that moves by fewer px clicks.
const CLICK = 5;
// Nothing moves any more after so many ms.
const REST = 140;
// Room at the edges of the whole plane.
const MARGIN = 0.06;
// Pixels for the smallest distance of two places, at most.
const CLOSEST = 6;

/**
 * @typedef {import("./points.js").Box} Box
 * @typedef {import("./scatter.js").Sight} Sight
 * @typedef {[number, number]} Place in the plane
 */

/**
 * @typedef {object} StageOptions
 * @property {string} label for screen readers
 * @property {AbortSignal} signal of the view
 * @property {() => void} draw the part in sight
 * @property {() => void} rest is called once nothing moves any more
 * @property {(place: Place | null) => void} point a mouse points at a place, or nowhere any more
 * @property {(place: Place, inNewTab: boolean) => void} open a place was clicked
 * @property {() => void} enter the Enter key was pressed
 * @property {(outline: Place[]) => void} outline was drawn around something
 */

/** @param {StageOptions} options */
export function makeStage({ label, signal, draw, rest, point, open, enter, outline }) {
  const canvas = make("canvas");
  const marks = make("canvas", { class: "marks" });
  const layer = make("div", { class: "layer", "aria-hidden": "true" });
  const element = make("div", { class: "plane", id: "plane", tabindex: "0", role: "application", "aria-label": label }, canvas, marks, layer);
  /** @type {Sight} */
  const sight = { x: SIDE / 2, y: SIDE / 2, scale: 0 };
  /** @type {Map<number, {x: number, y: number}>} */
  const pointers = new Map();
  /** @type {Place[] | null} */
  let drawn = null;
  let hasTool = false;
  let travelled = 0;
  let frame = 0;
  let timer = 0;
  /** @type {Box | null} */
  let wanted = null;

  const width = () => element.clientWidth;
  const height = () => element.clientHeight;
  const whole = () => (Math.min(width(), height()) * (1 - 2 * MARGIN)) / SIDE;

  /** Draw with the next frame. */
  function refresh() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (!signal.aborted && sight.scale) draw();
    });
  }

  function moved() {
    sight.scale = Math.min(Math.max(CLOSEST, whole()), Math.max(whole() * 0.5, sight.scale));
    sight.x = Math.min(SIDE, Math.max(0, sight.x));
    sight.y = Math.min(SIDE, Math.max(0, sight.y));
    element.setAttribute("aria-busy", "true");
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (signal.aborted) return;
      rest();
      element.removeAttribute("aria-busy");
    }, REST);
    refresh();
  }

  /** Zoom so that what is `dx`, `dy` px from the middle stays there. */
  function zoomBy(/** @type {number} */ factor, dx = 0, dy = 0) {
    const before = sight.scale;
    const after = Math.min(Math.max(CLOSEST, whole()), Math.max(whole() * 0.5, before * factor));
    sight.x += dx / before - dx / after;
    sight.y += dy / before - dy / after;
    sight.scale = after;
    moved();
  }

  function panBy(/** @type {number} */ dx, /** @type {number} */ dy) {
    sight.x -= dx / sight.scale;
    sight.y -= dy / sight.scale;
    moved();
  }

  /** Show a box of the plane, or the whole plane. @param {Box | null} box */
  function show(box) {
    wanted = box;
    if (!width()) return;
    wanted = null;
    if (box) {
      sight.x = (box.left + box.right) / 2;
      sight.y = (box.top + box.bottom) / 2;
      sight.scale = Math.min(width() / Math.max(1, box.right - box.left), height() / Math.max(1, box.bottom - box.top));
    } else Object.assign(sight, { x: SIDE / 2, y: SIDE / 2, scale: whole() });
    moved();
  }

  /** Pixels from the middle. @param {{clientX: number, clientY: number}} event */
  function fromMiddle(event) {
    const box = element.getBoundingClientRect();
    return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
  }

  /** @param {{clientX: number, clientY: number}} event @returns {Place} */
  function placeOf(event) {
    const [dx, dy] = fromMiddle(event);
    return [sight.x + dx / sight.scale, sight.y + dy / sight.scale];
  }

  element.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const [dx, dy] = fromMiddle(event);
      const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
      zoomBy(Math.exp((-event.deltaY * lines) / 300), dx, dy);
    },
    { passive: false, signal },
  );
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    element.setPointerCapture(event.pointerId);
    travelled = 0;
    drawn = pointers.size === 1 && (hasTool || event.shiftKey) ? [placeOf(event)] : null;
  });
  element.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) {
      if (event.pointerType === "mouse") point(placeOf(event));
      return;
    }
    const [dx, dy] = [event.clientX - before.x, event.clientY - before.y];
    travelled += Math.hypot(dx, dy);
    if (drawn) {
      drawn.push(placeOf(event));
      refresh();
    } else if (pointers.size === 1) {
      if (travelled >= CLICK) panBy(dx, dy);
    } else {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, one]) => one);
      const distance = (/** @type {{x: number, y: number}} */ one) => Math.max(1, Math.hypot(one.x - other.x, one.y - other.y));
      const now = { x: event.clientX, y: event.clientY };
      const [mx, my] = fromMiddle({ clientX: (now.x + other.x) / 2, clientY: (now.y + other.y) / 2 });
      panBy(dx / 2, dy / 2);
      zoomBy(distance(now) / distance(before), mx, my);
    }
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  element.addEventListener("pointerup", (event) => {
    if (!pointers.delete(event.pointerId)) return;
    const outlined = drawn;
    drawn = null;
    if (outlined && travelled >= CLICK) outline(outlined);
    else if (travelled < CLICK && !pointers.size) open(placeOf(event), event.ctrlKey || event.metaKey);
    // The second finger of a pinch is no click when it leaves.
    else travelled = CLICK;
    refresh();
  });
  element.addEventListener("pointercancel", (event) => {
    pointers.delete(event.pointerId);
    drawn = null;
    refresh();
  });
  element.addEventListener("pointerleave", () => point(null));
  element.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    /** @type {Record<string, () => void>} */
    const acts = {
      ArrowLeft: () => panBy(STRIDE, 0),
      ArrowRight: () => panBy(-STRIDE, 0),
      ArrowUp: () => panBy(0, STRIDE),
      ArrowDown: () => panBy(0, -STRIDE),
      "+": () => zoomBy(STEP),
      "=": () => zoomBy(STEP),
      "-": () => zoomBy(1 / STEP),
      0: () => show(null),
      Home: () => show(null),
      Enter: enter,
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  });
  for (const kind of ["focus", "blur"]) element.addEventListener(kind, refresh);

  // It is told when the stage enters the document, too.
  const observer = new ResizeObserver(() => {
    const ratio = Math.min(2, window.devicePixelRatio);
    for (const one of [canvas, marks]) {
      one.width = Math.max(1, Math.round(width() * ratio));
      one.height = Math.max(1, Math.round(height() * ratio));
    }
    if (!width()) return;
    if (wanted || !sight.scale) show(wanted);
    else moved();
  });
  observer.observe(element);
  signal.addEventListener("abort", () => {
    observer.disconnect();
    clearTimeout(timer);
    cancelAnimationFrame(frame);
  });

  return {
    element,
    canvas,
    marks,
    layer,
    sight,
    show,
    refresh,
    buttons: [
      makeButton("−", () => zoomBy(1 / STEP), { id: "map-out", "aria-label": "Zoom out" }),
      makeButton("+", () => zoomBy(STEP), { id: "map-in", "aria-label": "Zoom in" }),
      makeButton("Whole map", () => show(null), { id: "map-whole" }),
    ],

    /** Whether the next drag draws an outline. @param {boolean} has */
    setTool(has) {
      hasTool = has;
      element.classList.toggle("outlining", has);
    },

    /** Pixels of the canvas for one of the page. */
    ratio: () => canvas.width / Math.max(1, width()),

    /** The part of the plane in sight. @returns {Box} */
    box() {
      const [dx, dy] = [width() / 2 / sight.scale, height() / 2 / sight.scale];
      return { left: sight.x - dx, top: sight.y - dy, right: sight.x + dx, bottom: sight.y + dy };
    },

    /** Where a place of the plane is, in px from the left top. @param {number} x @param {number} y @returns {Place} */
    toPixels: (x, y) => [(x - sight.x) * sight.scale + width() / 2, (y - sight.y) * sight.scale + height() / 2],

    /** The outline that is being drawn. */
    drawn: () => drawn,

    isWhole: () => Math.abs(sight.scale / whole() - 1) < 0.001 && Math.hypot(sight.x - SIDE / 2, sight.y - SIDE / 2) < 2,

    /** How much larger everything is than on the whole map. */
    zoom: () => sight.scale / whole(),
  };
}
