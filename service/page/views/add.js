// Pictures for the collection: choose them, name their folder, and see what became of each.

import { make, makeButton } from "../parts/elements.js";
import { filesOf, makeLeftOut, receiveFiles } from "../parts/files.js";
import { serviceInfo } from "../parts/header.js";
import { messageOf, showProblem } from "../parts/problem.js";
import { showToast } from "../parts/toast.js";
import { existing, forgetUpload, latestUpload, Upload } from "../parts/upload.js";
import { countPictures, formatBytes, formatCount } from "../parts/words.js";
import { addressOf, go, parseAddress } from "../router.js";

/** @typedef {import("../parts/files.js").Handed} Handed */

/** @type {import("../router.js").View} */
export async function openAdd({ place, signal, title }) {
  title("Add pictures");
  const { limits } = await serviceInfo();
  const content = make("div", { class: "add-content" });
  place.append(make("h1", {}, "Add pictures"), content);

  function showChoice() {
    forgetUpload();
    content.replaceChildren(makeChoice(take, limits));
  }

  /** @param {Handed} handed */
  function take(handed) {
    const upload = latestUpload();
    if (upload?.state === "running") {
      const text = "Wait until these pictures are added, or cancel; then hand over the next ones.";
      showProblem(/** @type {HTMLElement} */ (content.querySelector(".trouble")), new Error(text), null);
    } else if (handed.files.length) content.replaceChildren(makeReview(handed, signal, { start, back: showChoice }));
    else content.querySelector(".trouble")?.replaceChildren(make("p", { class: "error" }, "There is no picture among these files."), makeLeftOut(handed.leftOut) ?? "");
  }

  /** @param {import("../parts/upload.js").Wanted[]} wanted @param {number} skipped @param {import("../parts/upload.js").Failed[]} failed */
  function start(wanted, skipped, failed) {
    const upload = new Upload(wanted, skipped, limits);
    upload.failed.push(...failed);
    upload.total += failed.length;
    content.replaceChildren(makeProgress(upload, signal, showChoice));
    /** @type {HTMLElement | null} */ (content.querySelector("h2"))?.focus();
  }

  const upload = latestUpload();
  if (upload) content.replaceChildren(makeProgress(upload, signal, showChoice));
  else showChoice();
  receiveFiles(take, signal);
}

/** @param {(handed: Handed) => void} take @param {Record<string, number>} limits */
function makeChoice(take, limits) {
  const choose = (/** @type {boolean} */ isFolder) => {
    const input = make("input", { type: "file", multiple: true, hidden: true });
    input.webkitdirectory = isFolder;
    input.addEventListener("change", () => take(filesOf(input)));
    input.click();
  };
  return make(
    "div",
    { class: "drop-zone" },
    make("p", {}, "Drop pictures or a folder here"),
    make(
      "p",
      { class: "buttons" },
      makeButton("Choose files", () => choose(false), { class: "strong", id: "choose-files" }),
      makeButton("Choose a folder", () => choose(true), { id: "choose-folder" }),
    ),
    make("p", { class: "soft" }, `JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and HEIC, each of at most ${formatBytes(limits.max_image_bytes)}.`),
    make("div", { class: "trouble", role: "alert" }),
  );
}

/**
 * What was chosen, before it is sent.
 *
 * @param {Handed} handed
 * @param {AbortSignal} signal of the view
 * @param {{start: (wanted: import("../parts/upload.js").Wanted[], skipped: number, failed: import("../parts/upload.js").Failed[]) => void,
 *   back: () => void}} then
 */
function makeReview({ files, leftOut, folder }, signal, { start, back }) {
  const bytes = files.reduce((sum, { file }) => sum + file.size, 0);
  const field = make("input", { id: "add-folder", autocomplete: "off", placeholder: "none" });
  const example = make("p", { class: "soft example" });
  const showExample = () => {
    example.textContent = `The first one will be called ${idOf(field.value, files[0].path)}`;
  };
  field.addEventListener("input", showExample);
  showExample();
  const trouble = make("div", { class: "trouble", role: "alert" });
  const checking = make("p", { role: "status", class: "soft" });
  const add = make("button", { class: "strong", id: "add" }, `Add ${countPictures(files.length)}`);
  const form = make(
    "form",
    { class: "review" },
    make("h2", {}, `${countPictures(files.length)}${folder && ` in ${folder}`}, ${formatBytes(bytes)}`),
    makeLeftOut(leftOut),
    make("p", {}, make("label", { for: "add-folder" }, "Put them in the folder "), field),
    example,
    make("p", { class: "buttons" }, add, makeButton("Choose others", back)),
    checking,
    trouble,
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (checking.textContent) return;
    checking.textContent = "Looking which of these names are there already …";
    trouble.replaceChildren();
    try {
      const { wanted, failed } = wantedOf(files, field.value);
      const known = await existing(wanted.map(({ id }) => id), signal);
      const answer = known.size ? await askAboutExisting([...known]) : "replace";
      if (answer === "skip") start(wanted.filter(({ id }) => !known.has(id)), known.size, failed);
      else if (answer === "replace") start(wanted, 0, failed);
    } catch (error) {
      if (!signal.aborted) showProblem(trouble, error, () => form.requestSubmit());
    }
    checking.textContent = "";
  });
  return form;
}

