// Two to four copies of a group beside or over each other, with one zoom.

import { contentOf, previewOf, thumbnailOf } from "../api.js";
import { doneOf, keptOf } from "./decisions.js";
import { make, makeButton } from "../parts/elements.js";
import { makeActions, makeButtons, makeFacts, reasonOf, stateOf, takeKey } from "./group.js";
import { makePicture } from "../parts/tile.js";
import { fileName, folderName, formatCount } from "../parts/words.js";
import { makeZoom } from "../parts/zoom.js";

/** @typedef {import("./decisions.js").Copy} Copy */

const MOST_PANES = 4;
// Files of these formats are shown as they are; of others, and of larger ones, the service's preview.
const SHOWN = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF"];
const MOST_BYTES = 50_000_000;
/** @type {Record<string, string>} */
const MODES = { beside: "Side by side", slider: "Slider", difference: "Difference" };
const MODE_KEY = "lookalike-comparison";

/**
 * Fill a view with the comparison of a group's copies.
 *
 * @param {HTMLElement} place
 * @param {import("./decisions.js").Group} group
 * @param {{number: number, total: number, signal: AbortSignal, showKeys: () => void, back: () => void,
 *   open: (step: -1 | 1) => void}} options number: of the group among all, from 0
 */
export function fillComparison(place, group, { number, total, signal, showKeys, back, open }) {
  const count = Math.min(MOST_PANES, group.items.length);
  // The copies that the panes show come first.
  const copies = [...group.items];
  /** @type {Map<string, HTMLImageElement>} */
  const pictures = new Map();
  const list = make("div", { class: "panes", "data-count": count });
  const divider = make("input", { type: "range", class: "divide", min: 0, max: 100, value: 50, "aria-label": "Divider between the two pictures" });
  const handle = make("div", { class: "divider", "aria-hidden": "true" });
  const bar = make("div", { class: "group-bar" });
  const actions = makeActions(group, update);
  const panes = Array.from({ length: count }, (_, at) => makePane(at));
  fill();
  const zoom = makeZoom(panes.map(({ stage }) => stage), signal);

  function makePane(/** @type {number} */ at) {
    const stage = make("div", { class: "stage", tabindex: 0, role: "group" });
    const caption = make("figcaption");
    list.append(make("figure", { class: "pane" }, stage, caption));
    return { at, stage, caption };
  }

  /** Show the copies in the panes. A picture that moves to another pane keeps what it has loaded. */
  function fill() {
    for (const { at, stage, caption } of panes) {
      const copy = copies[at];
      let picture = pictures.get(copy.id);
      if (!picture) {
        picture = makeLarge(copy);
        pictures.set(copy.id, picture);
      }
      stage.replaceChildren(picture);
      stage.setAttribute("aria-label", `${fileName(copy.id)}. Plus and minus zoom, arrows move it once it is zoomed`);
      caption.replaceChildren(makeChoice(at), makeKeep(copy, at), makeFacts(copy, group));
    }
    update();
  }

  /** The copy of a pane: a name, or a list where the group has other copies to show. */
  function makeChoice(/** @type {number} */ at) {
    if (copies.length === 2) return make("p", { class: "file", title: copies[at].id }, fileName(copies[at].id));
    const choice = make("select", { "aria-label": `Picture ${at + 1}`, "data-act": `choice-${at}` });
    for (const copy of group.items) choice.append(make("option", { value: copy.id, selected: copy === copies[at] }, nameOf(copy)));
    choice.addEventListener("change", () => {
      swap(at, copies.findIndex(({ id }) => id === choice.value));
      /** @type {HTMLElement | null} */ (list.querySelector(`[data-act="choice-${at}"]`))?.focus();
    });
    return choice;
  }

  function makeKeep(/** @type {Copy} */ copy, /** @type {number} */ at) {
    const box = make("input", { type: "checkbox", "aria-label": `Keep ${copy.id}`, "data-id": copy.id });
    box.addEventListener("change", () => actions.choose(copy.id, false));
    return make("label", {}, box, " Keep", make("kbd", { "aria-hidden": "true" }, String(at + 1)));
  }

  function swap(/** @type {number} */ one, /** @type {number} */ other) {
    [copies[one], copies[other]] = [copies[other], copies[one]];
    fill();
    zoom.apply();
  }

  function update() {
    const done = doneOf(group);
    const kept = keptOf(group);
    const focused = bar.contains(document.activeElement) ? document.activeElement?.getAttribute("data-act") : null;
    const title = make("p", { class: "group-title" }, make("span", { class: "reason" }, reasonOf(group)), done && make("span", { class: "state" }, stateOf(group)));
    bar.replaceChildren(title, make("div", { class: "buttons" }, ...makeButtons(group, actions)));
    for (const box of /** @type {NodeListOf<HTMLInputElement>} */ (list.querySelectorAll("input[data-id]"))) {
      const isKept = kept.has(box.dataset.id ?? "");
      box.checked = isKept;
      box.disabled = done === "apart" || done === "skip";
      box.closest(".pane")?.classList.toggle("gone", done === "keep" && !isKept);
    }
    if (focused) {
      const again = bar.querySelector(`[data-act="${focused}"]:not(:disabled)`) ?? bar.querySelector("button:not(:disabled)");
      /** @type {HTMLElement | null} */ (again)?.focus();
    }
  }

  function setMode(/** @type {string} */ mode) {
    sessionStorage.setItem(MODE_KEY, mode);
    list.dataset.mode = mode;
    divider.hidden = handle.hidden = mode !== "slider";
    // The stage below takes the keys of both.
    panes[1].stage.tabIndex = mode === "beside" ? 0 : -1;
    for (const button of modes.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.act === mode));
  }

  const modes = make(
    "div",
    { class: "modes", role: "group", "aria-label": "How they are shown" },
    ...Object.entries(MODES).map(([mode, text]) => makeButton(text, () => setMode(mode), { "data-act": mode })),
  );
  list.append(divider, handle);
  followDivider(list, divider, handle);
  setMode(MODES[sessionStorage.getItem(MODE_KEY) ?? ""] ? String(sessionStorage.getItem(MODE_KEY)) : "beside");

  const step = (/** @type {string} */ text, /** @type {-1 | 1} */ by) =>
    makeButton(text, () => open(by), { id: by < 0 ? "earlier" : "later", disabled: number + by < 0 || number + by >= total });
  place.append(
    make(
      "header",
      { class: "bar" },
      make("h1", {}, `Group ${formatCount(number + 1)} of ${formatCount(total)}`),
      make("p", { class: "buttons" }, makeButton("All groups", back, { id: "back" }), step("← Previous", -1), step("Next →", 1)),
    ),
    bar,
    make("div", { class: "tools" }, modes, makeButton("Swap", () => swap(0, 1), { id: "swap" }), ...zoom.buttons, makeButton("?", showKeys, { "aria-label": "Keys" })),
    list,
  );
  place.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || /** @type {HTMLElement} */ (event.target).closest("select")) return;
    const isRange = event.target === divider;
    if (event.key === "Escape") back();
    else if (event.key === "j" || (event.key === "ArrowDown" && !isRange)) open(1);
    else if (event.key === "k" || (event.key === "ArrowUp" && !isRange)) open(-1);
    else if (event.key === "x") swap(0, 1);
    else if (event.key === "?") showKeys();
    else {
      void takeKey(event, copies, actions)?.then((isDone) => {
        if (isDone && number + 1 < total) open(1);
      });
      return;
    }
    event.preventDefault();
  });
}

