// Lookalikes of an item, of words, or of the visitor's own pictures.

import { ApiError, askJson } from "../api.js";
import { makeBandTools } from "../search/bands.js";
import { choosePictures } from "../parts/chooser.js";
import { parsePart } from "../search/crop.js";
import { make, makeButton } from "../parts/elements.js";
import { makeChips, makeConditions } from "../parts/filters.js";
import { serviceInfo } from "../parts/header.js";
import { makeHits } from "../search/hits.js";
import { showProblem } from "../parts/problem.js";
import { queriesOf, searchBy } from "../search/query.js";
import { makeQueryColumn } from "../search/query_column.js";
import { makeTabs } from "../search/tabs.js";
import { countPictures, formatCount } from "../parts/words.js";
import { addressOf, go, rename } from "../router.js";

// So many hits are asked for at first.
const ASKED = 100;
// After so many ms a search is said to be running.
const PATIENCE = 500;

/**
 * One of the queries, with what the visitor has chosen for it.
 *
 * @typedef {object} Tab
 * @property {import("../search/query.js").Query} query
 * @property {string} crop
 * @property {string} plus words that are added to a picture
 * @property {number} k hits that are wanted; 0 for as many as usual
 * @property {boolean} isOpen whether the less alike are shown
 * @property {boolean} isShrunk whether the visitor wants the picture to be made smaller
 * @property {import("../search/query.js").Found | null} found
 */

/**
 * What holds for all the queries.
 *
 * @typedef {object} State
 * @property {Record<string, string | null>} source id, text or kept
 * @property {number} at the number of the tab
 * @property {string} folder
 * @property {string} filter
 * @property {string} copies "1" where copies are one tile
 * @property {string} near "" where the visitor has not moved it
 * @property {string} alike
 */

/**
 * What the service tells about the collection.
 *
 * @typedef {{folders: {prefix: string}[], left_out: number}} Folders
 * @typedef {{scores: import("../search/bands.js").Scores, folders: Folders,
 *   metadata: {keys: {key: string, distinct: number, values: {value: unknown, count: number}[]}[]}}} Facts
 */

/** Tabs keep their state while the page is open, also when the visitor comes back. @type {Map<string, Partial<Tab>>} */
const remembered = new Map();

