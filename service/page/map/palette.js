// Colours for a canvas, which knows no CSS variables.

import { make } from "../parts/elements.js";

/**
 * The colours of points, by their code: the first for points without a value, then one for each value.
 *
 * @typedef {import("./scatter.js").Colour} Colour
 * @typedef {{colours: Colour[], paper: Colour, ink: string, accent: string}} Palette
 */

/**
 * The colours of the page as it looks now, and those of values: hues all around, the next ten lighter or darker.
 *
 * @param {number} count of values
 * @returns {Palette}
 */
export function readPalette(count) {
  const probe = document.body.appendChild(make("i", { class: "unseen" }));
  const context = /** @type {CanvasRenderingContext2D} */ (make("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true }));
  /** @param {string} colour @returns {Colour} */
  const parse = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
    return [red, green, blue];
  };
  const read = (/** @type {string} */ name) => {
    probe.style.color = `var(${name})`;
    return parse(getComputedStyle(probe).color);
  };
  const paper = read("--card");
  const isDark = paper[0] + paper[1] + paper[2] < 384;
  const lightness = isDark ? [0.72, 0.86, 0.58] : [0.58, 0.42, 0.74];
  const colours = Array.from({ length: count }, (_, at) => {
    const round = Math.floor(at / 10);
    return parse(`oklch(${lightness[round % 3]} 0.15 ${(at % 10) * 36 + round * 18 + 20})`);
  });
  const first = read(count ? "--edge" : "--accent");
  const [ink, accent] = [read("--ink"), read("--accent")].map((colour) => `rgb(${colour.join(" ")})`);
  probe.remove();
  return { colours: [first, ...colours], paper, ink, accent };
}
