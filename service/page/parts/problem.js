// An error on the page: what happened, why, and one action.

import { ApiError } from "../api.js";
import { make, makeButton } from "./elements.js";

/**
 * Show an error in place of what `place` holds.
 *
 * @param {HTMLElement} place
 * @param {unknown} error
 * @param {(() => void) | null} retry
 * @param {{text: string, act: () => void} | null} [instead] an action in place of the usual one
 */
export function showProblem(place, error, retry, instead = null) {
  const again = () => {
    place.replaceChildren();
    retry?.();
  };
  // A request that has no key asks for one by itself.
  const isKey = error instanceof ApiError && error.status === 401;
  const action = instead
    ? makeButton(instead.text, instead.act)
    : retry && makeButton(isKey ? "Enter an API key" : "Try again", again);
  place.replaceChildren(make("div", { class: "problem" }, make("p", { class: "error" }, messageOf(error)), action));
}

/** The message of whatever was thrown. @param {unknown} error */
export function messageOf(error) {
  const text = error instanceof Error ? error.message : String(error);
  return text.charAt(0).toUpperCase() + text.slice(1);
}
