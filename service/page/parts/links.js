// A list of links of which one is in the tab order; arrows, Home, End and the page keys move the focus among them.

import { make } from "./elements.js";

const PAGE = 10;

/**
 * @param {string} label for screen readers
 * @param {HTMLAnchorElement[]} links
 */
export function makeLinks(label, links) {
  links.forEach((link, at) => {
    link.tabIndex = at ? -1 : 0;
  });
  const list = make("ol", { role: "list", "aria-label": label }, ...links.map((link) => make("li", {}, link)));
  list.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const at = links.indexOf(/** @type {HTMLAnchorElement} */ (document.activeElement));
    /** @type {Record<string, number>} */
    const places = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: links.length - 1, PageDown: at + PAGE, PageUp: at - PAGE };
    if (places[event.key] === undefined || at < 0) return;
    event.preventDefault();
    const next = links[Math.min(links.length - 1, Math.max(0, places[event.key]))];
    links[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return list;
}
