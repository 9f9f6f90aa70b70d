// All items as points in the plane, those that are alike together.

import { ask, askJson, thumbnailOf } from "../api.js";
import { make, makeButton } from "../parts/elements.js";
import { readPalette } from "../map/palette.js";
import { makePoints } from "../map/points.js";
import { messageOf, showProblem } from "../parts/problem.js";
import { makeRoving } from "../parts/roving.js";
import { makeScatter } from "../map/scatter.js";
import { makeStage } from "../map/stage.js";
import { makePicture } from "../parts/tile.js";
import { showToast } from "../parts/toast.js";
import { countPictures, fileName, folderName, formatCount, withCode } from "../parts/words.js";
import { addressOf, go, rename } from "../router.js";

// Lookalikes of the query that are marked.
const HITS = 24;
// Pictures stand in for points where so few of them are in sight.
const MOST_PICTURES = 200;
// Links beside the map.
const MOST_LINKS = 200;
// A pointer means the nearest point up to so many px away.
const REACH = 14;
// A better map is asked for every so many ms.
const PAUSE = 1500;

/**
 * @typedef {object} MapAnswer
 * @property {boolean} isReady false while only `progress` is known
 * @property {number | null} progress of a map, or of a better one
 * @property {string} version
 * @property {"pca" | "t-sne"} method
 * @property {number} count
 * @property {string[]} ids
 * @property {string} positions base64
 * @property {unknown[]} [values]
 * @property {string} [codes] base64
 *
 * @typedef {{key: string, values: {value: unknown, count: number}[]}} MetadataKey
 * @typedef {{name: string, id: string, ids: string[]}} Query
 */

/** @type {import("../router.js").View} */
export async function openMap({ params, place, signal, title }) {
  title("Map");
  const [first, { keys }, query] = await Promise.all([
    fetchMap({ colour: params.get("colour") ?? "" }, signal),
    // Without the keys the map is there all the same.
    askJson("metadata", undefined, { signal }).catch(() => ({ keys: [] })),
    findQuery(params, signal),
  ]);
  const body = make("div", { class: "map-body" });
  place.append(make("h1", {}, "Map"), body);
  if (first.isReady) showMap(body, first, keys, query, params, signal);
  else void waitForMap(body, first, keys, query, params, signal);
}

/**
 * @param {Record<string, string>} asked
 * @param {AbortSignal} signal
 * @returns {Promise<MapAnswer>}
 */
async function fetchMap(asked, signal) {
  const given = Object.entries(asked).filter(([, value]) => value);
  const response = await ask(`map?${new URLSearchParams(given)}`, { signal });
  return { isReady: response.status === 200, ...(await response.json()) };
}

/**
 * What the address asks to be marked: an item or words, and their lookalikes.
 *
 * @param {URLSearchParams} params
 * @param {AbortSignal} signal
 * @returns {Promise<Query | null>}
 */
async function findQuery(params, signal) {
  const id = params.get("id") ?? "";
  const text = params.get("text") ?? "";
  if (!id && !text) return null;
  const { hits } = await askJson("search", { ...(id ? { id } : { text }), k: HITS }, { signal });
  return { name: id ? fileName(id) : text, id, ids: hits.map((/** @type {{id: string}} */ hit) => hit.id) };
}

/** @param {string} base64 */
function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** Little-endian whole numbers of two bytes. @param {string} base64 */
function numbersOf(base64) {
  const view = new DataView(bytesOf(base64).buffer);
  return Uint16Array.from({ length: view.byteLength / 2 }, (_, at) => view.getUint16(2 * at, true));
}

/** @param {number} ms @param {AbortSignal} signal */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve(null);
    });
  });
}

/**
 * Show how far the first map is, and the map once it is made.
 *
 * @param {HTMLElement} body
 * @param {MapAnswer} answer
 * @param {MetadataKey[]} keys
 * @param {Query | null} query
 * @param {URLSearchParams} params
 * @param {AbortSignal} signal
 */
