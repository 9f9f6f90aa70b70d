import { make } from "../parts/elements.js";

/** @type {import("../router.js").View} */
export function openSearch({ place, title }) {
  title("Search");
  place.append(make("h1", {}, "Search"));
}
