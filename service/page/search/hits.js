// The hits of a search: in bands where their scores have some, else as one list, with buttons for more of them.

import { bandsOf, collapse } from "./bands.js";
import { make, makeButton } from "../parts/elements.js";
import { showProblem } from "../parts/problem.js";
import { makeRoving } from "../parts/roving.js";
import { makeTile } from "../parts/tile.js";
import { formatCount } from "../parts/words.js";

// So many are shown at first where there are no bands.
const SHOWN = 24;

/**
 * @typedef {import("../api.js").Hit} Hit
 * @typedef {{hits: Hit[], digest: string, k: number}} Found
 */

/**
 * @typedef {object} HitsOptions
 * @property {{found: Found | null, k: number, isOpen: boolean}} tab changed by the buttons: k is the number of hits that
 *   are wanted, 0 for as many as usual; isOpen says whether the less alike are shown
 * @property {import("./bands.js").Thresholds | null} thresholds null for one list
 * @property {() => boolean} isCollapsed whether copies of a file are one tile
 * @property {number} most hits of a search
 * @property {() => Promise<void>} load fetch as many hits as tab.k wants
 * @property {() => void} onChange told that tab has changed
 * @property {() => Node} makeNothing what is shown where there are no hits
 */

/**
 * Show hits.
 *
 * @param {HitsOptions} options
 * @returns {{place: HTMLElement, draw: () => void}} draw shows them again after a change of thresholds or copies
 */
export function makeHits(options) {
  const { tab, thresholds, isCollapsed, most, onChange } = options;
  const place = make("div", { class: "hits" });
  const refresh = makeRoving(place, "a.tile");
  /** @type {Map<string, HTMLAnchorElement>} */
  const tiles = new Map();

  function draw() {
    const { hits, digest, k } = /** @type {Found} */ (tab.found);
    place.replaceChildren();
    if (!hits.length) place.append(options.makeNothing());
    else if (thresholds) drawBands(bandsOf(hits, digest, thresholds), hits.length === k ? k : 0);
    else drawList(hits, digest, hits.length === k);
    refresh();
  }

  /** @param {import("./bands.js").Band[]} bands @param {number} asked 0 if these are all the hits there are */
  function drawBands(bands, asked) {
    const [rest] = bands.splice(-1);
    const filled = bands.filter(({ hits }) => hits.length);
    const summary = filled.map(({ title, hits }) => `${title}: ${formatCount(hits.length)}`).join(" · ");
    // A single band says it by its heading.
    const look = filled.length === 1 ? "unseen" : "soft";
    place.append(make("p", { class: look, role: "status" }, summary || "No picture here is alike."));
    for (const { key, title, hits } of filled) addBand(key, title, hits);
    if (rest.hits.length) {
      const text = `${formatCount(rest.hits.length)}${asked ? " or more" : ""} that are less alike`;
      const fold = makeButton(tab.isOpen ? "Hide those that are less alike" : text, () => {
        tab.isOpen = !tab.isOpen;
        onChange();
        draw();
        /** @type {HTMLElement | null} */ (place.querySelector("#fold"))?.focus();
      }, { id: "fold", "aria-expanded": String(tab.isOpen) });
      place.append(make("p", { class: "buttons" }, fold));
      if (tab.isOpen) addBand(rest.key, rest.title, rest.hits);
    }
    if (asked && (tab.isOpen || !rest.hits.length)) place.append(makeMore(asked));
  }

  /** @param {Hit[]} hits @param {string} digest @param {boolean} mayBeMore */
  function drawList(hits, digest, mayBeMore) {
    const wanted = tab.k || SHOWN;
    const [same, , others] = bandsOf(hits, digest, { near: Infinity, alike: -Infinity });
    if (same.hits.length) addBand(same.key, same.title, same.hits);
    if (others.hits.length) addBand("best", "Best matches", others.hits.slice(0, wanted));
    if (others.hits.length > wanted || mayBeMore) place.append(makeMore(wanted));
  }

  /** @param {string} key @param {string} title @param {Hit[]} hits */
  function addBand(key, title, hits) {
    const shown = isCollapsed() ? collapse(hits) : hits.map((hit) => ({ hit, copies: [] }));
    const list = make("ol", { class: "tiles", role: "list" });
    for (const { hit, copies } of shown) list.append(make("li", {}, tileOf(hit, copies)));
    const heading = make("h2", { id: `band-title-${key}` }, title, " ", make("span", { class: "count" }, formatCount(hits.length)));
    place.append(make("section", { class: "band", "aria-labelledby": heading.id }, heading, list));
  }

  /** A hit's tile, which keeps its picture when the hits are shown again. @param {Hit} hit @param {string[]} copies */
  function tileOf(hit, copies) {
    const tile = tiles.get(hit.id) ?? makeTile(hit);
    tiles.set(hit.id, tile);
    tile.querySelector(".other-copies")?.remove();
    const text = `+${copies.length} ${copies.length === 1 ? "copy" : "copies"}`;
    if (copies.length) tile.append(make("span", { class: "other-copies", title: copies.join("\n") }, text));
    return tile;
  }

  /** A button that asks for twice as many hits. @param {number} count */
  function makeMore(count) {
    if (count >= most) return make("p", { class: "soft" }, `A search ends at ${formatCount(most)} pictures.`);
    const trouble = make("div", { role: "alert" });
    const more = makeButton("More", async () => {
      const before = new Set(place.querySelectorAll("a.tile"));
      const k = tab.k;
      more.disabled = true;
      tab.k = Math.min(most, 2 * count);
      try {
        await options.load();
      } catch (error) {
        tab.k = k;
        more.disabled = false;
        showProblem(trouble, error, () => more.click());
        return;
      }
      onChange();
      draw();
      // The focus goes on from where it was: to the first of the new ones.
      const next = [...place.querySelectorAll("a.tile")].find((tile) => !before.has(tile));
      /** @type {HTMLElement | undefined} */ (next)?.focus();
    }, { id: "more" });
    return make("div", { class: "more" }, more, trouble);
  }

  draw();
  return { place, draw };
}