async function waitForMap(body, answer, keys, query, params, signal) {
  const again = () => void waitForMap(body, answer, keys, query, params, signal);
  const cancelled = new AbortController();
  const stop = AbortSignal.any([signal, cancelled.signal]);
  const bar = make("progress", { "aria-label": "Making the map" });
  const cancel = makeButton("Cancel", () => {
    cancelled.abort();
    const text = "The service makes the map all the same; you need not wait here.";
    body.replaceChildren(make("p", { class: "soft" }, text), makeButton("Wait for the map", again));
  });
  body.replaceChildren(make("p", { role: "status" }, "The service is making the map."), make("p", { class: "buttons" }, bar, cancel));
  try {
    while (!answer.isReady) {
      bar.value = answer.progress ?? 0;
      await pause(PAUSE / 3, stop);
      if (stop.aborted) return;
      answer = await fetchMap({ colour: params.get("colour") ?? "" }, stop);
    }
    showMap(body, answer, keys, query, params, signal);
  } catch (error) {
    if (!stop.aborted) showProblem(body, error, again);
  }
}

/**
 * @param {HTMLElement} body
 * @param {MapAnswer} answer
 * @param {MetadataKey[]} keys
 * @param {Query | null} query
 * @param {URLSearchParams} params of the address
 * @param {AbortSignal} signal of the view
 */
