// Groups of copies: which to keep, which to remove, and what comes of it: a list, a script, or a smaller index.

import { ApiError } from "../api.js";
import { fillComparison } from "../duplicates/compare.js";
import { countRecords, decide, doneOf, forgetDecisions, hasRecord, keptOf, removedOf, saveDecisions } from "../duplicates/decisions.js";
import { make, makeButton } from "../parts/elements.js";
import { makeGrid } from "../parts/grid.js";
import { KEYS, makeRow, setTabStops, takeKey } from "../duplicates/group.js";
import { findGroups } from "../parts/groups.js";
import { showDuplicates } from "../parts/header.js";
import { showProblem } from "../parts/problem.js";
import { removeItems } from "../parts/removal.js";
import { makeList, makeScript, saveText } from "../duplicates/script.js";
import { showToast } from "../parts/toast.js";
import { formatBytes, formatCount } from "../parts/words.js";
import { addressOf, go, reload, rename, replace } from "../router.js";

/**
 * @typedef {import("../parts/groups.js").Listing} Listing
 * @typedef {import("../duplicates/decisions.js").Group} Group
 * @typedef {import("../parts/removal.js").Failed} Failed
 * @typedef {import("../parts/removal.js").Restore} Restore
 */

/** @type {Record<string, {text: string, title: string}>} */
const PRESETS = {
  exact: { text: "Exact", title: "Files with the same bytes" },
  near: { text: "Near", title: "The same picture resized or compressed" },
  alike: { text: "Alike", title: "Also cropped, turned, written on" },
};
const NARROW = "(max-width: 46rem)";
const LEAST = 0.5;
const STEP = 0.005;
// So many groups are fetched before anyone scrolls to them.
const MOST_AHEAD = 10_000;
// A slider that rests for so many ms is a question.
const PAUSE = 300;
// Heights of a row in rem.
const HEIGHT = { wide: 23.5, narrow: 27.5 };

/** What the last visit showed; Back shows it again without asking. @type {Listing | null} */
let shown = null;
/** Whether the groups are what was opened last, so that Back leads from a comparison to them. */
let wasList = false;
/** What was removed last in this tab. @type {{words: string, failed: Failed[], count: number, restore: Restore | null} | null} */
let removal = null;

/** @type {import("../router.js").View} */
export async function openDuplicates(visit) {
  const { params, title } = visit;
  title("Duplicates");
  if (params.has("compare")) await openComparison(visit);
  else openGroups(visit);
}

/** What an address asks for, as a query of the API. @param {URLSearchParams} params */
function questionOf(params) {
  const threshold = params.get("threshold");
  if (threshold !== null) return new URLSearchParams({ threshold }).toString();
  return new URLSearchParams({ preset: params.get("preset") || "near" }).toString();
}

// One group, large ----------------------------------------------------------------------------------

/** @param {import("../router.js").Visit} visit */
async function openComparison({ params, place, signal, title }) {
  const question = questionOf(params);
  const number = Number(params.get("compare"));
  if (wasList) history.replaceState({ ...history.state, isOverGroups: true }, "");
  wasList = false;
  if (shown?.question !== question) shown = await findGroups(question, () => {}, signal);
  const listing = shown;
  if (!(Number.isInteger(number) && number >= 0 && number < listing.total)) {
    throw new Error(`There is no group ${params.get("compare")}: there are ${formatCount(listing.total)}, the first is 0.`);
  }
  await listing.load(number + 1);
  title(`Group ${formatCount(number + 1)} · Duplicates`);
  const { compare: _, ...rest } = Object.fromEntries(params);
  fillComparison(place, listing.groups[number], {
    number,
    total: listing.total,
    signal,
    showKeys,
    back: () => (history.state?.isOverGroups ? history.back() : go(addressOf("duplicates", rest))),
    open: (step) => {
      if (number + step >= 0 && number + step < listing.total) replace(addressOf("duplicates", { ...rest, compare: number + step }));
    },
  });
}

