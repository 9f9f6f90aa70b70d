// A grid of uniform tiles that has only those in sight in the document, so it may be of any length.

import { make } from "./elements.js";

// Items are fetched so many at a time, and so many pages are kept.
const PAGE = 100;
const KEPT_PAGES = 60;
// Rows above and below the window that are drawn, too.
const MARGIN_ROWS = 3;
// A page is fetched once the window has stood still for so many ms.
const PAUSE = 60;

/**
 * @template T
 * @typedef {object} GridOptions
 * @property {number} count of all items
 * @property {(offset: number, limit: number, signal: AbortSignal) => Promise<T[]>} load
 * @property {(item: T, place: number) => HTMLElement} makeTile one element that takes the focus
 * @property {{width: number, below: number, height?: number}} tile least width, and the height of what stands below the
 *   square picture, in px, gaps included; a height is one for all widths
 * @property {T[]} [first] the first page, where it is known
 * @property {(place: number) => T | undefined} [known] an item that needs no fetching
 * @property {string} label for screen readers
 * @property {AbortSignal} signal of the view
 * @property {(first: number, last: number) => void} [onMove] told the places in sight
 * @property {(error: unknown, retry: () => void) => void} onProblem
 */

/**
 * Make a grid. One tile is in the tab order; arrows, Home, End and the page keys move the focus.
 *
 * @template T
 * @param {GridOptions<T>} options
 */
