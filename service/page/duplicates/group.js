// A group of copies as a row: the copies, what differs between them, and what the visitor decides.

import { askJson, thumbnailOf } from "../api.js";
import { addressOf } from "../router.js";
import { decide, doneOf, keptOf, saveDecisions } from "./decisions.js";
import { make, makeButton } from "../parts/elements.js";
import { messageOf } from "../parts/problem.js";
import { makePicture } from "../parts/tile.js";
import { showToast } from "../parts/toast.js";
import { fileName, folderName, formatBytes, formatCount, formatDate, formatScore } from "../parts/words.js";

// More copies than these are behind a button.
const MOST_COPIES = 12;

/**
 * @typedef {import("./decisions.js").Copy} Copy
 * @typedef {import("./decisions.js").Group} Group
 * @typedef {import("./decisions.js").Done} Done
 */

/** What the keys do in a group. @type {[string, string][]} */
export const KEYS = [
  ["j or ↓", "the next group"],
  ["k or ↑", "the group before"],
  ["1 to 9", "keep this copy alone"],
  ["Shift and 1 to 9", "keep this copy, too, or no longer"],
  ["Enter", "remove the others"],
  ["s", "skip the group"],
  ["n", "these are no duplicates"],
  ["u", "take the decision back"],
  ["c", "compare the copies"],
  ["x", "swap the first two, in the comparison"],
  ["?", "this list"],
];

/** Why the best copy is the best, in words. @param {Group} group */
export function reasonOf({ reason }) {
  const words = reason
    .replace(/(\d+)×(\d+)/, (_, width, height) => `${formatCount(Number(width))} × ${formatCount(Number(height))}`)
    .replace(/(\d+) bytes/, (_, bytes) => formatBytes(Number(bytes)))
    .replace(/oldest, (.*?)(;|$)/, (_, date, end) => `oldest, ${formatDate(date)}${end}`);
  return `Best: ${words}`;
}

/**
 * What is known of a copy's file. What the group's copies have not in common is marked.
 *
 * @param {Copy} copy
 * @param {Group} group
 */
export function makeFacts(copy, group) {
  /** @type {[string, (one: Copy) => string][]} */
  const facts = [
    ["Folder", (one) => folderName(one.id) || "—"],
    ["Pixels", (one) => (one.width && one.height ? `${formatCount(one.width)} × ${formatCount(one.height)}` : "")],
    ["File", (one) => [one.size_bytes === null ? "" : formatBytes(one.size_bytes), one.format ?? ""].filter(Boolean).join(" ")],
    ["Date", (one) => (one.date ? formatDate(one.date) : "")],
  ];
  const list = make("ul", { class: "copy-facts" });
  for (const [name, textOf] of facts) {
    const text = textOf(copy);
    if (!text || (name === "Folder" && group.items.every(({ id }) => !folderName(id)))) continue;
    const differs = group.items.some((one) => textOf(one) !== text);
    list.append(make("li", { title: `${name}: ${text}` }, make("span", { class: "unseen" }, `${name}: `), differs ? make("mark", {}, text) : text));
  }
  const words = copy.id === group.best ? "best copy" : copy.exact ? "same bytes" : `score ${formatScore(copy.score)}`;
  list.append(make("li", { class: "soft", title: "Beside the best copy" }, words));
  return list;
}

/**
 * Tell the copies of a group apart for good, or take that back.
 *
 * @param {Group} group
 * @param {boolean} isApart
 * @returns {Promise<boolean>} whether the service has noted it
 */
export async function tellApart(group, isApart) {
  try {
    await askJson("duplicates/dismissals", { ids: group.items.map(({ id }) => id), dismissed: isApart });
  } catch (error) {
    showToast(messageOf(error));
    return false;
  }
  decide(group, isApart ? "apart" : "");
  return true;
}