/** File name first, folder second. @param {Copy} copy */
function nameOf({ id }) {
  return [fileName(id), folderName(id)].filter(Boolean).join(" · ");
}

/** @param {Copy} copy */
function makeLarge(copy) {
  const item = { id: copy.id, metadata: {}, digest: copy.digest };
  const isShown = SHOWN.includes(copy.format ?? "") && (copy.size_bytes ?? 0) <= MOST_BYTES;
  const sources = [previewOf(item, 1024), thumbnailOf(item)];
  const picture = isShown ? makePicture(contentOf(copy.id), ...sources) : makePicture(sources[0], sources[1]);
  picture.loading = "eager";
  picture.alt = fileName(copy.id);
  return picture;
}

/**
 * Let a line over two pictures be moved: it shows the first one on its left, the second on its right.
 *
 * @param {HTMLElement} list
 * @param {HTMLInputElement} divider says where the line is, and takes the keys
 * @param {HTMLElement} handle the line
 */
function followDivider(list, divider, handle) {
  const apply = () => list.style.setProperty("--divider", `${divider.value}%`);
  divider.addEventListener("input", apply);
  handle.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    handle.setPointerCapture(event.pointerId);
  });
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const box = list.getBoundingClientRect();
    divider.value = String(Math.round((100 * (event.clientX - box.left)) / box.width));
    apply();
  });
  apply();
}
