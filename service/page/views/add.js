import { make } from "../parts/elements.js";

/** @type {import("../router.js").View} */
export function openAdd({ place, title }) {
  title("Add");
  place.append(make("h1", {}, "Add"));
}
