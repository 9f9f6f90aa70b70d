// The gallery: a grid of all pictures, by folder, name and metadata.

import { askJson, listItems } from "../api.js";
import { startDrawing } from "../parts/drawing.js";
import { make, makeButton } from "../parts/elements.js";
import { makeChips, makeConditions, makeLimit } from "../parts/filters.js";
import { serviceInfo } from "../parts/header.js";
import { makeGrid } from "../parts/grid.js";
import { showProblem } from "../parts/problem.js";
import { makeTile } from "../parts/tile.js";
import { countPictures, formatCount } from "../parts/words.js";
import { addressOf, go } from "../router.js";

const PAGE = 100;
/** @type {Record<string, string>} */
const ORDERS = {
  added: "First added",
  "-added": "Last added",
  id: "Name",
  "-id": "Name, backwards",
  "-date": "Newest",
  date: "Oldest",
  "-size": "Largest file",
  size: "Smallest file",
};
/** @type {Record<string, {text: string, width: number, below: number}>} */
const SIZES = {
  small: { text: "Small", width: 92, below: 0 },
  medium: { text: "Medium", width: 144, below: 62 },
  large: { text: "Large", width: 300, below: 62 },
};
const SIZE_KEY = "lookalike-tiles";
const DEMO = /^(digits|mnist)\//;

/** @type {import("../router.js").View} */
export async function openBrowse({ params, place, signal, title }) {
  const state = {
    folder: params.get("folder") ?? "",
    name: params.get("name") ?? "",
    filter: params.get("filter") ?? "",
    order: params.get("order") ?? "",
  };
  const size = SIZES[localStorage.getItem(SIZE_KEY) ?? ""] ? String(localStorage.getItem(SIZE_KEY)) : "medium";
  const asked = listedOf(params);
  const [info, page] = await Promise.all([serviceInfo(), listItems({ ...asked, limit: PAGE }, signal)]);
  const { total } = page;
  const isAll = !state.folder && !state.name && !state.filter;
  const heading = state.folder ? state.folder.replace(/\/$/, "") : "All pictures";
  title(state.name ? `“${state.name}”` : isAll ? "" : heading);
  const change = (/** @type {Partial<typeof state>} */ changes) => addressOf("browse", { ...state, ...changes });

  place.append(
    make("header", { class: "bar" }, make("div", { class: "titles" }, makeCrumbs(state, change), make("h1", {}, heading))),
  );
  if (!total && isAll) {
    place.append(makeEmpty());
    return;
  }
  const position = make("p", { class: "position soft", "aria-live": "off" }, countPictures(total));
  place.querySelector(".titles")?.append(position);
  place.querySelector(".bar")?.append(makeTools(state, size, change, info.queries.includes("text")));
  const body = make("div", { class: "body" });
  const isWide = window.matchMedia("(min-width: 60rem)").matches;
  const side = make("aside", { "aria-label": "Folders and metadata" });
  const details = make("details", { class: "side", open: isWide }, make("summary", {}, "Folders and metadata"), side);
  body.append(details);
  // Metadata of many items take the service a second, and the pictures do not wait for them.
  void fillSide(side, state, change, signal).then((isEmpty) => {
    details.hidden = isEmpty;
  });
  const trouble = make("div", { role: "alert" });
  const content = make("div", { class: "content" }, trouble);
  if (isAll && DEMO.test(page.items[0]?.id ?? "")) content.append(startDrawing());
  if (total) {
    content.append(
      makeGrid({
        count: total,
        first: page.items,
        load: async (offset, limit, gridSignal) => (await listItems({ ...asked, offset, limit }, gridSignal)).items,
        makeTile: (item, at) =>
          makeTile(item, { isLarge: size === "large", address: addressOf("picture", { id: item.id, at, ...state }) }),
        tile: SIZES[size],
        label: `${heading}: ${countPictures(total)}`,
        signal,
        onMove: (first, last) => {
          position.textContent =
            last - first >= total ? countPictures(total) : `${formatCount(Math.min(last, total))} of ${countPictures(total)}`;
        },
        onProblem: (error, retry) => showProblem(trouble, error, retry),
      }),
    );
  } else {
    content.append(
      make("p", { class: "soft" }, "No picture matches. ", make("a", { href: addressOf("browse") }, "Show all pictures")),
    );
  }
  place.classList.add(`tiles-${size}`);
  body.append(content);
  place.append(body);
}