/** @type {import("../router.js").View} */
export async function openSearch({ params, place, signal, title }) {
  const [queries, info] = await Promise.all([queriesOf(params).catch(() => []), serviceInfo()]);
  if (!queries.length) {
    title("Search");
    place.append(makeMissing(params.has("kept")));
    return;
  }
  const state = stateOf(params, queries.length);
  const tabs = queries.map((query, number) => makeTab(query, number, state, params));
  const facts = await factsOf(state, signal);
  const { scores } = facts;
  const near = Number(state.near || scores.near) || 0;
  // What is nearly the same is alike, too.
  const thresholds = { near, alike: Math.min(near, Number(state.alike || scores.alike) || 0) };
  const panel = make("div", { class: "panel", id: "panel" });
  let asking = new AbortController();
  signal.addEventListener("abort", () => asking.abort());

  /** The address of this view with changes. @param {Record<string, string | number>} [changes] */
  function address(changes = {}) {
    const { source, at, ...shared } = state;
    const { crop, plus, k, isOpen } = tabs[at];
    return addressOf("search", { ...source, tab: at || "", crop, plus, k: k || "", all: isOpen ? 1 : "", ...shared, ...changes });
  }

  function keepState() {
    const { crop, plus, k, isOpen } = tabs[state.at];
    remembered.set(`${state.source.kept}/${state.at}`, { crop, plus, k, isOpen });
    rename(address());
  }

  /** Search by a tab's query, unless its hits are there. @param {Tab} tab */
  async function load(tab) {
    asking.abort();
    asking = new AbortController();
    const k = Math.min(info.limits.max_k, Math.max(ASKED, tab.k));
    if (tab.found?.k === k) return;
    const options = { k, folder: state.folder, filter: state.filter, part: parsePart(tab.crop), plus: tab.plus, isShrunk: tab.isShrunk };
    tab.found = await searchBy(tab.query, options, info.limits, asking.signal);
  }

  /** Show a tab, and search by it where that has not been done. @param {Tab} tab */
  async function show(tab) {
    title(tab.query.name);
    const found = make("div", { class: "found" });
    const readsWords = info.queries.includes("text");
    panel.replaceChildren(makeQueryColumn(tab, { readsWords, addressWith: address, signal }), found);
    const waiting = setTimeout(() => sayWaiting(tab, found), PATIENCE);
    panel.setAttribute("aria-busy", "true");
    try {
      await load(tab);
      showFound(tab, found);
    } catch (error) {
      // Another tab, or another view, was chosen meanwhile.
      if (!found.isConnected && place.isConnected) return;
      if (!(error instanceof Error && error.name === "AbortError")) {
        showProblem(found, error, () => showAgain(tab), actionFor(tab, error));
        markFailed(true);
        panel.querySelector("h1")?.replaceChildren(`Cannot search by ${tab.query.name}`);
      }
      throw error;
    } finally {
      clearTimeout(waiting);
      panel.removeAttribute("aria-busy");
    }
  }

  /** Show a tab in a view that is open; the panel says what goes wrong. @param {Tab} tab */
  function showAgain(tab) {
    show(tab).catch(() => {});
  }

  /** @param {Tab} tab @param {HTMLElement} found */
  function sayWaiting(tab, found) {
    const cancel = makeButton("Cancel", () => {
      asking.abort();
      showProblem(found, new Error("The search was cancelled."), () => showAgain(tab));
    });
    found.replaceChildren(make("p", { class: "running", role: "status" }, make("progress", { "aria-label": "Searching" }), " Searching … ", cancel));
  }

  /** Tell by the tab, too, that its query failed. @param {boolean} hasFailed */
  function markFailed(hasFailed) {
    place.querySelector(`#tab-${state.at}`)?.classList.toggle("failed", hasFailed);
  }

  /** @param {Tab} tab @param {HTMLElement} found */
  function showFound(tab, found) {
    markFailed(false);
    const note = panel.querySelector(".note");
    if (note) note.textContent = tab.found?.note ?? "";
    // Words, and sums with words, have scores of another kind.
    const hasBands = !tab.query.text && !tab.plus && scores.near !== null && scores.alike !== null;
    const { place: hits, draw } = makeHits({
      tab,
      thresholds: hasBands ? thresholds : null,
      isCollapsed: () => state.copies !== "",
      most: info.limits.max_k,
      load: () => load(tab),
      onChange: keepState,
      makeNothing: () => makeNothing(state, address),
    });
    const tools = makeTools(state, facts, address, () => {
      keepState();
      draw();
    });
    if (hasBands) {
      const onChange = (/** @type {boolean} */ isMoved) => {
        [state.near, state.alike] = isMoved ? [String(thresholds.near), String(thresholds.alike)] : ["", ""];
        keepState();
      };
      tools.append(makeBandTools(thresholds, scores, { onInput: draw, onChange }));
    }
    found.replaceChildren(tools, hits);
  }

  /** What to offer for a query that failed, in place of another try. @param {Tab} tab @param {unknown} error */
  function actionFor(tab, error) {
    if (!(error instanceof ApiError) || !tab.query.file) return null;
    if (error.status === 413 && !tab.isShrunk) {
      const act = () => {
        tab.isShrunk = true;
        showAgain(tab);
      };
      return { text: "Shrink and search", act };
    }
    return [413, 415, 422].includes(error.status) ? { text: "Choose another picture", act: choosePictures } : null;
  }

  if (queries.length > 1) {
    const choose = (/** @type {number} */ number) => {
      // The tab that is left keeps its state, too.
      keepState();
      state.at = number;
      keepState();
      showAgain(tabs[number]);
    };
    place.append(makeTabs(queries.map(({ name }) => name), state.at, countPictures(queries.length), choose, panel));
  }
  place.append(panel);
  const tab = tabs[state.at];
  // A picture that the service refuses stays in sight beside the message. After other failures the earlier view does.
  await show(tab).catch((error) => {
    if (!tab.query.file || !(error instanceof ApiError) || error.status === 0) throw error;
  });
}

/** @param {URLSearchParams} params @param {number} count of the queries @returns {State} */
function stateOf(params, count) {
  const given = (/** @type {string} */ key) => params.get(key) ?? "";
  return {
    source: Object.fromEntries(["id", "text", "kept"].map((key) => [key, params.get(key)])),
    at: Math.min(count - 1, Math.max(0, Math.trunc(Number(given("tab"))) || 0)),
    folder: given("folder"),
    filter: given("filter"),
    copies: given("copies"),
    near: given("near"),
    alike: given("alike"),
  };
}

