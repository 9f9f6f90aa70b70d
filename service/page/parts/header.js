// The header: the search field, and a notice when encoder and gallery do not suit each other.

import { getInfo } from "../api.js";
import { addressOf, go, parseAddress } from "../router.js";
import { find } from "./elements.js";
import { countKnown } from "./groups.js";
import { formatCount, withCode } from "./words.js";

/** @type {Promise<import("../api.js").Info> | null} */
let asked = null;

/** The facts about the service, asked for once and again after a failure. @returns {Promise<import("../api.js").Info>} */
export function serviceInfo() {
  asked ??= getInfo().catch((error) => {
    asked = null;
    throw error;
  });
  return asked;
}

/** Ask for the facts again, for example once the number of pictures has changed. */
export function refreshInfo() {
  asked = null;
  return serviceInfo();
}

/** Show what the service is, and search by what is typed. Where the encoder reads no words, they are names of files. */
export async function startHeader() {
  const form = find("#ask");
  const field = /** @type {HTMLInputElement} */ (find("#ask-field"));
  let readsWords = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (text) go(readsWords ? addressOf("search", { text }) : addressOf("browse", { name: text }));
  });
  const fill = () => {
    const { name, params } = parseAddress(location.hash);
    const asks = (readsWords && name === "search" && params.get("text")) || (!readsWords && name === "browse" && params.get("name"));
    field.value = asks || "";
  };
  window.addEventListener("popstate", fill);
  const info = await serviceInfo().catch(() => null);
  if (!info) return;
  if (info.queries.includes("text")) {
    readsWords = true;
    field.placeholder = "Describe a picture";
    field.setAttribute("aria-label", "Words to search by");
    field.maxLength = info.limits.max_text_characters;
  }
  fill();
  const notice = find("#notice");
  notice.hidden = info.notice === null;
  notice.replaceChildren(...withCode(info.notice ?? ""));
  // A store that is not in a folder has no groups.
  showDuplicates(await countKnown().catch(() => null));
}

/** Show beside "Duplicates" how many groups of exact copies there are. @param {number | null} groups null if unknown */
export function showDuplicates(groups) {
  const count = find("#duplicates-count");
  count.hidden = !groups;
  count.textContent = groups ? formatCount(groups) : "";
}