/**
 * The listing that an address of this view names.
 *
 * @param {URLSearchParams} params
 * @returns {import("../api.js").Listed}
 */
export function listedOf(params) {
  return {
    prefix: params.get("folder") ?? "",
    name: params.get("name") ?? "",
    filter: params.get("filter") ?? "",
    order: params.get("order") ?? "added",
  };
}

/**
 * @typedef {{folder: string, name: string, filter: string, order: string}} State
 * @typedef {(changes: Partial<State>) => string} Change
 */

/** The way from the whole gallery to a folder. @param {State} state @param {Change} change */
function makeCrumbs(state, change) {
  const crumbs = make("nav", { class: "crumbs", "aria-label": "Folder" });
  if (!state.folder && !state.name && !state.filter) return crumbs;
  crumbs.append(make("a", { href: addressOf("browse") }, "All pictures"));
  const parts = state.folder.split("/").slice(0, -2);
  parts.forEach((part, number) => {
    crumbs.append(" / ", make("a", { href: change({ folder: `${parts.slice(0, number + 1).join("/")}/` }) }, part));
  });
  if (state.name) crumbs.append(makeLimit(`Name: ${state.name}`, change({ name: "" })));
  crumbs.append(...makeConditions(state.filter, (filter) => change({ filter })));
  return crumbs;
}

/**
 * @param {State} state
 * @param {string} size
 * @param {Change} change
 * @param {boolean} hasName whether there is a field for names here; else the header's is one
 */
function makeTools(state, size, change, hasName) {
  const order = make("select", { id: "order", "aria-label": "Order" });
  for (const [value, text] of Object.entries(ORDERS)) {
    order.append(make("option", { value, selected: value === (state.order || "added") }, text));
  }
  order.addEventListener("change", () => go(change({ order: order.value === "added" ? "" : order.value })));
  const name = make("input", { type: "search", id: "name", value: state.name, placeholder: "File name", "aria-label": "File name" });
  const form = make("form", { class: "name-search", role: "search", "aria-label": "By file name" }, name);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(change({ name: name.value.trim() }));
  });
  const sizes = make("div", { class: "sizes", role: "group", "aria-label": "Size of the pictures" });
  for (const [key, { text }] of Object.entries(SIZES)) {
    const button = makeButton(text, () => {
      localStorage.setItem(SIZE_KEY, key);
      go(change({}));
    }, { id: `size-${key}`, "aria-pressed": String(key === size) });
    sizes.append(button);
  }
  return make("div", { class: "tools" }, hasName && form, order, sizes);
}

/**
 * Show folders and metadata to choose by, and tell whether there are none.
 *
 * @param {HTMLElement} side
 * @param {State} state
 * @param {Change} change
 * @param {AbortSignal} signal
 */
async function fillSide(side, state, change, signal) {
  const given = Object.entries({ prefix: state.folder, name: state.name, filter: state.filter }).filter(([, value]) => value);
  const limits = new URLSearchParams(given);
  try {
    const [folders, metadata] = await Promise.all([
      askJson(`folders?${limits}`, undefined, { signal }),
      askJson(`metadata?${limits}`, undefined, { signal }),
    ]);
    const list = makeFolders(state, folders, change);
    side.replaceChildren(...(list ? [list] : []), ...makeChips(state.filter, metadata, (filter) => change({ filter })));
    return !side.childElementCount;
  } catch (error) {
    if (!signal.aborted) showProblem(side, error, () => void fillSide(side, state, change, signal));
    return false;
  }
}

/** @param {State} state @param {{folders: {prefix: string, count: number}[]}} answer @param {Change} change */
function makeFolders(state, { folders }, change) {
  if (!folders.length) return null;
  const list = make("ul", { class: "folders" });
  for (const { prefix, count } of folders) {
    const text = prefix.slice(state.folder.length).replace(/\/$/, "");
    list.append(
      make("li", {}, make("a", { href: change({ folder: prefix }) }, make("span", {}, text), make("span", { class: "count" }, formatCount(count)))),
    );
  }
  return make("section", {}, make("h2", {}, "Folders"), list);
}

/** What an empty gallery shows. */
function makeEmpty() {
  return make(
    "div",
    { class: "empty" },
    make("p", {}, "There is no picture yet."),
    make("p", {}, make("a", { class: "strong", href: addressOf("add") }, "Add pictures")),
    make("p", { class: "soft" }, "You can also drop files or a folder anywhere on this page."),
  );
}
