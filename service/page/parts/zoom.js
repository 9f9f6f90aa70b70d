// Zoom and pan of one picture, or of several that move together.

import { makeButton } from "./elements.js";

const MOST = 16;
const STEP = 1.4;

/**
 * Let pictures be zoomed by wheel, pinch, double click, buttons and keys, and be moved by dragging and arrows.
 *
 * All move together: each shows the same part of its picture.
 *
 * @param {HTMLElement[]} frames each holds one picture, which fills it, and cuts off what stands out
 * @param {AbortSignal} signal of the view
 */
export function makeZoom(frames, signal) {
  let scale = 1;
  // The part of the picture in the middle of the frame, as shares of its width and height.
  let [x, y] = [0.5, 0.5];
  /** @type {Map<number, {x: number, y: number}>} */
  const pointers = new Map();

  function apply() {
    scale = Math.min(MOST, Math.max(1, scale));
    const room = 0.5 / scale;
    x = Math.min(1 - room, Math.max(room, x));
    y = Math.min(1 - room, Math.max(room, y));
    for (const frame of frames) {
      const picture = /** @type {HTMLElement} */ (frame.querySelector("img, canvas"));
      picture.style.transform = `scale(${scale}) translate(${(0.5 - x) * 100}%, ${(0.5 - y) * 100}%)`;
      frame.classList.toggle("zoomed", scale > 1);
    }
    less.disabled = whole.disabled = scale === 1;
    more.disabled = scale === MOST;
  }

  /** Zoom so that a place in the frame, as shares of its sides from the middle, stays where it is. */
  function zoomBy(/** @type {number} */ factor, dx = 0, dy = 0) {
    const before = scale;
    scale = Math.min(MOST, Math.max(1, scale * factor));
    x += dx / before - dx / scale;
    y += dy / before - dy / scale;
    apply();
  }

  /** Shares of the frame's sides from its middle. */
  function from(/** @type {HTMLElement} */ frame, /** @type {{clientX: number, clientY: number}} */ event) {
    const box = frame.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width - 0.5, (event.clientY - box.top) / box.height - 0.5];
  }

  const less = makeButton("−", () => zoomBy(1 / STEP), { "aria-label": "Zoom out" });
  const more = makeButton("+", () => zoomBy(STEP), { "aria-label": "Zoom in" });
  const whole = makeButton("Whole picture", () => {
    scale = 1;
    apply();
  });

  for (const frame of frames) {
    frame.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const [dx, dy] = from(frame, event);
        zoomBy(Math.exp(-event.deltaY / 400), dx, dy);
      },
      { passive: false, signal },
    );
    frame.addEventListener("dblclick", (event) => {
      const [dx, dy] = from(frame, event);
      zoomBy(scale > 1 ? 1 / scale : 3, dx, dy);
    });
    frame.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      frame.setPointerCapture(event.pointerId);
    });
    frame.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const now = { x: event.clientX, y: event.clientY };
      const others = [...pointers].filter(([id]) => id !== event.pointerId);
      const box = frame.getBoundingClientRect();
      if (others.length === 1) {
        const [, other] = others[0];
        const apart = (/** @type {{x: number, y: number}} */ one) => Math.hypot(one.x - other.x, one.y - other.y) || 1;
        const [dx, dy] = from(frame, { clientX: (now.x + other.x) / 2, clientY: (now.y + other.y) / 2 });
        zoomBy(apart(now) / apart(before), dx, dy);
      } else {
        x -= (now.x - before.x) / box.width / scale;
        y -= (now.y - before.y) / box.height / scale;
        apply();
      }
      pointers.set(event.pointerId, now);
    });
    for (const kind of /** @type {const} */ (["pointerup", "pointercancel"])) {
      frame.addEventListener(kind, (event) => pointers.delete(event.pointerId));
    }
    frame.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      /** @type {Record<string, () => void>} */
      const acts = {
        "+": () => zoomBy(STEP),
        "=": () => zoomBy(STEP),
        "-": () => zoomBy(1 / STEP),
        0: () => zoomBy(1 / scale),
      };
      if (scale > 1) {
        acts.Escape = () => zoomBy(1 / scale);
        acts.ArrowLeft = () => move(-1, 0);
        acts.ArrowRight = () => move(1, 0);
        acts.ArrowUp = () => move(0, -1);
        acts.ArrowDown = () => move(0, 1);
      }
      if (!acts[event.key]) return;
      event.preventDefault();
      event.stopPropagation();
      acts[event.key]();
    });
  }

  function move(/** @type {number} */ dx, /** @type {number} */ dy) {
    x += (0.1 * dx) / scale;
    y += (0.1 * dy) / scale;
    apply();
  }

  apply();
  // After a frame has got another picture, `apply` gives it the zoom of the others.
  return { buttons: [more, less, whole], isZoomed: () => scale > 1, apply };
}