/** What a decision says. @param {Group} group */
export function stateOf(group) {
  const gone = group.items.length - keptOf(group).size;
  const words = { "": "", skip: "Skipped", apart: "Not duplicates", keep: gone ? `${formatCount(gone)} to remove` : "All stay" };
  return words[doneOf(group)];
}

/**
 * What the visitor can do with a group, for rows and the comparison.
 *
 * @param {Group} group
 * @param {() => void} onChange
 */
export function makeActions(group, onChange) {
  const changed = () => {
    if (!saveDecisions()) showToast("This browser has no room to keep so many decisions: a reload will forget them.");
    onChange();
  };
  return {
    /** Keep a copy alone, or with others. */
    choose(/** @type {string} */ id, /** @type {boolean} */ alone) {
      if (doneOf(group) === "apart") return;
      const kept = keptOf(group);
      if (alone) decide(group, doneOf(group) === "keep" ? "keep" : "", [id]);
      else {
        if (!kept.delete(id)) kept.add(id);
        // A group of which nothing would stay is not decided.
        decide(group, doneOf(group) === "keep" && kept.size ? "keep" : "", kept);
      }
      changed();
    },
    /** @returns {Promise<boolean>} whether it was done */
    async decide(/** @type {Done} */ done) {
      const before = doneOf(group);
      if (done === "keep" && !keptOf(group).size) return false;
      if (done === before) return true;
      if (done === "apart" || before === "apart") {
        if (!(await tellApart(group, done === "apart"))) return false;
        if (done === "apart") {
          showToast("These are no duplicates from now on.", "Undo", async () => {
            if (doneOf(group) === "apart" && (await tellApart(group, false))) changed();
          });
        }
      }
      if (done !== "apart") decide(group, done);
      changed();
      return true;
    },
  };
}

/**
 * The buttons of a group.
 *
 * @param {Group} group
 * @param {ReturnType<typeof makeActions>} actions
 */
export function makeButtons(group, actions) {
  const done = doneOf(group);
  const kept = keptOf(group).size;
  const rest = group.items.length - kept;
  const act = (/** @type {Done} */ next) => () => void actions.decide(next);
  if (done) return [makeButton(done === "apart" ? "They are duplicates" : "Take back", act(""), { "data-act": "back" })];
  const words = !kept ? "Choose one to keep" : rest ? `Keep ${formatCount(kept)}, remove ${formatCount(rest)}` : "Keep all";
  return [
    makeButton(words, act("keep"), { class: "strong", disabled: !kept, "data-act": "keep" }),
    makeButton("Skip", act("skip"), { "data-act": "skip" }),
    makeButton("Not duplicates", act("apart"), { "data-act": "apart" }),
  ];
}

/**
 * Make the row of a group. `onChange` has to call the row's `update`.
 *
 * @param {Group} group
 * @param {{place: number, total: number, compareAddress: string, onChange: () => void}} options
 */