/** The id of a file in a folder. @param {string} folder @param {string} path */
function idOf(folder, path) {
  const segments = [...folder.split("/").map((segment) => segment.trim()), ...path.split("/")].filter(Boolean);
  // The name of a file may hold halves of characters, which ids cannot.
  return new TextDecoder().decode(new TextEncoder().encode(segments.join("/"))).normalize("NFC");
}

/** Files with their ids. Of two with the same one, the second fails. @param {import("../parts/files.js").FoundFile[]} files @param {string} folder */
function wantedOf(files, folder) {
  /** @type {Map<string, import("../parts/upload.js").Wanted>} */
  const wanted = new Map();
  /** @type {import("../parts/upload.js").Failed[]} */
  const failed = [];
  for (const { path, file } of files) {
    const id = idOf(folder, path);
    if (wanted.has(id)) failed.push({ id, file, status: 409, reason: "Another of these files has the same name." });
    else wanted.set(id, { id, file });
  }
  return { wanted: [...wanted.values()], failed };
}

/**
 * Ask once what becomes of pictures whose names are there already.
 *
 * @param {string[]} ids
 * @returns {Promise<"replace" | "skip" | "">} "" if the visitor does neither
 */
function askAboutExisting(ids) {
  const text = ids.length === 1 ? "1 of these names is in the collection already" : `${formatCount(ids.length)} of these names are in the collection already`;
  /** @type {"replace" | "skip" | ""} */
  let answer = "";
  const choose = (/** @type {typeof answer} */ chosen) => () => {
    answer = chosen;
    dialog.close();
  };
  const dialog = make(
    "dialog",
    { id: "existing", "aria-labelledby": "existing-title" },
    make("h2", { id: "existing-title" }, text),
    make("details", { class: "soft left-out" }, make("summary", {}, "Show the names"), make("ul", {}, ...ids.map((id) => make("li", {}, id)))),
    make(
      "p",
      { class: "buttons" },
      makeButton("Skip them", choose("skip"), { class: "strong" }),
      makeButton("Replace them", choose("replace")),
      makeButton("Cancel", choose("")),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
  });
}

/**
 * An upload: how far it is, what failed, and what to do next.
 *
 * @param {Upload} upload
 * @param {AbortSignal} signal of the view
 * @param {() => void} more choose further pictures
 */
