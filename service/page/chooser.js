// Three ways to hand over a picture: choose a file, drop one anywhere, paste one.

import { takesWords } from "./field.js";

const input = document.querySelector("#file");
const failure = document.querySelector("#file-error");

/** Call onPicture(file) for every file handed over. */
export function watchForPictures(onPicture) {
  input.addEventListener("change", () => {
    take(input.files, "");
    // Choosing the same file again must fire another change event.
    input.value = "";
  });

  window.addEventListener("dragover", (event) => {
    if (takesWords(event, event.dataTransfer)) return;
    // The browser would otherwise replace the page by the file.
    event.preventDefault();
    document.body.classList.toggle("dropping", event.dataTransfer.types.includes("Files"));
  });
  window.addEventListener("dragleave", (event) => {
    // A related target of null means that the pointer left the window.
    if (event.relatedTarget === null) document.body.classList.remove("dropping");
  });
  window.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (takesWords(event, event.dataTransfer)) return;
    event.preventDefault();
    take(event.dataTransfer.files, "That was not a file. Save the picture first, then drop its file here.");
  });

  window.addEventListener("paste", (event) => {
    if (takesWords(event, event.clipboardData)) return;
    take(event.clipboardData.files, "The clipboard holds no picture. Copy one first, then paste it here.");
  });

  function take(files, otherwise) {
    failure.textContent = files.length ? "" : otherwise;
    if (files.length) onPicture(files[0]);
  }
}