export function makeRow(group, { place, total, compareAddress, onChange }) {
  const bar = make("div", { class: "group-bar" });
  const list = make("ol", { class: "copies", role: "list" });
  const row = make("div", { class: "group", role: "group", id: `group-${place}` }, bar, list);
  const actions = makeActions(group, onChange);
  const compare = make("a", { class: "plain", href: compareAddress, "data-act": "compare" }, "Compare");
  /** @type {Map<string, {entry: HTMLElement, box: HTMLInputElement}>} */
  const entries = new Map();

  function add(/** @type {Copy} */ copy, /** @type {number} */ number) {
    const box = make("input", { type: "checkbox", "aria-label": `Keep ${copy.id}` });
    box.addEventListener("change", () => actions.choose(copy.id, false));
    const address = addressOf("picture", { id: copy.id });
    const entry = make(
      "li",
      { class: "copy" },
      make("label", {}, box, " Keep", number < 9 && make("kbd", { "aria-hidden": "true" }, String(number + 1))),
      make(
        "a",
        { class: "tile", href: address, title: copy.source ?? copy.id, draggable: "false" },
        make("span", { class: "frame" }, makePicture(thumbnailOf({ id: copy.id, metadata: {}, digest: copy.digest }))),
        make("span", { class: "file" }, fileName(copy.id)),
      ),
      makeFacts(copy, group),
    );
    entries.set(copy.id, { entry, box });
    list.append(entry);
  }

  function update() {
    const done = doneOf(group);
    const kept = keptOf(group);
    const focused = bar.contains(document.activeElement) ? document.activeElement?.getAttribute("data-act") : null;
    const title = make(
      "p",
      { class: "group-title" },
      make("b", {}, formatCount(place + 1)),
      make("span", { class: "reason", title: reasonOf(group) }, reasonOf(group)),
      done && make("span", { class: "state" }, stateOf(group)),
    );
    bar.replaceChildren(title, make("div", { class: "buttons" }, ...makeButtons(group, actions), compare));
    row.dataset.done = done;
    row.setAttribute(
      "aria-label",
      [`Group ${formatCount(place + 1)} of ${formatCount(total)}: ${fileName(group.best)}, ${formatCount(group.items.length)} copies`, stateOf(group)]
        .filter(Boolean)
        .join(". "),
    );
    for (const [id, { entry, box }] of entries) {
      box.checked = kept.has(id);
      box.disabled = done === "apart" || done === "skip";
      entry.classList.toggle("gone", done === "keep" && !kept.has(id));
    }
    setTabStops(row, row.classList.contains("current"));
    if (focused) {
      const again = /** @type {HTMLElement | null} */ (bar.querySelector(`[data-act="${focused}"]:not(:disabled)`));
      (again ?? row).focus({ preventScroll: true });
    }
  }

  group.items.slice(0, MOST_COPIES).forEach(add);
  if (group.items.length > MOST_COPIES) {
    const more = makeButton(`+${formatCount(group.items.length - MOST_COPIES)}`, () => {
      more.parentElement?.remove();
      group.items.slice(MOST_COPIES).forEach((copy, number) => add(copy, number + MOST_COPIES));
      update();
      entries.get(group.items[MOST_COPIES].id)?.box.focus();
    }, { "aria-label": `Show ${formatCount(group.items.length - MOST_COPIES)} more copies` });
    list.append(make("li", { class: "more-copies" }, more));
  }
  update();
  return { row, actions, compare, update };
}

/** Let the controls of a row be in the tab order, or not. @param {HTMLElement} row @param {boolean} isCurrent */
export function setTabStops(row, isCurrent) {
  row.classList.toggle("current", isCurrent);
  for (const control of row.querySelectorAll("a, button, input")) {
    /** @type {HTMLElement} */ (control).tabIndex = isCurrent ? 0 : -1;
  }
}

/**
 * What a key does with a group.
 *
 * @param {KeyboardEvent} event
 * @param {Copy[]} copies those that the numbers name
 * @param {ReturnType<typeof makeActions>} actions
 * @returns {Promise<boolean> | null} whether the group was decided; null for keys that decide nothing
 */
export function takeKey(event, copies, actions) {
  const target = /** @type {HTMLElement} */ (event.target);
  if (event.altKey || event.ctrlKey || event.metaKey || target.closest("select, input:not([type=checkbox])")) return null;
  const number = Number(/^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1]);
  const copy = copies[number - 1];
  /** @type {Record<string, Done>} */
  const decisions = { s: "skip", n: "apart", u: "" };
  if (copy) {
    event.preventDefault();
    actions.choose(copy.id, !event.shiftKey);
    return null;
  }
  // Enter on a link or a button is theirs.
  const done = event.key === "Enter" && !target.closest("a, button") ? "keep" : decisions[event.key];
  if (done === undefined) return null;
  event.preventDefault();
  return actions.decide(done).then((isDone) => isDone && done !== "");
}