export function makeGrid({ count, load, makeTile, tile, first = [], known = () => undefined, label, signal, onMove, onProblem }) {
  const list = make("ol", { class: "grid", role: "list", "aria-label": label });
  /** @type {Map<number, T[] | null>} null while a page is on its way */
  const pages = new Map();
  /** @type {Map<number, HTMLLIElement>} */
  const shown = new Map();
  let columns = 1;
  let height = tile.height ?? tile.width + tile.below;
  let active = 0;
  let hasFocus = false;
  let frame = 0;
  let timer = 0;
  let before = 0;
  if (first.length) pages.set(0, first);

  const itemAt = (/** @type {number} */ place) => pages.get(Math.floor(place / PAGE))?.[place % PAGE] ?? known(place);

  function layOut() {
    const width = list.clientWidth;
    if (!width) return;
    columns = Math.max(1, Math.floor(width / tile.width));
    height = tile.height ?? width / columns + tile.below;
    list.style.height = `${Math.ceil(count / columns) * height}px`;
    for (const [place, entry] of shown) position(entry, place);
    draw();
  }

  function position(/** @type {HTMLElement} */ entry, /** @type {number} */ place) {
    entry.style.width = `${100 / columns}%`;
    entry.style.height = `${height}px`;
    entry.style.transform = `translate(${(place % columns) * 100}%, ${Math.floor(place / columns) * height}px)`;
  }

  function schedule() {
    frame ||= requestAnimationFrame(draw);
  }

  function draw() {
    frame = 0;
    const above = -list.getBoundingClientRect().top;
    const topRow = Math.max(0, Math.floor(above / height));
    const bottomRow = Math.max(topRow, Math.ceil((above + window.innerHeight) / height));
    const from = Math.max(0, (topRow - MARGIN_ROWS) * columns);
    const to = Math.min(count, (bottomRow + MARGIN_ROWS) * columns);
    for (const [place, entry] of shown) {
      if ((place < from || place >= to) && !(hasFocus && place === active)) {
        entry.remove();
        shown.delete(place);
      }
    }
    // What is out of sight in the next frame is not worth its pictures: until the window moves slower, frames stay empty.
    const isFlying = Math.abs(above - before) > window.innerHeight / 3;
    before = above;
    for (let place = from; place < to; place += 1) show(place, isFlying);
    if (isFlying) schedule();
    onMove?.(Math.min(count, topRow * columns), Math.min(count, bottomRow * columns));
    clearTimeout(timer);
    timer = setTimeout(() => fetchMissing(from, to), PAUSE);
  }

  /** Draw a place: its tile once its item is known, until then, or if asked for, an empty frame. */
  function show(/** @type {number} */ place, isEmpty = false) {
    const item = isEmpty ? undefined : itemAt(place);
    let entry = shown.get(place);
    if (!entry) {
      entry = make("li", { "aria-setsize": count, "aria-posinset": place + 1, class: "waiting" });
      position(entry, place);
      shown.set(place, entry);
      list.append(entry);
    }
    if (item !== undefined && entry.classList.contains("waiting")) {
      const link = makeTile(item, place);
      link.dataset.place = String(place);
      link.tabIndex = place === active ? 0 : -1;
      entry.classList.remove("waiting");
      entry.replaceChildren(link);
    }
  }

  function fetchMissing(/** @type {number} */ from, /** @type {number} */ to) {
    if (signal.aborted) return;
    for (let page = Math.floor(from / PAGE); page * PAGE < to; page += 1) if (!pages.has(page)) void fetchPage(page);
  }

  async function fetchPage(/** @type {number} */ page) {
    pages.set(page, null);
    try {
      const items = await load(page * PAGE, PAGE, signal);
      pages.delete(page);
      pages.set(page, items);
      for (const old of [...pages.keys()].slice(0, Math.max(0, pages.size - KEPT_PAGES))) pages.delete(old);
      for (let place = page * PAGE; place < (page + 1) * PAGE; place += 1) if (shown.has(place)) show(place);
    } catch (error) {
      pages.delete(page);
      if (!signal.aborted) onProblem(error, () => void fetchPage(page));
    }
  }

  function moveTo(/** @type {number} */ place) {
    const link = (/** @type {number} */ at) => /** @type {HTMLElement | null} */ (shown.get(at)?.firstElementChild ?? null);
    const before = link(active);
    if (before) before.tabIndex = -1;
    active = place;
    const row = Math.floor(place / columns) * height;
    const top = list.getBoundingClientRect().top + row;
    if (top < 0) window.scrollBy(0, top - height / 2);
    else if (top + height > window.innerHeight) window.scrollBy(0, top + height * 1.5 - window.innerHeight);
    draw();
    show(place);
    const after = link(place);
    if (after) {
      after.tabIndex = 0;
      after.focus({ preventScroll: true });
    } else void focusLater(place);
  }

  async function focusLater(/** @type {number} */ place) {
    const page = Math.floor(place / PAGE);
    if (pages.get(page) === undefined) await fetchPage(page);
    if (place === active && !signal.aborted) {
      show(place);
      /** @type {HTMLElement | null} */ (shown.get(place)?.firstElementChild ?? null)?.focus({ preventScroll: true });
    }
  }

  list.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !event.target) return;
    const perPage = Math.max(1, Math.floor(window.innerHeight / height)) * columns;
    /** @type {Record<string, number>} */
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -perPage, PageDown: perPage };
    let place = event.key === "Home" ? 0 : event.key === "End" ? count - 1 : active + (steps[event.key] ?? Number.NaN);
    if (Number.isNaN(place)) return;
    event.preventDefault();
    place = Math.min(count - 1, Math.max(0, place));
    if (place !== active) moveTo(place);
  });
  list.addEventListener("focusin", (event) => {
    hasFocus = true;
    // A tile may hold controls of its own.
    const link = /** @type {HTMLElement | null} */ (/** @type {HTMLElement} */ (event.target).closest("[data-place]"));
    const place = Number(link?.dataset.place);
    if (!link || place === active) return;
    const before = /** @type {HTMLElement | null} */ (shown.get(active)?.firstElementChild ?? null);
    if (before) before.tabIndex = -1;
    active = place;
    link.tabIndex = 0;
  });
  list.addEventListener("focusout", () => {
    hasFocus = false;
  });
  window.addEventListener("scroll", schedule, { passive: true, signal });
  // It is told when the grid enters the document, too.
  const observer = new ResizeObserver(layOut);
  observer.observe(list);
  signal.addEventListener("abort", () => {
    observer.disconnect();
    clearTimeout(timer);
  });
  // Scroll positions are restored before the grid is measured, so until then it is at least as high as it will be.
  const fewest = Math.max(1, Math.floor((window.innerWidth - 360) / tile.width));
  list.style.height = `${Math.ceil(count / fewest) * 2 * height}px`;
  return list;
}
