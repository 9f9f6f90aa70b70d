// A picture of the gallery as a button.

import { showPicture, thumbnailOf } from "./api.js";
import { describe, formatScore } from "./words.js";

// Pictures up to this side in px are enlarged without blur.
const SMALL = 64;

/**
 * A list item with one button that shows an item, or a hit with its score.
 *
 * @param item {id, metadata} or {id, metadata, score}. Users wrote its texts, so they enter the page as text only.
 * @param onClick called with the item.
 */
export function makeTile(item, onClick) {
  const button = make("button", "tile");
  button.type = "button";
  button.title = item.id;
  button.addEventListener("click", () => onClick(item));

  const frame = make("span", "frame");
  const picture = document.createElement("img");
  picture.alt = "";
  picture.loading = "lazy";
  picture.draggable = false;
  keepPixels(picture);
  showPicture(picture, thumbnailOf(item.id));
  frame.append(picture);
  button.append(frame);

  if (item.score !== undefined) {
    const bar = make("span", "bar");
    bar.style.setProperty("--share", Math.max(0, item.score));
    button.append(make("span", "score", formatScore(item.score)), bar);
  }
  button.append(make("span", "id", item.id));
  const words = describe(item.metadata);
  if (words) button.append(make("span", "metadata", words));

  const entry = document.createElement("li");
  entry.append(button);
  return entry;
}

/** Enlarge small pictures without blur. */
export function keepPixels(picture) {
  picture.addEventListener("load", () => {
    picture.classList.toggle("pixelated", Math.max(picture.naturalWidth, picture.naturalHeight) <= SMALL);
  });
}

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}