// All groups ----------------------------------------------------------------------------------------

/** @param {import("../router.js").Visit} visit */
function openGroups({ params, place, signal, isReturn }) {
  wasList = true;
  let question = questionOf(params);
  let address = Object.fromEntries(params);
  let asking = new AbortController();
  signal.addEventListener("abort", () => asking.abort());

  const count = make("p", { class: "soft", role: "status" });
  const presets = make("nav", { class: "presets", "aria-label": "How alike" });
  const slider = make("input", { type: "range", id: "threshold", min: LEAST, max: 1, step: STEP, "aria-label": "Least score of two pictures of a group" });
  const told = make("output", { for: "threshold" });
  const trouble = make("div", { role: "alert" });
  const results = make("div", { class: "results" });
  const all = makeButton("Keep the best of each group", () => void keepAllBest(), { id: "keep-best", hidden: true });
  const marked = make("section", { class: "marked", "aria-label": "What is to be removed", hidden: true });

  /** @param {string} name */
  const preset = (name) =>
    make("a", { class: "chip", href: addressOf("duplicates", { preset: name }), title: PRESETS[name].title, "aria-current": question === `preset=${name}` && "true" }, PRESETS[name].text);

  function showQuestion() {
    presets.replaceChildren(...Object.keys(PRESETS).map(preset));
  }

  function showThreshold(/** @type {number} */ threshold) {
    slider.value = String(threshold);
    tellThreshold(threshold);
  }

  function tellThreshold(/** @type {number} */ threshold) {
    const words = threshold === 1 ? "same bytes" : `scores from ${threshold.toFixed(3)}`;
    told.textContent = words;
    slider.setAttribute("aria-valuetext", words);
  }

  /** Ask for the groups and show them. */
  async function find() {
    asking.abort();
    asking = new AbortController();
    const own = asking.signal;
    trouble.replaceChildren();
    results.setAttribute("aria-busy", "true");
    count.textContent = "Comparing …";
    try {
      const listing = await findGroups(question, (progress) => showProgress(results, progress, cancel), own);
      if (own.aborted) return;
      shown = listing;
      show(listing);
    } catch (error) {
      if (own.aborted) return;
      count.textContent = "";
      results.replaceChildren();
      // What the service refuses it will refuse again.
      const isRefused = error instanceof ApiError && error.status === 400;
      showProblem(trouble, error, isRefused ? null : () => void find());
    } finally {
      if (asking.signal === own) results.removeAttribute("aria-busy");
    }
  }

  function cancel() {
    asking.abort();
    results.removeAttribute("aria-busy");
    count.textContent = "";
    const again = makeButton("Find duplicates", () => void find(), { class: "strong" });
    results.replaceChildren(make("div", { class: "empty" }, make("p", {}, "Cancelled."), again));
    again.focus();
  }

  function show(/** @type {Listing} */ listing) {
    showThreshold(listing.threshold);
    if (listing.threshold === 1) showDuplicates(listing.total);
    const words = [
      `${formatCount(listing.total)} ${listing.total === 1 ? "group" : "groups"}`,
      `${formatCount(listing.rest)} ${listing.rest === 1 ? "copy" : "copies"} beside the best`,
      listing.restBytes && formatBytes(listing.restBytes),
    ];
    count.textContent = listing.total ? words.filter(Boolean).join(" · ") : "No group";
    all.hidden = !listing.total;
    results.replaceChildren(listing.total ? makeGroups(listing, address, signal, trouble, () => void find(), showMarked) : makeEmpty(listing));
    showMarked();
    // Scrolling is smooth once all groups are there. Decisions about groups that are not there yet count, too.
    if (listing.total <= MOST_AHEAD || listing.groups.filter(hasRecord).length < countRecords()) {
      listing.load(listing.total, signal).then(showMarked, () => {});
    }
  }

  async function keepAllBest() {
    const listing = shown;
    if (!listing) return;
    all.disabled = true;
    try {
      await listing.load(listing.total, signal);
      for (const group of listing.groups) if (!doneOf(group)) decide(group, "keep");
      if (!saveDecisions()) showToast("This browser has no room to keep so many decisions: a reload will forget them.");
      show(listing);
    } catch (error) {
      if (!signal.aborted) showProblem(trouble, error, () => void keepAllBest());
    } finally {
      all.disabled = false;
    }
  }

  function takeAllBack() {
    // Groups that were told apart are so in the service, too.
    const apart = shown?.groups.filter((group) => doneOf(group) === "apart") ?? [];
    forgetDecisions();
    for (const group of apart) decide(group, "apart");
    saveDecisions();
    if (shown) show(shown);
  }

  function showMarked() {
    const groups = shown?.groups ?? [];
    const rest = groups.flatMap(removedOf);
    const decided = groups.filter(doneOf).length;
    marked.hidden = !decided;
    if (!decided) return;
    const bytes = rest.reduce((sum, { size_bytes }) => sum + (size_bytes ?? 0), 0);
    const has = rest.length > 0;
    marked.replaceChildren(
      make(
        "p",
        { role: "status" },
        make("b", {}, `${formatCount(rest.length)} to remove, ${formatBytes(bytes)}`),
        make("span", { class: "soft" }, ` · ${formatCount(decided)} of ${formatCount(shown?.total ?? 0)} groups decided`),
      ),
      make(
        "p",
        { class: "buttons" },
        has && makeButton("Copy list", () => void copyList(groups), { id: "copy-list" }),
        has && makeButton("Save list", () => saveText(makeList(markedOf(groups)), "to-remove.txt"), { id: "save-list" }),
        has && makeButton("Save script", () => saveScript(groups), { id: "save-script" }),
        has && makeButton("Remove from the index", () => void remove(groups), { id: "remove-marked", class: "strong" }),
        makeButton("Take all back", takeAllBack, { id: "take-back" }),
      ),
    );
  }

  let timer = 0;
  slider.addEventListener("input", () => {
    tellThreshold(Number(slider.value));
    asking.abort();
    clearTimeout(timer);
    timer = setTimeout(() => {
      address = slider.value === "1" ? { preset: "exact" } : { threshold: slider.value };
      question = new URLSearchParams(address).toString();
      rename(addressOf("duplicates", address));
      showQuestion();
      void find();
    }, PAUSE);
  });
  signal.addEventListener("abort", () => clearTimeout(timer));

  place.append(
    make("header", { class: "bar" }, make("div", { class: "titles" }, make("h1", {}, "Duplicates"), count)),
    make("div", { class: "tools" }, presets, make("label", { class: "threshold" }, slider, told), all, makeButton("?", showKeys, { "aria-label": "Keys" })),
    ...(removal ? [makeRemoval()] : []),
    trouble,
    marked,
    results,
  );
  showQuestion();
  if (isReturn && shown?.question === question) show(shown);
  else {
    showThreshold(question === "preset=exact" ? 1 : Number(address.threshold ?? shown?.threshold ?? 0.9));
    void find();
  }
  // Rows have another height on a phone.
  window.matchMedia(NARROW).addEventListener("change", () => shown && show(shown), { signal });
}

