// The dialog that asks for an API key.

import { make, makeButton } from "./elements.js";

/** @type {Promise<string> | null} */
let asking = null;

/**
 * Ask the visitor for an API key, once however many requests want it.
 *
 * @param {boolean} wasWrong whether the service refused an earlier one
 * @returns {Promise<string>} the key; "" if the visitor gives none
 */
export function askForKey(wasWrong) {
  asking ??= openDialog(wasWrong).finally(() => {
    asking = null;
  });
  return asking;
}

/** @param {boolean} wasWrong @returns {Promise<string>} */
function openDialog(wasWrong) {
  const field = make("input", { type: "password", id: "key-field", autocomplete: "off", required: true });
  const form = make(
    "form",
    { method: "dialog" },
    make("h2", {}, "This service asks for an API key"),
    wasWrong && make("p", { class: "error", role: "alert" }, "The service does not know that key."),
    make("label", { for: "key-field" }, "API key"),
    field,
    make(
      "p",
      { class: "buttons" },
      makeButton("Cancel", () => dialog.close()),
      make("button", { class: "strong" }, "Use this key"),
    ),
  );
  const dialog = make("dialog", { id: "key-dialog", "aria-label": "API key" }, form);
  let key = "";
  form.addEventListener("submit", () => {
    key = field.value.trim();
  });
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(key);
    });
  });
}
