// Elements of the document, made in one call.

/**
 * Make an element. Attributes that are false, null or undefined are left out; texts enter as texts only.
 *
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, string | number | boolean | null | undefined>} [attributes]
 * @param {...(Node | string | null | undefined | false)} content
 * @returns {HTMLElementTagNameMap[T]}
 */
export function make(tag, attributes = {}, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...content.filter((one) => one !== null && one !== undefined && one !== false));
  return element;
}

/**
 * Make a button.
 *
 * @param {string} text
 * @param {(event: MouseEvent) => void} onClick
 * @param {Record<string, string | boolean>} [attributes]
 */
export function makeButton(text, onClick, attributes = {}) {
  const button = make("button", { type: "button", class: "plain", ...attributes }, text);
  button.addEventListener("click", onClick);
  return button;
}

/**
 * Return the one element of the document that a selector names.
 *
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} selector
 * @returns {T}
 */
export function find(selector) {
  return /** @type {T} */ (document.querySelector(selector));
}
