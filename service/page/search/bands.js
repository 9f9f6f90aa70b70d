// Hits in bands by their scores, with controls for where the bands begin.

import { make, makeButton } from "../parts/elements.js";
import { formatScore } from "../parts/words.js";

/**
 * @typedef {import("../api.js").Hit} Hit
 * @typedef {{near: number, alike: number}} Thresholds
 * @typedef {{near: number | null, alike: number | null, strangers: number[] | null}} Scores the answer of GET /scores
 * @typedef {{key: string, title: string, hits: Hit[]}} Band
 */

/**
 * Divide hits into those of the same file, the nearly same, the alike, and the rest.
 *
 * @param {Hit[]} hits the best first
 * @param {string} digest of the query's file; "" if it is unknown
 * @param {Thresholds} thresholds
 * @returns {Band[]} the last band is the rest
 */
export function bandsOf(hits, digest, { near, alike }) {
  /** @type {Band[]} */
  const bands = [
    { key: "same", title: "Same file", hits: [] },
    { key: "near", title: "Nearly the same", hits: [] },
    { key: "alike", title: "Alike", hits: [] },
    { key: "rest", title: "Less alike", hits: [] },
  ];
  for (const hit of hits) {
    const at = digest && hit.digest === digest ? 0 : hit.score >= near ? 1 : hit.score >= alike ? 2 : 3;
    bands[at].hits.push(hit);
  }
  return bands;
}

/**
 * One hit for each file, with the ids of its other copies.
 *
 * @param {Hit[]} hits
 * @returns {{hit: Hit, copies: string[]}[]}
 */
export function collapse(hits) {
  /** @type {Map<string, {hit: Hit, copies: string[]}>} */
  const files = new Map();
  for (const hit of hits) {
    const known = hit.digest ? files.get(hit.digest) : undefined;
    if (known) known.copies.push(hit.id);
    else files.set(hit.digest || `id ${hit.id}`, { hit, copies: [] });
  }
  return [...files.values()];
}

/**
 * Two sliders, for the scores from which hits are nearly the same and alike.
 *
 * @param {Thresholds} thresholds changed in place
 * @param {Scores} scores of the collection
 * @param {{onInput: () => void, onChange: (isMoved: boolean) => void}} told onChange once a slider is let go
 */
export function makeBandTools(thresholds, scores, { onInput, onChange }) {
  const usual = { near: Number(scores.near), alike: Number(scores.alike) };
  const least = Math.min(0, Math.floor((scores.strangers?.[0] ?? 0) * 10) / 10);
  const summary = make("summary", {});
  const makeSlider = (/** @type {"near" | "alike"} */ key, /** @type {string} */ text) => {
    const slider = make("input", { type: "range", id: `band-${key}`, min: least, max: 1, step: 0.001 });
    const output = make("output", { for: `band-${key}` });
    slider.addEventListener("input", () => {
      thresholds[key] = Number(slider.value);
      // What is nearly the same is alike, too.
      if (key === "near") thresholds.alike = Math.min(thresholds.alike, thresholds.near);
      else thresholds.near = Math.max(thresholds.near, thresholds.alike);
      show();
      onInput();
    });
    slider.addEventListener("change", () => onChange(true));
    return { slider, output, row: make("p", {}, make("label", { for: `band-${key}` }, text), slider, output) };
  };
  const sliders = { near: makeSlider("near", "Nearly the same from"), alike: makeSlider("alike", "Alike from") };
  const back = makeButton("Back to the usual scores", () => {
    Object.assign(thresholds, usual);
    show();
    onInput();
    onChange(false);
  });

  function show() {
    for (const key of /** @type {const} */ (["near", "alike"])) {
      sliders[key].slider.value = String(thresholds[key]);
      sliders[key].output.textContent = formatScore(thresholds[key]);
    }
    summary.textContent = `Nearly the same from ${formatScore(thresholds.near)}, alike from ${formatScore(thresholds.alike)}`;
    back.disabled = thresholds.near === usual.near && thresholds.alike === usual.alike;
  }

  show();
  const [low, , high] = scores.strangers ?? [];
  return make(
    "details",
    { class: "band-tools" },
    summary,
    sliders.near.row,
    sliders.alike.row,
    high !== undefined &&
      make("p", { class: "soft" }, `Nine in ten pairs of pictures picked at random here score ${formatScore(low)} to ${formatScore(high)}.`),
    make("p", { class: "buttons" }, back),
  );
}
