// Conditions on folders and metadata, as links.

import { make } from "./elements.js";
import { formatCount } from "./words.js";

/** A condition, with a link that takes it away. @param {string} text @param {string} address */
export function makeLimit(text, address) {
  return make("a", { class: "chip on", href: address, "aria-label": `${text}. Take this condition away` }, text, " ×");
}

/**
 * The conditions of a filter, each as a link that takes it away.
 *
 * @param {string} filter as JSON
 * @param {(filter: string) => string} addressWith the address with another filter
 */
export function makeConditions(filter, addressWith) {
  return Object.entries(parseFilter(filter)).map(([key, value]) => {
    const rest = { ...parseFilter(filter) };
    delete rest[key];
    return makeLimit(`${key}: ${shown(value)}`, addressWith(Object.keys(rest).length ? JSON.stringify(rest) : ""));
  });
}

/**
 * Metadata as links that add a condition: a section for each key, its most frequent values in it.
 *
 * @param {string} filter as JSON; its keys are left out
 * @param {{keys: {key: string, distinct: number, values: {value: unknown, count: number}[]}[]}} answer
 * @param {(filter: string) => string} addressWith the address with another filter
 */
export function makeChips(filter, { keys }, addressWith) {
  const chosen = parseFilter(filter);
  return keys
    .filter(({ key, values }) => values.length && !(key in chosen))
    .map(({ key, values, distinct }) => {
      const chips = make("p", { class: "chips" });
      for (const { value, count } of values) {
        const narrower = JSON.stringify({ ...chosen, [key]: value });
        chips.append(
          make("a", { class: "chip", href: addressWith(narrower) }, shown(value), " ", make("span", { class: "count" }, formatCount(count))),
          " ",
        );
      }
      if (distinct > values.length) chips.append(make("span", { class: "soft" }, `and ${formatCount(distinct - values.length)} more`));
      return make("section", {}, make("h2", {}, key), chips);
    });
}

/** The conditions of a filter. @param {string} filter as JSON @returns {Record<string, unknown>} */
export function parseFilter(filter) {
  try {
    const parsed = JSON.parse(filter || "{}");
    return typeof parsed === "object" && parsed !== null ? parsed : {};
  } catch {
    // The service says what is wrong with it.
    return {};
  }
}

/** @param {unknown} value */
function shown(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}
