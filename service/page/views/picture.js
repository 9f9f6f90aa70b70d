// One picture, large, with what is known of it and what looks like it.

import { askJson, contentOf, getItem, listItems, previewOf, thumbnailOf } from "../api.js";
import { make, makeButton } from "../parts/elements.js";
import { editMetadata } from "../parts/metadata.js";
import { messageOf } from "../parts/problem.js";
import { removeItems } from "../parts/removal.js";
import { makePicture, makeTile } from "../parts/tile.js";
import { showToast } from "../parts/toast.js";
import { fileName, folderName, formatBytes, formatCount, formatDate } from "../parts/words.js";
import { makeZoom } from "../parts/zoom.js";
import { addressOf, go, replace } from "../router.js";
import { listedOf } from "./browse.js";

const STRIP = 12;

/** @type {import("../router.js").View} */
export async function openPicture({ params, place, signal, title }) {
  const id = params.get("id") ?? "";
  const [item, found] = await Promise.all([
    getItem(id, signal),
    askJson("search", { id, k: STRIP, include: ["metadata", "digest"] }, { signal }),
  ]);
  title(fileName(id));
  const picture = makePicture(previewOf(item, 1024), thumbnailOf(item));
  picture.loading = "eager";
  picture.alt = fileName(id);
  const frame = make("div", { class: "stage", tabindex: "0", role: "group", "aria-label": "Picture. Plus and minus zoom, arrows move it once it is zoomed" }, picture);
  const zoom = makeZoom([frame], signal);
  const back = () => (history.length > 1 ? history.back() : go(addressOf("browse")));
  const neighbours = makeNeighbours(id, params, signal);

  place.append(
    make(
      "div",
      { class: "picture-columns" },
      make("div", { class: "picture-large" }, frame, make("p", { class: "buttons" }, ...neighbours.links, ...zoom.buttons)),
      make(
        "div",
        { class: "picture-facts" },
        make("h1", {}, fileName(id)),
        makeFacts(item),
        editMetadata(item),
        make(
          "p",
          { class: "buttons" },
          make("a", { class: "strong", href: addressOf("search", { id }) }, "Search by this"),
          make("a", { class: "plain", href: contentOf(id), target: "_blank", rel: "noopener" }, "Open"),
          make("a", { class: "plain", href: contentOf(id), download: fileName(id) }, "Download"),
          makeButton("Copy path", () => void copyPath(item)),
          make("a", { class: "plain", href: addressOf("map", { id }) }, "On the map"),
          makeButton("Remove from the index", () => void removeItem(item, back), { id: "remove" }),
        ),
      ),
    ),
    makeStrip(found.hits),
  );
  window.addEventListener(
    "keydown",
    (event) => {
      const target = /** @type {HTMLElement} */ (event.target);
      if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (target.closest("input, textarea, select, dialog") || zoom.isZoomed()) return;
      if (event.key === "Escape") back();
      else if (event.key === "ArrowLeft") neighbours.open(-1);
      else if (event.key === "ArrowRight") neighbours.open(1);
    },
    { signal },
  );
}

/** @param {import("../api.js").Item} item */
function makeFacts(item) {
  const { file } = item;
  const folder = folderName(item.id);
  /** @type {[string, string | Node][]} */
  const facts = [];
  if (folder) facts.push(["Folder", make("a", { href: addressOf("browse", { folder: `${folder}/` }) }, folder)]);
  if (item.source) facts.push(["Path", item.source]);
  if (file?.width && file.height) facts.push(["Pixels", `${formatCount(file.width)} × ${formatCount(file.height)}`]);
  if (file?.size_bytes) facts.push(["File", [formatBytes(file.size_bytes), file.format].filter(Boolean).join(", ")]);
  if (file?.date) facts.push(["Date", formatDate(file.date)]);
  const list = make("dl", { class: "facts" });
  for (const [term, value] of facts) list.append(make("dt", {}, term), make("dd", {}, value));
  return list;
}

/** @param {import("../api.js").Hit[]} hits */
function makeStrip(hits) {
  if (!hits.length) return make("p", { class: "soft" }, "There is no other picture to compare it with.");
  const list = make("ol", { class: "strip", role: "list" });
  for (const hit of hits) list.append(make("li", {}, makeTile(hit)));
  return make("section", { class: "alike" }, make("h2", {}, "Looks like this"), list);
}

/**
 * Links to the items before and after one, where it was opened from a listing.
 *
 * @param {string} id
 * @param {URLSearchParams} params of the address: the listing's, and the item's place in it as `at`
 * @param {AbortSignal} signal
 */
function makeNeighbours(id, params, signal) {
  const links = [make("a", { class: "plain", id: "earlier" }, "← Previous"), make("a", { class: "plain", id: "later" }, "Next →")];
  const at = Number(params.get("at") ?? "-1");
  if (!(at >= 0)) return { links: [], open: () => {} };
  const find = async () => {
    const first = Math.max(0, at - 1);
    const { items } = await listItems({ ...listedOf(params), offset: first, limit: at - first + 2 }, signal);
    // The listing may have changed meanwhile.
    if (items[at - first]?.id !== id) return;
    for (const [link, step] of /** @type {const} */ ([[links[0], -1], [links[1], 1]])) {
      const other = items[at - first + step];
      if (!other) continue;
      const address = addressOf("picture", { ...Object.fromEntries(params), id: other.id, at: at + step });
      link.href = address;
      link.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        replace(address);
      });
    }
  };
  // Without neighbours the picture is there all the same.
  find().catch(() => {});
  const open = (/** @type {-1 | 1} */ step) => {
    const link = links[step === -1 ? 0 : 1];
    if (link.href) link.click();
  };
  return { links, open };
}

/** @param {import("../api.js").Item} item */
async function copyPath(item) {
  const path = item.source || item.id;
  try {
    await navigator.clipboard.writeText(path);
    showToast("The path is in the clipboard.");
  } catch {
    // Browsers keep the clipboard from pages that came without encryption.
    window.prompt("Copy the path:", path);
  }
}

/**
 * Remove an item, with a way to undo it.
 *
 * @param {import("../api.js").Item} item
 * @param {() => void} then
 */
async function removeItem(item, then) {
  try {
    const { failed, restore } = await removeItems([item.id]);
    if (failed.length) throw new Error(failed[0].reason);
    showToast(`${fileName(item.id)} is no longer in the index. Its file is untouched.`, "Undo", async () => {
      const again = await restore();
      showToast(again.failed.length ? again.failed[0].reason : `${fileName(item.id)} is in the index again.`);
    });
    then();
  } catch (error) {
    showToast(messageOf(error));
  }
}
