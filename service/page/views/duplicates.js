import { make } from "../parts/elements.js";

/** @type {import("../router.js").View} */
export function openDuplicates({ place, title }) {
  title("Duplicates");
  place.append(make("h1", {}, "Duplicates"));
}
