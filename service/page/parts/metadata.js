// An item's metadata as a table that can be edited.

import { askJson, pathOf } from "../api.js";
import { make, makeButton } from "./elements.js";
import { messageOf } from "./problem.js";

/**
 * Show an item's metadata, and change them on the visitor's word.
 *
 * @param {import("../api.js").Item} item
 */
export function editMetadata(item) {
  const section = make("section", { class: "metadata-editor", "aria-label": "Metadata" });
  let metadata = item.metadata;

  function show() {
    const list = make("dl", { class: "facts" });
    for (const [key, value] of Object.entries(metadata)) list.append(make("dt", {}, key), make("dd", {}, textOf(value)));
    const edit = makeButton(Object.keys(metadata).length ? "Edit metadata" : "Add metadata", openForm, { id: "edit-metadata" });
    section.replaceChildren(list, edit);
  }

  function openForm() {
    const rows = make("div", { class: "rows" });
    const addRow = (/** @type {string} */ key, /** @type {string} */ value) => {
      const row = make(
        "p",
        {},
        make("input", { class: "key", "aria-label": "Name", value: key, placeholder: "name" }),
        make("input", { class: "value", "aria-label": `Value of ${key || "the new field"}`, value, placeholder: "value" }),
        makeButton("Remove", () => row.remove(), { "aria-label": `Remove ${key || "this field"}` }),
      );
      rows.append(row);
      return row;
    };
    for (const [key, value] of Object.entries(metadata)) addRow(key, textOf(value));
    const trouble = make("p", { class: "error", role: "alert" });
    const form = make(
      "form",
      {},
      rows,
      make(
        "p",
        { class: "buttons" },
        makeButton("Add a field", () => addRow("", "").querySelector("input")?.focus()),
        make("button", { class: "strong" }, "Save"),
        makeButton("Cancel", close),
      ),
      make("p", { class: "soft" }, "Numbers, true, false, null, [lists] and {objects} are read as JSON; everything else is text."),
      trouble,
    );
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      /** @type {Record<string, unknown>} */
      const wanted = {};
      for (const row of rows.children) {
        const [key, value] = [...row.querySelectorAll("input")].map((field) => field.value);
        // What was not touched keeps its type: a text of digits stays a text.
        const isSame = key in metadata && textOf(metadata[key]) === value;
        if (key.trim()) wanted[key.trim()] = isSame ? metadata[key] : valueOf(value);
      }
      /** @type {Record<string, unknown>} */
      const patch = { ...wanted };
      for (const key of Object.keys(metadata)) if (!(key in wanted)) patch[key] = null;
      try {
        metadata = (await askJson(pathOf(item.id), { metadata: patch }, { method: "PATCH" })).metadata;
        close();
      } catch (error) {
        trouble.textContent = messageOf(error);
      }
    });
    section.replaceChildren(form);
    if (!rows.childElementCount) addRow("", "");
    rows.querySelector("input")?.focus();
  }

  function close() {
    show();
    section.querySelector("button")?.focus();
  }

  show();
  return section;
}

/** @param {unknown} value */
function textOf(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** @param {string} text @returns {unknown} */
function valueOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
