// The answer to a query: its picture and its lookalikes.

import { showPicture } from "./api.js";
import { keepPixels, makeTile } from "./tile.js";
import { countPictures } from "./words.js";

const section = document.querySelector("#answer");
const picture = document.querySelector("#query-picture");
const title = document.querySelector("#answer-title");
const status = document.querySelector("#status");
const failure = document.querySelector("#error");
const list = document.querySelector("#hits");

keepPixels(picture);
picture.addEventListener("load", () => picture.classList.remove("broken"));
picture.addEventListener("error", () => picture.classList.add("broken"));

/** Show a query that is under way, by its name and the address of its picture, "" for none. */
export function showQuery(name, address) {
  section.hidden = false;
  section.setAttribute("aria-busy", "true");
  title.textContent = `Most like ${name}`;
  picture.parentElement.hidden = !address;
  if (address) showPicture(picture, address);
  status.textContent = "Searching …";
  failure.textContent = "";
}

/** Show the hits, best first. */
export function showHits(hits, onClick) {
  section.setAttribute("aria-busy", "false");
  list.replaceChildren(...hits.map((hit) => makeTile(hit, onClick)));
  status.textContent = hits.length
    ? `${countPictures(hits.length)}, the most alike first`
    : "There is no other picture in the gallery to compare it with.";
}

/** Show an error in place of hits. */
export function showFailure(name, error) {
  section.setAttribute("aria-busy", "false");
  list.replaceChildren();
  title.textContent = `Cannot search by ${name}`;
  status.textContent = "";
  failure.textContent = error.message;
}

/** Hide the answer. */
export function hideAnswer() {
  section.hidden = true;
}

/** Move the focus to the answer, since the clicked button is gone. */
export function focusAnswer() {
  title.focus({ preventScroll: true });
}
