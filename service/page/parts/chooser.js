// Ways to hand over pictures anywhere on the page: choose files, drop files or folders, paste.

import { addressOf, go } from "../router.js";
import { find, make, makeButton } from "./elements.js";
import { deliver, filesIn, filesOf, leaveFiles, makeLeftOut } from "./files.js";
import { keepFiles } from "./kept.js";
import { messageOf } from "./problem.js";
import { showToast } from "./toast.js";
import { countPictures } from "./words.js";

// More queries at once than these are not meant as queries.
const MOST_QUERIES = 200;

/** @typedef {import("./files.js").Handed} Handed */

/** Take the files that the visitor hands over as queries, or for the collection. */
export function watchForFiles() {
  const input = /** @type {HTMLInputElement} */ (find("#ask-files"));
  input.addEventListener("change", () => {
    const handed = filesOf(input);
    // Choosing the same file again must fire another change event.
    input.value = "";
    if (handed.files.length > MOST_QUERIES) choose(handed);
    else if (handed.files.length) void searchBy(handed);
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
    void take(filesIn(event.dataTransfer), "That was not a file. Save the picture first, then drop its file here.");
  });
  window.addEventListener("paste", (event) => {
    if (takesWords(event, event.clipboardData)) return;
    void take(filesIn(event.clipboardData), "The clipboard holds no picture. Copy one first, then paste it here.");
  });
}

/** Let the visitor choose pictures to search by. */
export function choosePictures() {
  find("#ask-files").click();
}

/** @param {Promise<Handed>} reading @param {string} otherwise said if there is no file */
async function take(reading, otherwise) {
  try {
    const handed = await reading;
    const { files, leftOut, folder } = handed;
    if (!files.length && folder) showToast(`There is no picture in ${folder}, but ${leftOut.length} other files.`);
    else if (!files.length) showToast(otherwise);
    else if (deliver(handed)) return;
    else if (files.length > 1 || folder) choose(handed);
    else {
      await searchBy(handed);
      showToast(`Searching by ${files[0].path || "your picture"}.`, "Add it instead", () => addTo(handed));
    }
  } catch (error) {
    showToast(`The files cannot be read. ${messageOf(error)}`);
  }
}

/** @param {Handed} handed */
async function searchBy({ files }) {
  try {
    go(addressOf("search", { kept: await keepFiles(files.map(({ path, file }) => ({ name: path, blob: file }))) }));
  } catch (error) {
    showToast(`The browser cannot keep these pictures, so they cannot be searched by. ${messageOf(error)}`);
  }
}

/** @param {Handed} handed */
function addTo(handed) {
  leaveFiles(handed);
  go(addressOf("add"));
}

/** Ask what the pictures are for. @param {Handed} handed */
function choose(handed) {
  const { files, leftOut, folder } = handed;
  const isMany = files.length > MOST_QUERIES;
  const title = countPictures(files.length) + (folder && ` in ${folder}`);
  const close = (/** @type {() => void} */ then) => () => {
    dialog.close();
    then();
  };
  const dialog = make(
    "dialog",
    { id: "handed", "aria-labelledby": "handed-title" },
    make("h2", { id: "handed-title" }, title),
    makeLeftOut(leftOut),
    isMany && make("p", { class: "soft" }, `You can search by at most ${MOST_QUERIES} pictures at once.`),
    make(
      "p",
      { class: "buttons" },
      !isMany && makeButton("Search by these", close(() => void searchBy(handed)), { class: "strong" }),
      makeButton("Add to the collection", close(() => addTo(handed)), { class: isMany ? "strong" : "plain" }),
      makeButton("Cancel", close(() => {})),
    ),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
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
