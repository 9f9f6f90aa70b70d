// The view before any query: the gallery's pictures, page by page.

import { listItems } from "./api.js";
import { makeTile } from "./tile.js";
import { withCode } from "./words.js";

const PAGE = 48;
const EMPTY =
  "Add a folder of them with `lookalike index FOLDER --store DIR` before the service starts, or send one at a " +
  "time with `PUT /images/ID` while it runs; then load this page again.";

const CHOOSE = "Choose one to see what looks like it.";
const DEMO = " These are scanned digits; `make serve IMAGES=folder` shows your own photographs.";

const section = document.querySelector("#gallery");
const title = document.querySelector("#gallery-title");
const words = document.querySelector("#gallery-words");
const failure = document.querySelector("#gallery-error");
const list = document.querySelector("#items");
const more = document.querySelector("#more");

/**
 * Fill the gallery with its first page.
 *
 * @param onClick called with the clicked item.
 * @returns the first item, or undefined if there is none.
 */
export async function fillGallery(onClick) {
  let cursor = null;

  async function addPage() {
    more.disabled = true;
    failure.textContent = "";
    try {
      const page = await listItems(PAGE, cursor);
      list.append(...page.items.map((item) => makeTile(item, onClick)));
      cursor = page.next;
      more.hidden = cursor === null;
      return page.items;
    } catch (error) {
      failure.textContent = error.message;
      return null;
    } finally {
      more.disabled = false;
    }
  }

  more.addEventListener("click", addPage);
  const items = await addPage();
  if (items === null) return undefined;
  title.textContent = items.length ? "Pictures to start from" : "No pictures yet";
  words.replaceChildren(...withCode(items.length ? CHOOSE + (items[0].id.startsWith("digits/") ? DEMO : "") : EMPTY));
  return items[0];
}

/** Show or hide the gallery. */
export function toggleGallery(shown) {
  section.hidden = !shown;
}
