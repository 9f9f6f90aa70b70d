// An item as a link with its thumbnail.

import { previewOf, showPicture, thumbnailOf } from "../api.js";
import { addressOf } from "../router.js";
import { make } from "./elements.js";
import { describe, fileName, folderName, formatScore } from "./words.js";

// Pictures up to this side in px are enlarged without blur.
const SMALL = 64;

/**
 * Make the link of an item, which opens its picture. File name first, folder second.
 *
 * @param {import("../api.js").Item} item Users wrote its texts, so they enter the page as text only.
 * @param {{isLarge?: boolean, address?: string}} [options] isLarge shows 512 px in place of the thumbnail's 128
 */
export function makeTile(item, { isLarge = false, address = addressOf("picture", { id: item.id }) } = {}) {
  const folder = folderName(item.id);
  const words = describe(item.metadata);
  const link = make(
    "a",
    { class: "tile", href: address, title: item.id, draggable: "false" },
    make("span", { class: "frame" }, makePicture(isLarge ? previewOf(item, 512) : thumbnailOf(item), thumbnailOf(item))),
    item.score !== undefined && make("span", { class: "score" }, formatScore(item.score)),
    make("span", { class: "file" }, fileName(item.id)),
    folder && make("span", { class: "folder" }, make("bdi", {}, folder)),
    words && make("span", { class: "metadata" }, words),
  );
  return link;
}

/**
 * Make an <img> of the API. It says nothing to screen readers: the name stands beside it.
 *
 * @param {string} address
 * @param {...string} others the addresses of others, where the earlier ones cannot be had
 */
export function makePicture(address, ...others) {
  const picture = make("img", { alt: "", loading: "lazy", decoding: "async", draggable: "false" });
  picture.addEventListener("load", () => {
    picture.classList.toggle("pixelated", Math.max(picture.naturalWidth, picture.naturalHeight) <= SMALL);
  });
  picture.addEventListener("error", () => {
    const other = others.shift();
    if (other) void showPicture(picture, other);
    else picture.classList.add("broken");
  });
  void showPicture(picture, address);
  return picture;
}
