// A short message at the edge of the page, with an action such as Undo.

import { find, make, makeButton } from "./elements.js";

const LASTS_MS = 10_000;

/**
 * Show a message for some seconds, and longer while it has the pointer or the focus.
 *
 * @param {string} text
 * @param {string} [action] the button's text
 * @param {() => void | Promise<void>} [act]
 */
export function showToast(text, action = "", act = () => {}) {
  const toast = make("div", { class: "toast" }, make("span", {}, text));
  const close = () => toast.remove();
  if (action) {
    toast.append(
      makeButton(action, () => {
        close();
        void act();
      }),
    );
  }
  toast.append(makeButton("×", close, { class: "plain close", "aria-label": "Close this message" }));
  let timer = setTimeout(close, LASTS_MS);
  for (const event of ["pointerenter", "focusin"]) toast.addEventListener(event, () => clearTimeout(timer));
  for (const event of ["pointerleave", "focusout"]) {
    toast.addEventListener(event, () => {
      clearTimeout(timer);
      timer = setTimeout(close, LASTS_MS);
    });
  }
  find("#toasts").append(toast);
}