/** @param {import("../search/query.js").Query} query @param {number} number @param {State} state @param {URLSearchParams} params @returns {Tab} */
function makeTab(query, number, state, params) {
  const own = { crop: params.get("crop") ?? "", plus: params.get("plus") ?? "", k: Number(params.get("k")) || 0, isOpen: params.has("all") };
  const other = { crop: "", plus: "", k: 0, isOpen: false, ...remembered.get(`${state.source.kept}/${number}`) };
  return { query, isShrunk: false, found: null, ...(number === state.at ? own : other) };
}

/** @param {State} state @param {AbortSignal} signal @returns {Promise<Facts>} */
async function factsOf({ folder, filter }, signal) {
  const of = (/** @type {Record<string, string>} */ given) => new URLSearchParams(Object.entries(given).filter(([, value]) => value));
  const [scores, folders, metadata] = await Promise.all([
    // Not every store can tell what its scores mean; its hits come without bands then.
    askJson("scores", undefined, { signal }).catch(() => ({ near: null, alike: null, strangers: null })),
    askJson(`folders?${of({ prefix: folder })}`, undefined, { signal }).catch(() => ({ folders: [], left_out: 0 })),
    askJson(`metadata?${of({ prefix: folder, filter })}`, undefined, { signal }),
  ]);
  return { scores, folders, metadata };
}

/**
 * Folder, metadata and copies.
 *
 * @param {State} state
 * @param {Facts} facts
 * @param {(changes: Record<string, string>) => string} addressWith
 * @param {() => void} onCopies told that copies are collapsed, or no longer
 */
function makeTools(state, { folders, metadata }, addressWith, onCopies) {
  const withFilter = (/** @type {string} */ filter) => addressWith({ filter });
  const conditions = makeConditions(state.filter, withFilter);
  const chips = makeChips(state.filter, metadata, withFilter);
  const copies = make("input", { type: "checkbox", id: "copies", checked: Boolean(state.copies) });
  copies.addEventListener("change", () => {
    state.copies = copies.checked ? "1" : "";
    onCopies();
  });
  return make(
    "div",
    { class: "search-tools" },
    conditions.length > 0 && make("p", { class: "chips" }, ...conditions),
    makeFolderSelect(state.folder, folders, addressWith),
    make("label", { class: "check" }, copies, " Collapse copies"),
    chips.length > 0 && make("details", { class: "narrow" }, make("summary", {}, "Metadata"), ...chips),
  );
}

/**
 * The folder to search in: those above the chosen one, and those in it.
 *
 * @param {string} folder
 * @param {Folders} below
 * @param {(changes: Record<string, string>) => string} addressWith
 */
function makeFolderSelect(folder, { folders, left_out }, addressWith) {
  const parts = folder.split("/").filter(Boolean);
  const above = parts.map((_, number) => `${parts.slice(0, number + 1).join("/")}/`);
  // Whatever the address names stays chosen.
  if (folder) above[above.length - 1] = folder;
  if (!above.length && !folders.length) return null;
  const select = make("select", { id: "folder" }, make("option", { value: "" }, "All folders"));
  for (const prefix of [...above, ...folders.map((one) => one.prefix)]) {
    select.append(make("option", { value: prefix, selected: prefix === folder }, prefix.replace(/\/$/, "")));
  }
  if (left_out) select.append(make("option", { disabled: true }, `and ${formatCount(left_out)} more`));
  select.addEventListener("change", () => go(addressWith({ folder: select.value })));
  return make("label", { class: "check" }, "Folder ", select);
}

/** What a search without hits shows. @param {State} state @param {(changes: Record<string, string>) => string} addressWith */
function makeNothing({ folder, filter }, addressWith) {
  const [text, link] =
    folder || filter
      ? ["No picture matches. ", make("a", { href: addressWith({ folder: "", filter: "" }) }, "Search in all pictures")]
      : ["There is no other picture to compare with. ", make("a", { href: addressOf("add") }, "Add pictures")];
  return make("p", { class: "soft" }, text, link);
}

/** What is shown without a query. @param {boolean} wasKept */
function makeMissing(wasKept) {
  const text = wasKept
    ? "Your browser keeps the pictures of your last 30 searches. This one is not among them any more, or was made in another browser."
    : "Choose a picture, drop it anywhere on this page, or paste it.";
  return make(
    "div",
    { class: "empty" },
    make("h1", {}, wasKept ? "This picture is no longer kept" : "Search by a picture"),
    make("p", {}, text),
    makeButton("Choose a picture", choosePictures, { class: "strong" }),
  );
}