/**
 * The list of groups.
 *
 * @param {Listing} listing
 * @param {Record<string, string>} address parameters of this view
 * @param {AbortSignal} signal
 * @param {HTMLElement} trouble
 * @param {() => void} findAgain
 * @param {() => void} onChange
 */
function makeGroups(listing, address, signal, trouble, findAgain, onChange) {
  /** @type {Map<number, ReturnType<typeof makeRow>>} */
  const rows = new Map();
  let current = 0;
  const rem = Number.parseFloat(getComputedStyle(document.documentElement).fontSize);
  const height = rem * (window.matchMedia(NARROW).matches ? HEIGHT.narrow : HEIGHT.wide);
  const grid = makeGrid({
    count: listing.total,
    first: listing.groups.slice(0, 100),
    load: async (offset, limit, gridSignal) => {
      await listing.load(offset + limit, gridSignal);
      return listing.groups.slice(offset, offset + limit);
    },
    makeTile: (group, place) => {
      const made = makeRow(group, {
        place,
        total: listing.total,
        compareAddress: addressOf("duplicates", { ...address, compare: place }),
        onChange: () => {
          rows.get(place)?.update();
          onChange();
        },
      });
      rows.set(place, made);
      setTabStops(made.row, place === current);
      return made.row;
    },
    known: (place) => listing.groups[place],
    // One row a line.
    tile: { width: 1e6, below: 0, height },
    label: `${formatCount(listing.total)} groups`,
    signal,
    onProblem: (error, retry) => {
      const isOld = error instanceof ApiError && error.code === "page_not_found";
      showProblem(trouble, isOld ? new Error("The groups have been found again meanwhile.") : error, isOld ? findAgain : retry);
    },
  });
  grid.classList.add("groups");

  function focusRow(/** @type {number} */ place) {
    const row = grid.querySelector(`#group-${place}`);
    if (!(row instanceof HTMLElement)) return;
    row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }

  grid.addEventListener("focusin", (event) => {
    const place = Number(/** @type {HTMLElement} */ (/** @type {HTMLElement} */ (event.target).closest(".group"))?.dataset.place);
    if (Number.isNaN(place) || place === current) return;
    const before = rows.get(current);
    if (before) setTabStops(before.row, false);
    current = place;
    const after = rows.get(place);
    if (after) setTabStops(after.row, true);
  });
  // It comes before the grid's own keys.
  grid.addEventListener(
    "keydown",
    (event) => {
      const made = rows.get(current);
      if (!made || event.altKey || event.ctrlKey || event.metaKey) return;
      const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
      if (step) focusRow(current + step);
      else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        made.row.querySelector(".copies")?.scrollBy({ left: event.key === "ArrowLeft" ? -160 : 160 });
      } else if (event.key === "c") made.compare.click();
      else if (event.key === "?") showKeys();
      else {
        const place = current;
        void takeKey(event, listing.groups[place].items, made.actions)?.then((isDone) => {
          if (isDone && current === place) focusRow(place + 1);
        });
        return;
      }
      event.preventDefault();
      event.stopPropagation();
    },
    { capture: true },
  );
  return grid;
}

