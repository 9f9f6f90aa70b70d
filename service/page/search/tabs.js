// A row of tabs, of which one is chosen.

import { make } from "../parts/elements.js";

/**
 * Make the tabs of a panel; arrows, Home and End go from one to the next.
 *
 * @param {string[]} names
 * @param {number} chosen
 * @param {string} label for screen readers
 * @param {(number: number) => void} choose
 * @param {HTMLElement} panel
 */
export function makeTabs(names, chosen, label, choose, panel) {
  const list = make("div", { role: "tablist", class: "tabs", "aria-label": label });
  const tabs = names.map((name, number) => {
    const tab = make("button", { type: "button", role: "tab", id: `tab-${number}`, "aria-controls": panel.id, title: name }, name);
    tab.addEventListener("click", () => select(number));
    return tab;
  });
  list.append(...tabs);
  panel.setAttribute("role", "tabpanel");

  function mark() {
    for (const [number, tab] of tabs.entries()) {
      tab.setAttribute("aria-selected", String(number === chosen));
      tab.tabIndex = number === chosen ? 0 : -1;
    }
    panel.setAttribute("aria-labelledby", tabs[chosen].id);
  }

  function select(/** @type {number} */ number) {
    if (number === chosen) return;
    chosen = number;
    mark();
    tabs[number].focus();
    choose(number);
  }

  list.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const last = tabs.length - 1;
    /** @type {Record<string, number>} */
    const targets = { ArrowLeft: chosen ? chosen - 1 : last, ArrowRight: chosen < last ? chosen + 1 : 0, Home: 0, End: last };
    if (targets[event.key] === undefined) return;
    event.preventDefault();
    select(targets[event.key]);
  });
  mark();
  return list;
}
