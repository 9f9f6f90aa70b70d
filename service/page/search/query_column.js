// A query, large, with what can be done with it.

import { previewOf, thumbnailOf } from "../api.js";
import { addressOf, go } from "../router.js";
import { formatPart, makeCrop, parsePart } from "./crop.js";
import { make } from "../parts/elements.js";
import { makePicture } from "../parts/tile.js";

/** @typedef {import("./query.js").Query} Query */

/**
 * Show the query of a search.
 *
 * @param {{query: Query, crop: string, plus: string}} tab
 * @param {{readsWords: boolean, addressWith: (changes: Record<string, string>) => string, signal: AbortSignal}} options
 *   readsWords says whether words may be added to a picture; the signal is the view's
 */
export function makeQueryColumn({ query, crop, plus }, { readsWords, addressWith, signal }) {
  const column = make("div", { class: "query" });
  const buttons = make("p", { class: "buttons" });
  if (!query.text) {
    const { sheet, buttons: cropButtons } = makeCrop(makeQueryPicture(query, signal), parsePart(crop), (part) => {
      go(addressWith({ crop: part ? formatPart(part) : "", k: "", all: "" }));
    });
    column.append(sheet);
    buttons.append(...cropButtons);
  }
  if (query.id) {
    buttons.append(
      make("a", { class: "plain", href: addressOf("picture", { id: query.id }) }, "Open the picture"),
      make("a", { class: "plain", href: addressOf("map", { id: query.id }) }, "Show on the map"),
    );
  }
  if (query.text) buttons.append(make("a", { class: "plain", href: addressOf("map", { text: query.text }) }, "Show on the map"));
  const heading = query.text ? query.name : `${crop ? "Like a part of" : "Looks like"} ${query.name}`;
  column.append(make("h1", {}, heading, plus && ` and “${plus}”`), make("p", { class: "note soft" }), buttons);
  if (!query.text && readsWords) column.append(makePlus(plus, (words) => go(addressWith({ plus: words, k: "", all: "" }))));
  return column;
}

/** @param {Query} query @param {AbortSignal} signal */
function makeQueryPicture({ id, file, name }, signal) {
  const item = { id: id ?? "", metadata: {} };
  const source = file ? URL.createObjectURL(file) : previewOf(item, 1024);
  if (file) signal.addEventListener("abort", () => URL.revokeObjectURL(source));
  const picture = makePicture(source, file ? "" : thumbnailOf(item));
  picture.loading = "eager";
  picture.alt = name;
  picture.classList.add("query-picture");
  return picture;
}

/** A field for words that are added to the picture. @param {string} plus @param {(words: string) => void} search */
function makePlus(plus, search) {
  const field = make("input", { id: "plus", value: plus, autocomplete: "off", placeholder: "for example: at night" });
  const form = make("form", { class: "plus" }, make("label", { for: "plus" }, "and …"), field, make("button", { class: "plain" }, "Search"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    search(field.value.trim());
  });
  return form;
}
