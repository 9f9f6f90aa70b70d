// The address bar holds the state: #VIEW?PARAMETERS. Every entry of the history keeps its scroll position and focus.

import { make } from "./parts/elements.js";
import { showProblem } from "./parts/problem.js";

/**
 * One opening of a view.
 *
 * @typedef {object} Visit
 * @property {URLSearchParams} params of the address
 * @property {HTMLElement} place an empty element to fill; it is in the document once the view has been opened
 * @property {AbortSignal} signal aborted when the visitor leaves the view
 * @property {(title: string) => void} title sets the title of the tab
 * @property {boolean} isReturn whether the visitor comes back to an entry of the history
 */

/**
 * A view fetches what it shows first, fills `visit.place` and resolves; until then the earlier view stays in sight, and
 * it stays if the view rejects. The first <h1> in `place` gets the focus.
 *
 * @typedef {(visit: Visit) => Promise<void> | void} View
 */

const NAME = "Lookalike";
const KEPT = "lookalike-entries";
// After so many ms a view that is not there yet is said to be loading.
const PATIENCE = 500;

const main = /** @type {HTMLElement} */ (document.querySelector("#main"));
const problem = /** @type {HTMLElement} */ (document.querySelector("#problem"));
const waiting = /** @type {HTMLElement} */ (document.querySelector("#waiting"));

/** @type {Record<string, {scroll: number, focus: string}>} */
const entries = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
/** @type {Record<string, View>} */
let views = {};
let current = "";
// The first view of all leaves the focus to the browser.
let isFirst = true;
let visiting = new AbortController();

/**
 * The address of a view's state. Empty parameters are left out.
 *
 * @param {string} view
 * @param {Record<string, string | number | null | undefined>} [params]
 */
export function addressOf(view, params = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(given.map(([key, value]) => [key, String(value)])).toString();
  return `#${view}${query && "?"}${query}`;
}

/** Open the view at an address as a new entry of the history. @param {string} address */
export function go(address) {
  remember();
  history.pushState(null, "", address);
  open();
}

/** Open the view at an address in the place of the current entry. @param {string} address */
export function replace(address) {
  history.replaceState(history.state, "", address);
  delete entries[current];
  open();
}

/** Give the current entry another address, without opening anything. @param {string} address */
export function rename(address) {
  history.replaceState(history.state, "", address);
  markCurrent();
}

/** Open the current view again, for example after a change. */
export function reload() {
  remember();
  open(true);
}

/** Open the view of the address, and of each later one. @param {Record<string, View>} table */
export function startRouter(table) {
  views = table;
  history.scrollRestoration = "manual";
  document.querySelector("#skip")?.addEventListener("click", (event) => {
    // Its address would be that of a view.
    event.preventDefault();
    main.focus();
  });
  window.addEventListener("popstate", () => {
    remember();
    open();
  });
  window.addEventListener("pagehide", () => {
    remember();
    sessionStorage.setItem(KEPT, JSON.stringify(entries));
  });
  open();
}

/** The view's name and parameters in an address. @param {string} hash */
export function parseAddress(hash) {
  // Links to earlier versions of this page.
  const old = /^#(id|text)=(.*)$/s.exec(hash);
  if (old) return { name: "search", params: new URLSearchParams([[old[1], decode(old[2])]]) };
  const [, name, query] = /** @type {RegExpExecArray} */ (/^#?([^?]*)\??(.*)$/s.exec(hash));
  return { name: name in views ? name : "browse", params: new URLSearchParams(name in views ? query : "") };
}

/** @param {string} text */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    // The visitor edited the address; the service will report an unknown id.
    return text;
  }
}

/** Note scroll position and focus of the entry that is in sight. */
function remember() {
  if (!current) return;
  const focused = document.activeElement;
  const focus = focused?.getAttribute("href") ?? focused?.id ?? "";
  entries[current] = { scroll: window.scrollY, focus };
}

/** @param {boolean} [again] */
async function open(again = false) {
  const known = history.state?.entry;
  const isReturn = known !== undefined && known in entries;
  current = known ?? crypto.getRandomValues(new Uint32Array(2)).join("-");
  if (known === undefined) history.replaceState({ ...history.state, entry: current }, "");

  visiting.abort();
  visiting = new AbortController();
  const { signal } = visiting;
  const { name, params } = parseAddress(location.hash);
  const place = make("section", { class: `view ${name}` });
  const title = (/** @type {string} */ text) => {
    if (!signal.aborted) document.title = text ? `${text} · ${NAME}` : NAME;
  };
  markCurrent();
  const timer = setTimeout(() => showWaiting(signal), PATIENCE);
  main.setAttribute("aria-busy", "true");
  try {
    await views[name]({ params, place, signal, title, isReturn });
    if (signal.aborted) return;
    problem.replaceChildren();
    main.replaceChildren(place);
    restore(isReturn || again ? entries[current] : undefined, signal);
  } catch (error) {
    if (signal.aborted) return;
    title("Problem");
    showProblem(problem, error, () => open(again));
  } finally {
    clearTimeout(timer);
    if (!signal.aborted) {
      waiting.hidden = true;
      main.removeAttribute("aria-busy");
    }
  }
}

/** Say that a view is loading, with a way back. @param {AbortSignal} signal */
function showWaiting(signal) {
  if (signal.aborted) return;
  const cancel = make("button", { type: "button", class: "plain" }, "Cancel");
  cancel.addEventListener("click", () => {
    visiting.abort();
    waiting.hidden = true;
    main.removeAttribute("aria-busy");
    history.back();
  });
  waiting.replaceChildren(make("progress", { "aria-label": "Loading" }), " Loading … ", cancel);
  waiting.hidden = false;
}

/**
 * Scroll and focus as an entry was left; a new entry begins at the top, with its heading.
 *
 * @param {{scroll: number, focus: string} | undefined} entry
 * @param {AbortSignal} signal
 */
function restore(entry, signal) {
  window.scrollTo(0, entry?.scroll ?? 0);
  const heading = /** @type {HTMLElement | null} */ (main.querySelector("h1"));
  if (heading) heading.tabIndex = -1;
  const wanted = entry?.focus;
  if (!wanted) {
    if (!isFirst) heading?.focus({ preventScroll: true });
    isFirst = false;
    return;
  }
  const find = () =>
    /** @type {HTMLElement | null} */ (
      document.querySelector(wanted.startsWith("#") ? `[href="${CSS.escape(wanted)}"]` : `#${CSS.escape(wanted)}`)
    );
  const found = find();
  if (found) return found.focus({ preventScroll: true });
  heading?.focus({ preventScroll: true });
  // A grid draws its tiles a moment later.
  const observer = new MutationObserver(() => {
    if (document.activeElement !== heading) return observer.disconnect();
    const late = find();
    if (late) {
      observer.disconnect();
      late.focus({ preventScroll: true });
    }
  });
  observer.observe(main, { childList: true, subtree: true });
  signal.addEventListener("abort", () => observer.disconnect());
}

/** Mark the current view in the navigation. */
function markCurrent() {
  const { name } = parseAddress(location.hash);
  for (const link of document.querySelectorAll("#views a, #about-link")) {
    if (link.getAttribute("href") === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}
