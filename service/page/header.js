// The header: how many pictures, which encoder, and the notice where the two do not suit each other.

import { countPictures, withCode } from "./words.js";

const facts = document.querySelector("#facts");
const notice = document.querySelector("#notice");

/** Show what GET /info says. */
export function showInfo(info) {
  facts.textContent = `${countPictures(info.count)} · encoder ${info.model}`;
  notice.hidden = info.notice === null;
  notice.replaceChildren(...withCode(info.notice ?? ""));
}

/** Show why there is nothing to show. */
export function showInfoError(error) {
  facts.textContent = error.message;
}
