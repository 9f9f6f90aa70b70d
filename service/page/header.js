// The header: the number of pictures, the encoder, and a notice when the two do not suit each other.

import { countPictures, withCode } from "./words.js";

const facts = document.querySelector("#facts");
const notice = document.querySelector("#notice");

/** Show the answer of GET /info. */
export function showInfo(info) {
  facts.textContent = `${countPictures(info.count)} · encoder ${info.model}`;
  notice.hidden = info.notice === null;
  notice.replaceChildren(...withCode(info.notice ?? ""));
}

/** Show the error of GET /info. */
export function showInfoError(error) {
  facts.textContent = error.message;
}