function makeProgress(upload, signal, more) {
  const heading = make("h2", { tabindex: "-1" });
  const bar = make("progress", { "aria-label": "Pictures added" });
  const line = make("p", { class: "figures" });
  const result = make("p", { role: "status" });
  const buttons = make("p", { class: "buttons" });
  const trouble = make("div", { class: "trouble", role: "alert" });
  const failures = make("ol", { class: "failures", "aria-label": "Not added" });
  const failuresTitle = make("h3", {});
  let shownState = "";
  /** @type {import("../parts/upload.js").Failed[]} */
  let shownFailures = [];
  let frame = 0;

  function show() {
    frame = 0;
    const { done, total, rate } = upload;
    bar.max = Math.max(1, total);
    bar.value = done;
    line.textContent = figuresOf(done, total, upload.state === "running" ? rate : 0);
    showFailures();
    const state = `${upload.state} ${upload.failed.length && upload.state !== "running"}`;
    if (state !== shownState) showState();
    shownState = state;
  }

  function showFailures() {
    failuresTitle.textContent = upload.failed.length ? `Not added: ${formatCount(upload.failed.length)}` : "";
    // Failures are only added to the list, or the list is another one after a further try.
    if (shownFailures !== upload.failed) failures.replaceChildren();
    shownFailures = upload.failed;
    for (const { id, reason } of upload.failed.slice(failures.childElementCount)) {
      failures.append(make("li", {}, make("span", { class: "file" }, id), make("span", { class: "error" }, messageOf(reason))));
    }
  }

  function showState() {
    const isRunning = upload.state === "running";
    bar.hidden = upload.state === "done";
    heading.textContent = isRunning ? `Adding ${countPictures(upload.total)}` : titleOf(upload);
    result.textContent = isRunning ? "" : resultOf(upload);
    const hadFocus = buttons.contains(document.activeElement) || trouble.contains(document.activeElement);
    if (upload.state === "stopped") showProblem(trouble, upload.trouble, goOn);
    else trouble.replaceChildren();
    buttons.replaceChildren(...(isRunning ? [makeButton("Cancel", () => upload.cancel(), { id: "cancel" })] : makeNext()));
    if (hadFocus) /** @type {HTMLElement | null} */ (buttons.querySelector("a, button"))?.focus();
  }

  function goOn() {
    // The button is gone.
    heading.focus();
    upload.resume();
  }

  function makeNext() {
    const large = upload.failed.filter(({ status, isShrunk }) => status === 413 && !isShrunk).length;
    const added = upload.added + upload.replaced;
    return [
      added > 0 && make("a", { class: "strong", href: addressOf("browse", { order: "-added" }) }, "Show them"),
      added > 0 && make("a", { class: "plain", href: addressOf("duplicates") }, "Find duplicates"),
      upload.queue.length > 0 && upload.state === "cancelled" && makeButton(`Go on with the other ${formatCount(upload.queue.length)}`, () => upload.resume()),
      large > 0 &&
        makeButton(large === 1 ? "Shrink and add the one that is too large" : `Shrink and add the ${formatCount(large)} that are too large`, () =>
          upload.retry(({ status }) => status === 413, true),
        ),
      upload.failed.length > 0 && makeButton("Try the failed ones again", () => upload.retry(() => true)),
      makeButton("Add more", more, { id: "add-more" }),
    ].filter((one) => one !== false);
  }

  const schedule = () => {
    frame ||= requestAnimationFrame(show);
  };
  upload.addEventListener("change", schedule);
  // The rate changes even while no picture is done.
  const timer = setInterval(schedule, 1000);
  signal.addEventListener("abort", () => {
    upload.removeEventListener("change", schedule);
    clearInterval(timer);
    cancelAnimationFrame(frame);
    if (upload.state === "running") upload.addEventListener("change", tellLater);
    // A result without failures need not be seen again.
    else if (upload.state === "done" && !upload.failed.length) forgetUpload();
  });
  // The visitor has gone to another view.
  function tellLater() {
    if (upload.state === "running") return;
    upload.removeEventListener("change", tellLater);
    if (parseAddress(location.hash).name !== "add") showToast(`${titleOf(upload)}: ${resultOf(upload)}`, "Show", () => go(addressOf("add")));
  }
  show();
  return make("div", { class: "uploading" }, heading, bar, line, result, trouble, buttons, failuresTitle, failures);
}

/** "120 of 2,000 · 35 per second · about 54 s left". @param {number} done @param {number} total @param {number} rate */
function figuresOf(done, total, rate) {
  const parts = [`${formatCount(done)} of ${formatCount(total)}`];
  if (rate > 0) {
    const left = (total - done) / rate;
    parts.push(`${rate < 10 ? rate.toFixed(1) : formatCount(Math.round(rate))} per second`);
    parts.push(left < 90 ? `about ${Math.ceil(left)} s left` : `about ${formatCount(Math.ceil(left / 60))} min left`);
  }
  return parts.join(" · ");
}

/** @param {Upload} upload */
function titleOf({ state, failed }) {
  if (state === "stopped") return "Stopped";
  if (state === "cancelled") return "Cancelled";
  return failed.length ? "Done, but not with all" : "Done";
}

/** @param {Upload} upload */
function resultOf({ added, replaced, skipped, failed, queue }) {
  /** @type {[number, string][]} */
  const counts = [
    [added, "added"],
    [replaced, "replaced"],
    [skipped, "skipped"],
    [failed.length, "not added"],
    [queue.length, "not sent"],
  ];
  const told = counts.filter(([count]) => count).map(([count, text]) => `${formatCount(count)} ${text}`);
  return told.length ? `${told.join(", ")}.` : "Nothing was added.";
}