/** @param {Listing} listing */
function makeEmpty({ threshold }) {
  return make(
    "div",
    { class: "empty" },
    make("p", {}, "No duplicates at this threshold."),
    make(
      "p",
      { class: "soft" },
      threshold > LEAST ? "Move the slider to the left, to pictures that are less alike." : "No two pictures here are that alike.",
    ),
  );
}

/** @param {HTMLElement} results @param {number} progress @param {() => void} cancel */
function showProgress(results, progress, cancel) {
  const percent = Math.round(100 * progress);
  const bar = results.querySelector("progress");
  if (bar) {
    bar.value = progress;
    const text = bar.nextElementSibling;
    if (text) text.textContent = `${percent} %`;
    return;
  }
  results.replaceChildren(
    make(
      "div",
      { class: "finding" },
      make("p", {}, "All pictures are compared with each other. This is done once."),
      make("p", {}, make("progress", { max: 1, value: progress, "aria-label": "Comparing pictures" }), make("span", { class: "percent" }, `${percent} %`), makeButton("Cancel", cancel)),
    ),
  );
}

/** The keys of this view, in a dialog. */
function showKeys() {
  const list = make("dl", { class: "facts" });
  for (const [key, words] of KEYS) list.append(make("dt", {}, make("kbd", {}, key)), make("dd", {}, words));
  const dialog = make("dialog", { "aria-label": "Keys" }, make("h2", {}, "Keys in a group"), list);
  dialog.append(make("p", { class: "buttons" }, makeButton("Close", () => dialog.close(), { class: "strong" })));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// What comes of it ----------------------------------------------------------------------------------

/** @param {Group[]} groups @returns {import("../duplicates/script.js").Marked[]} */
function markedOf(groups) {
  return groups.flatMap((group) => {
    const ids = keptOf(group);
    const kept = group.items.filter(({ id }) => ids.has(id));
    return removedOf(group).map((copy) => ({ copy, kept }));
  });
}

/** @param {Group[]} groups */
function saveScript(groups) {
  const marked = markedOf(groups);
  const removed = new Set(marked.map(({ copy }) => copy.id));
  const staying = groups.flatMap(({ items }) => items.filter(({ id }) => !removed.has(id)).map(({ source }) => source ?? ""));
  saveText(makeScript(marked, new Set(staying)), "remove-duplicates.sh");
}

/** @param {Group[]} groups */
async function copyList(groups) {
  const marked = markedOf(groups);
  try {
    await navigator.clipboard.writeText(makeList(marked));
    showToast(`${formatCount(marked.length)} paths are in the clipboard.`);
  } catch {
    // Browsers keep the clipboard from pages that came without encryption.
    showToast("This browser does not let the page copy. Save the list instead.");
  }
}

/** Remove what is marked from the index. @param {Group[]} groups */
async function remove(groups) {
  const ids = groups.flatMap(removedOf).map(({ id }) => id);
  await working("Removing", ids.length, async (options) => {
    const { done, failed, left, restore } = await removeItems(ids, options);
    const words = [
      `${formatCount(done)} ${done === 1 ? "picture is" : "pictures are"} no longer in the index. The files are untouched.`,
      left && `${formatCount(left)} were not tried.`,
    ];
    removal = { words: words.filter(Boolean).join(" "), failed, count: done, restore: done ? restore : null };
  });
}

/** Put back what was removed last. @param {Restore} restore @param {number} count */
async function undo(restore, count) {
  await working("Putting back", count, async (options) => {
    const { done, failed } = await restore(options);
    removal = { words: `${formatCount(done)} ${done === 1 ? "picture is" : "pictures are"} in the index again.`, failed, count: 0, restore: null };
  });
}

/**
 * Do some work on many items behind a dialog with its progress, and open the view again.
 *
 * @param {string} words
 * @param {number} count
 * @param {(options: import("../parts/removal.js").Options) => Promise<void>} work
 */
async function working(words, count, work) {
  const stopping = new AbortController();
  const bar = make("progress", { max: count, value: 0, "aria-label": words });
  const told = make("p", {}, `${words} …`);
  const dialog = make("dialog", { "aria-label": words }, told, bar, make("p", { class: "buttons" }, makeButton("Stop", () => stopping.abort())));
  // Escape stops the work; the dialog closes once it has stopped.
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    stopping.abort();
  });
  document.body.append(dialog);
  dialog.showModal();
  try {
    await work({
      signal: stopping.signal,
      onProgress: (done) => {
        bar.value = done;
        told.textContent = `${words}: ${formatCount(done)} of ${formatCount(count)}`;
      },
    });
  } catch (error) {
    removal = { words: error instanceof Error ? error.message : String(error), failed: [], count: 0, restore: null };
  } finally {
    dialog.close();
    dialog.remove();
  }
  shown = null;
  reload();
}

/** What was removed last, what failed, and the way back. */
function makeRemoval() {
  const { words, failed, count, restore } = /** @type {NonNullable<typeof removal>} */ (removal);
  const note = make("div", { class: "removal", role: "status" }, make("p", {}, words));
  if (restore) note.append(makeButton("Undo", () => void undo(restore, count), { id: "undo-removal" }));
  note.append(
    makeButton("×", () => {
      removal = null;
      note.remove();
    }, { class: "plain close", "aria-label": "Close this message" }),
  );
  if (failed.length) {
    const list = make("ul", {});
    for (const { id, reason } of failed) list.append(make("li", {}, `${id}: ${reason}`));
    note.append(make("details", { open: failed.length <= 5 }, make("summary", {}, `${formatCount(failed.length)} failed`), list));
  }
  return note;
}
