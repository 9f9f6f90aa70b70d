// Ways to hand over pictures anywhere on the page: choose files, drop files or folders, paste.

import { addressOf, go } from "../router.js";
import { find } from "./elements.js";
import { keepFiles } from "./kept.js";
import { showToast } from "./toast.js";

/** Search by whatever files the visitor hands over. */
export function watchForFiles() {
  const input = /** @type {HTMLInputElement} */ (find("#ask-files"));
  input.addEventListener("change", () => {
    void take([...(input.files ?? [])], "");
    // Choosing the same file again must fire another change event.
    input.value = "";
  });
  window.addEventListener("dragover", (event) => {
    if (takesWords(event, event.dataTransfer)) return;
    // The browser would otherwise replace the page by the file.
    event.preventDefault();
    document.body.classList.toggle("dropping", event.dataTransfer?.types.includes("Files"));
  });
  window.addEventListener("dragleave", (event) => {
    // A related target of null means that the pointer left the window.
    if (event.relatedTarget === null) document.body.classList.remove("dropping");
  });
  window.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (takesWords(event, event.dataTransfer)) return;
    event.preventDefault();
    const files = [...(event.dataTransfer?.files ?? [])];
    void take(files, "That was not a file. Save the picture first, then drop its file here.");
  });
  window.addEventListener("paste", (event) => {
    if (takesWords(event, event.clipboardData)) return;
    const files = [...(event.clipboardData?.files ?? [])];
    void take(files, "The clipboard holds no picture. Copy one first, then paste it here.");
  });
}

/** @param {File[]} files @param {string} otherwise said if there are none */
async function take(files, otherwise) {
  if (files.length) go(addressOf("search", { kept: await keepFiles(files) }));
  else if (otherwise) showToast(otherwise);
}

/**
 * Whether words, and no file, are pasted into a field, dropped on it or dragged over it.
 *
 * @param {Event} event
 * @param {DataTransfer | null} transfer
 */
function takesWords(event, transfer) {
  return event.target instanceof HTMLInputElement && !transfer?.types.includes("Files");
}