function showMap(body, answer, keys, query, params, signal) {
  if (!answer.count) {
    const add = make("a", { class: "strong", href: addressOf("add") }, "Add pictures");
    body.replaceChildren(make("p", {}, "There is no picture yet."), make("p", {}, add));
    return;
  }
  // A better map takes the place of this one.
  const replaced = new AbortController();
  const here = AbortSignal.any([signal, replaced.signal]);
  const { ids } = answer;
  const positions = numbersOf(answer.positions);
  const points = makePoints(positions);
  const numberOf = new Map(ids.map((id, point) => [id, point]));
  const marked = query ? [query.id, ...query.ids].flatMap((id) => numberOf.get(id) ?? []) : [];
  let colour = params.get("colour") ?? "";
  let values = answer.values ?? [];
  let codes = answer.codes ? numbersOf(answer.codes) : null;
  /** @type {Set<number> | null} */
  let selected = null;
  /** The code of the value whose points alone stand out, or -1. */
  let only = -1;
  /** The point that is pointed at, or -1. */
  let current = -1;
  /** @type {Map<number, HTMLElement>} */
  const pictures = new Map();
  let look = readPalette(values.length);

  const nameOf = (/** @type {number} */ point) => fileName(ids[point]);
  const addressOfPoint = (/** @type {number} */ point) => addressOf("picture", { id: ids[point] });
  const standsOut = (/** @type {number} */ point) => {
    if (selected) return selected.has(point);
    if (only >= 0) return codes?.[point] === only;
    return !marked.length || marked.includes(point);
  };

  // What is on the page ----------------------------------------------------------------------------

  const note = make("p", { class: "soft", role: "status", id: "map-note" });
  const inSight = make("p", { class: "soft", id: "map-count", "aria-live": "polite" });
  const preview = make("div", { class: "preview", hidden: true });
  const legend = make("section", { class: "legend", hidden: true });
  const queried = make("section", { hidden: !query });
  const selection = make("section", { id: "selection", hidden: true });
  const nearby = make("section", { id: "nearby" });
  const tool = makeButton("Select", () => useTool(tool.getAttribute("aria-pressed") !== "true"), {
    id: "map-select",
    "aria-pressed": "false",
    title: "Draw around points. You can also drag while you hold Shift.",
  });
  const chooser = make("select", { id: "map-colour" }, make("option", { value: "" }, "One colour"));
  const named = keys.filter((one) => one.values.length).map(({ key }) => key);
  for (const key of colour && !named.includes(colour) ? [colour, ...named] : named) {
    chooser.append(make("option", { value: key, selected: key === colour }, key));
  }
  chooser.addEventListener("change", () => void recolour(chooser.value));

  const stage = makeStage({
    label: "Map. Arrows move it, plus and minus zoom, 0 shows all of it, Enter opens the picture nearest the middle",
    signal: here,
    draw,
    rest,
    point: (at) => setCurrent(at ? nearest(at) : -1),
    open: (at, inNewTab) => openPoint(nearest(at), inNewTab),
    enter: () => openPoint(points.nearestIn(stage.box(), stage.sight.x, stage.sight.y, 1)[0] ?? -1, false),
    outline: (outline) => {
      useTool(false);
      select(points.inside(outline));
    },
  });
  stage.element.append(preview);
  const scatter = makeScatter(stage.canvas, positions);
  stage.element.dataset.drawnBy = scatter.kind;

  body.replaceChildren(
    make(
      "div",
      { class: "map-tools" },
      named.length > 0 || colour ? make("label", {}, "Colour ", chooser) : null,
      make("div", { class: "buttons" }, ...stage.buttons, tool),
      inSight,
    ),
    make(
      "div",
      { class: "map-columns" },
      make("div", {}, stage.element, note),
      make("aside", { "aria-label": "Beside the map" }, queried, selection, legend, nearby),
    ),
  );
  showQuery();
  showLegend();
  paint();
  goToSight();
  watchTheme();
  void follow();
  here.addEventListener("abort", () => scatter.close());

  // Drawing ----------------------------------------------------------------------------------------

  function paint() {
    scatter.setCodes((point) => codes?.[point] ?? 0, (point) => !standsOut(point));
    stage.refresh();
  }

  /** Draw the part in sight. */
  function draw() {
    const { sight } = stage;
    const ratio = stage.ratio();
    const size = Math.min(16, Math.max(2.5, (260 / Math.sqrt(points.count)) * stage.zoom() ** 0.35));
    scatter.draw({ ...sight, scale: sight.scale * ratio }, { ...look, size: size * ratio });
    for (const [point, picture] of pictures) moveTo(picture, point);
    drawMarks(ratio);
    showPreview();
  }

  /** @param {HTMLElement} element @param {number} point */
  function moveTo(element, point) {
    const [x, y] = stage.toPixels(points.x(point), points.y(point));
    element.style.transform = `translate(${x}px, ${y}px) translate(-50%, -50%)`;
  }

  /** @param {number} ratio */
  function drawMarks(ratio) {
    const context = /** @type {CanvasRenderingContext2D} */ (stage.marks.getContext("2d"));
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, stage.marks.width, stage.marks.height);
    const ring = (/** @type {number} */ point, /** @type {number} */ radius, /** @type {number} */ width) => {
      const [x, y] = stage.toPixels(points.x(point), points.y(point));
      context.lineWidth = width;
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.stroke();
    };
    context.strokeStyle = look.accent;
    for (const point of marked) ring(point, 6, 2);
    context.strokeStyle = look.ink;
    const asked = numberOf.get(query?.id ?? "");
    if (asked !== undefined) ring(asked, 13, 3);
    if (current >= 0) ring(current, 9, 2.5);
    else if (document.activeElement === stage.element) drawCross(context);
    const outline = stage.drawn();
    if (!outline) return;
    context.lineWidth = 2;
    context.beginPath();
    for (const [x, y] of outline) context.lineTo(...stage.toPixels(x, y));
    context.closePath();
    context.stroke();
    context.globalAlpha = 0.12;
    context.fillStyle = look.accent;
    context.fill();
    context.globalAlpha = 1;
  }

  /** The middle, which Enter means. @param {CanvasRenderingContext2D} context */
  function drawCross(context) {
    const [x, y] = [stage.element.clientWidth / 2, stage.element.clientHeight / 2];
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(x - 8, y);
    context.lineTo(x + 8, y);
    context.moveTo(x, y - 8);
    context.lineTo(x, y + 8);
    context.stroke();
  }

  /** Once nothing moves: pictures in place of few points, links to those in sight, and the address. */
  function rest() {
    const box = stage.box();
    const count = points.countIn(box);
    inSight.textContent = count === points.count ? countPictures(count) : `${formatCount(count)} of ${countPictures(points.count)} in sight`;
    const near = points.nearestIn(box, stage.sight.x, stage.sight.y, MOST_LINKS);
    showPictures(count <= MOST_PICTURES ? near : []);
    showList(nearby, "In sight", near, count);
    if (signal.aborted) return;
    const { x, y, scale } = stage.sight;
    // Whatever the size of the window: how much of the plane its shorter side shows.
    const side = Math.min(stage.element.clientWidth, stage.element.clientHeight) / scale;
    setParam("at", stage.isWhole() ? "" : [x, y, side].map(Math.round).join(","));
  }

  /** @param {number[]} near */
  function showPictures(near) {
    const wanted = new Set(near);
    for (const [point, picture] of pictures) {
      if (wanted.has(point)) continue;
      picture.remove();
      pictures.delete(point);
    }
    const { clientWidth, clientHeight } = stage.element;
    const side = Math.min(96, Math.max(28, 0.55 * Math.sqrt((clientWidth * clientHeight) / Math.max(1, near.length))));
    stage.layer.style.setProperty("--side", `${Math.round(side)}px`);
    // The nearest to the middle is on top.
    for (const point of [...near].reverse()) {
      if (pictures.has(point)) continue;
      const picture = make("span", {}, makePicture(thumbnailOf({ id: ids[point], metadata: {} })));
      pictures.set(point, picture);
      moveTo(picture, point);
      stage.layer.append(picture);
    }
    for (const [point, picture] of pictures) tint(picture, point);
  }

  /** Frame a picture in its point's colour. @param {HTMLElement} picture @param {number} point */
  function tint(picture, point) {
    picture.style.borderColor = codes?.[point] ? `rgb(${look.colours[codes[point]].join(" ")})` : "";
    picture.classList.toggle("faint", !standsOut(point));
  }

  // Points -----------------------------------------------------------------------------------------

  /** The point that a place means, or -1. @param {[number, number]} place */
  function nearest([x, y]) {
    const reach = (pictures.size ? 2 : 1) * (REACH / stage.sight.scale);
    const box = { left: x - reach, top: y - reach, right: x + reach, bottom: y + reach };
    return points.nearestIn(box, x, y, 1)[0] ?? -1;
  }

  /** @param {number} point @param {boolean} inNewTab */
  function openPoint(point, inNewTab) {
    if (point < 0) return;
    if (inNewTab) window.open(addressOfPoint(point), "_blank", "noopener");
    else go(addressOfPoint(point));
  }

  /** @param {number} point */
  function setCurrent(point) {
    if (point === current) return;
    current = point;
    stage.element.classList.toggle("pointing", point >= 0);
    if (point >= 0) {
      const value = codes?.[point] ? `${colour} ${textOf(values[codes[point] - 1])}` : "";
      preview.replaceChildren(
        make("span", { class: "frame" }, makePicture(thumbnailOf({ id: ids[point], metadata: {} }))),
        make("b", {}, nameOf(point)),
        make("span", { class: "soft" }, [folderName(ids[point]), value].filter(Boolean).join(" · ")),
      );
    }
    stage.refresh();
  }

  function showPreview() {
    preview.hidden = current < 0;
    if (current < 0) return;
    const [x, y] = stage.toPixels(points.x(current), points.y(current));
    const { clientWidth, clientHeight } = stage.element;
    const left = x + 16 + preview.offsetWidth > clientWidth ? x - 16 - preview.offsetWidth : x + 16;
    const top = Math.min(clientHeight - preview.offsetHeight - 8, Math.max(8, y - preview.offsetHeight / 2));
    preview.style.transform = `translate(${Math.max(0, left)}px, ${top}px)`;
  }

  // Lists ------------------------------------------------------------------------------------------

  /**
   * Show points as links. One is in the tab order; arrows move among them.
   *
   * @param {HTMLElement} section
   * @param {string} heading
   * @param {number[]} shown
   * @param {number} count of all that the heading speaks of
   * @param {...HTMLElement} buttons
   */
  function showList(section, heading, shown, count, ...buttons) {
    const focused = section.contains(document.activeElement) ? document.activeElement?.getAttribute("href") : null;
    const links = shown.map((point) => {
      const link = make("a", { href: addressOfPoint(point), title: ids[point] }, nameOf(point));
      link.addEventListener("focus", () => setCurrent(point));
      link.addEventListener("blur", () => setCurrent(-1));
      link.addEventListener("pointerenter", () => setCurrent(point));
      link.addEventListener("pointerleave", () => setCurrent(-1));
      return link;
    });
    const list = make("ol", { role: "list", "aria-label": heading }, ...links.map((link) => make("li", {}, link)));
    makeRoving(list, "a")();
    const more = count - shown.length;
    section.replaceChildren(
      make("h2", {}, heading, " ", make("span", { class: "count" }, formatCount(count))),
      ...(buttons.length ? [make("p", { class: "buttons" }, ...buttons)] : []),
      list,
      ...(more > 0 ? [make("p", { class: "soft" }, `and ${formatCount(more)} more`)] : []),
    );
    links.find((link) => link.getAttribute("href") === focused)?.focus();
  }

  /** @param {number[]} chosen */
  function select(chosen) {
    selected = chosen.length ? new Set(chosen) : null;
    selection.hidden = false;
    if (chosen.length) {
      const buttons = [
        makeButton("Copy ids", () => void copyIds(chosen.map((point) => ids[point])), { id: "copy-ids" }),
        makeButton("Clear", clear, { id: "clear-selection" }),
      ];
      showList(selection, "Selected", chosen.slice(0, MOST_LINKS), chosen.length, ...buttons);
    } else selection.replaceChildren(make("h2", {}, "Selected"), make("p", { class: "soft" }, "There is no point inside the outline."));
    restyle();
  }

  function clear() {
    selected = null;
    selection.hidden = true;
    restyle();
    stage.element.focus();
  }

  function restyle() {
    paint();
    for (const [point, picture] of pictures) tint(picture, point);
  }

  /** @param {boolean} has */
  function useTool(has) {
    tool.setAttribute("aria-pressed", String(has));
    stage.setTool(has);
    note.replaceChildren(...(has ? [document.createTextNode("Draw around points, or "), makeButton("Select all in sight", selectInSight)] : noteOf(answer)));
  }

  function selectInSight() {
    useTool(false);
    const { left, top, right, bottom } = stage.box();
    select(points.inside([[left, top], [right, top], [right, bottom], [left, bottom]]));
    /** @type {HTMLElement | null} */ (selection.querySelector("button"))?.focus();
  }

  // Query, colours, place --------------------------------------------------------------------------

  function showQuery() {
    if (!query) return;
    const shown = query.ids.flatMap((id) => numberOf.get(id) ?? []);
    const whole = makeButton("Remove the marks", () => go(addressOf("map", { colour })));
    showList(queried, `Most like ${query.name}`, shown, query.ids.length, whole);
    if (query.id && !numberOf.has(query.id)) queried.append(make("p", { class: "soft" }, `${query.name} is not on this map yet.`));
  }

  function showLegend() {
    legend.hidden = !codes;
    if (!codes) return;
    const counts = new Uint32Array(values.length + 1);
    for (const code of codes) counts[code] += 1;
    const list = make("ul", { role: "list" });
    for (const code of [...values.keys()].map((at) => at + 1).concat(counts[0] ? [0] : [])) {
      const swatch = make("i", { class: "swatch" });
      swatch.style.background = `rgb(${look.colours[code].join(" ")})`;
      const text = code ? textOf(values[code - 1]) : "another value or none";
      const button = makeButton("", () => {
        only = only === code ? -1 : code;
        for (const other of list.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && only === code));
        restyle();
      }, { "aria-pressed": String(only === code) });
      button.append(swatch, make("span", {}, text), make("span", { class: "count" }, formatCount(counts[code])));
      list.append(make("li", {}, button));
    }
    legend.replaceChildren(make("h2", {}, colour), list);
  }

  /** Colour the points by another metadata key. @param {string} key */
  async function recolour(key) {
    try {
      const coloured = key ? await fetchMap({ colour: key }, here) : null;
      // Another map may have been made meanwhile.
      if (coloured && coloured.version !== answer.version) return put(coloured, key);
      colour = key;
      values = coloured?.values ?? [];
      codes = coloured?.codes ? numbersOf(coloured.codes) : null;
      only = -1;
      look = readPalette(values.length);
      showLegend();
      restyle();
      setParam("colour", key);
    } catch (error) {
      if (!here.aborted) showToast(messageOf(error));
    }
  }

  /** Show another map in the place of this one. @param {MapAnswer} other @param {string} key */
  function put(other, key) {
    setParam("colour", key);
    replaced.abort();
    showMap(body, other, keys, query, params, signal);
  }

  /** @param {string} name @param {string} value */
  function setParam(name, value) {
    if (value) params.set(name, value);
    else params.delete(name);
    rename(addressOf("map", Object.fromEntries(params)));
  }

  /** Show the part that the address names, or the query and its lookalikes, or everything. */
  function goToSight() {
    const [x, y, side] = (params.get("at") ?? "").split(",").map(Number);
    if (side > 0) stage.show({ left: x - side / 2, right: x + side / 2, top: y - side / 2, bottom: y + side / 2 });
    else stage.show(null);
  }

  /** Ask for a better or newer map until there is none. */
  async function follow() {
    note.replaceChildren(...noteOf(answer));
    try {
      let latest = answer;
      while (latest.progress !== null) {
        await pause(PAUSE, here);
        if (here.aborted) return;
        latest = await fetchMap({ colour, known: answer.version }, here);
        if (latest.isReady && latest.version !== answer.version) return put(latest, colour);
        answer.progress = latest.progress;
        if (tool.getAttribute("aria-pressed") !== "true") note.replaceChildren(...noteOf(answer));
      }
    } catch (error) {
      if (!here.aborted) note.textContent = messageOf(error);
    }
  }

  function watchTheme() {
    const change = () => {
      look = readPalette(values.length);
      showLegend();
      restyle();
    };
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", change, { signal: here });
    const observer = new MutationObserver(change);
    observer.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    here.addEventListener("abort", () => observer.disconnect());
  }
}

/** How the map was made, as nodes. @param {MapAnswer} answer */
function noteOf({ method, progress, count }) {
  const share = progress === null ? "" : `${Math.round(100 * progress)} %`;
  if (method === "t-sne") {
    const text = "Laid out by t-SNE: what is near is alike; how far groups are apart says little.";
    return withCode(share ? `${text} The map of the latest changes is being made: ${share}.` : text);
  }
  if (share) return withCode(`Laid out by PCA for now. A better map is being made: ${share}.`);
  return withCode(count < 10 ? "Laid out by PCA." : "Laid out by PCA. For t-SNE, which shows groups better: `pip install scikit-learn` where the service runs.");
}

/** @param {unknown} value */
function textOf(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** @param {string[]} chosen */
async function copyIds(chosen) {
  const text = chosen.join("\n");
  try {
    await navigator.clipboard.writeText(text);
    showToast(`The clipboard has ${chosen.length === 1 ? "1 id" : `${formatCount(chosen.length)} ids`}.`);
  } catch {
    // Browsers keep the clipboard from pages that came without encryption.
    window.prompt("Copy the ids:", text);
  }
}
