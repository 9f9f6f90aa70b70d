// Many links with one place in the tab order: arrows, Home and End move between them.

/**
 * Let the keys move the focus between the links in an element. Call the result after the links have changed.
 *
 * @param {HTMLElement} place
 * @param {string} selector of the links
 * @returns {() => void}
 */
export function makeRoving(place, selector) {
  /** @type {HTMLElement | null} */
  let active = null;
  const links = () => /** @type {HTMLElement[]} */ ([...place.querySelectorAll(selector)]);

  function refresh() {
    const all = links();
    if (!active || !all.includes(active)) active = all[0] ?? null;
    for (const link of all) link.tabIndex = link === active ? 0 : -1;
  }

  /** The nearest link in the next row above or below. @param {HTMLElement[]} all @param {HTMLElement} from @param {1 | -1} way */
  function acrossRows(all, from, way) {
    const box = from.getBoundingClientRect();
    const boxes = all.map((link) => ({ link, top: link.getBoundingClientRect().top, left: link.getBoundingClientRect().left }));
    const further = boxes.filter(({ top }) => way * (top - box.top) > 1);
    if (!further.length) return from;
    const row = Math.min(...further.map(({ top }) => way * top));
    const candidates = further.filter(({ top }) => way * top < row + 1);
    const distance = (/** @type {{left: number}} */ { left }) => Math.abs(left - box.left);
    return candidates.reduce((best, one) => (distance(one) < distance(best) ? one : best)).link;
  }

  place.addEventListener("keydown", (event) => {
    const from = /** @type {HTMLElement} */ (event.target);
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || !from.matches(selector)) return;
    const all = links();
    const at = all.indexOf(from);
    /** @type {Record<string, () => HTMLElement | undefined>} */
    const targets = {
      ArrowLeft: () => all[at - 1],
      ArrowRight: () => all[at + 1],
      ArrowUp: () => acrossRows(all, from, -1),
      ArrowDown: () => acrossRows(all, from, 1),
      Home: () => all[0],
      End: () => all[all.length - 1],
    };
    if (!targets[event.key]) return;
    event.preventDefault();
    targets[event.key]()?.focus();
  });
  place.addEventListener("focusin", (event) => {
    const link = /** @type {HTMLElement} */ (event.target);
    if (!link.matches(selector)) return;
    active = link;
    refresh();
  });
  return refresh;
}
