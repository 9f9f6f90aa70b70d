import { make } from "../parts/elements.js";

/** @type {import("../router.js").View} */
export function openMap({ place, title }) {
  title("Map");
  place.append(make("h1", {}, "Map"));
}
