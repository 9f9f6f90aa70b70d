// The service: encoder, numbers, API, key and theme.

import { forgetKey, hasKey } from "../api.js";
import { make, makeButton } from "../parts/elements.js";
import { refreshInfo } from "../parts/header.js";
import { countPictures, formatCount, formatScore } from "../parts/words.js";
import { reload } from "../router.js";

/** @type {import("../router.js").View} */
export async function openAbout({ place, title }) {
  title("About this service");
  const info = await refreshInfo();
  const facts = make("dl", { class: "facts" });
  /** @type {[string, string][]} */
  const shown = [
    ["Pictures", countPictures(info.count ?? 0)],
    ["Encoder", info.model],
    ...factsOfCard(info.card),
    ["Embeddings", `${formatCount(info.dimension)} numbers each, fingerprint ${info.fingerprint.slice(0, 12)}`],
    ["Runs on", `${info.provider}, ${info.variant}`],
    ["Takes", info.queries.join(", ")],
    ["Versions", Object.entries(info.versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ...factsOfBuild(info.commit),
  ];
  for (const [term, value] of shown) facts.append(make("dt", {}, term), make("dd", {}, value));
  place.append(
    make("h1", {}, "About this service"),
    facts,
    make("p", {}, make("a", { href: "docs" }, "The HTTP API"), " with a form for each request."),
    make(
      "p",
      { class: "buttons" },
      hasKey() &&
        makeButton("Forget the API key", () => {
          forgetKey();
          reload();
        }),
    ),
    make("h2", {}, "Theme"),
    makeThemes(),
  );
}

/** What an image tells of itself. @param {string | null} commit @returns {[string, string][]} */
function factsOfBuild(commit) {
  return commit ? [["Commit", commit]] : [];
}

/** What the encoder's card tells. @param {import("../api.js").Info["card"]} card @returns {[string, string][]} */
function factsOfCard({ method, licence, origin, data, quality = {} }) {
  const trained = [data?.source, data?.pictures && countPictures(data.pictures)].filter(Boolean).join(", ");
  /** @type {[string, string | undefined][]} */
  const facts = [["Method", method], ["Origin", origin], ["Trained on", trained], ["Licence", licence]];
  for (const [file, figures] of Object.entries(quality)) facts.push([`Measured: ${file}`, describeQuality(figures)]);
  return facts.flatMap(([term, value]) => (value ? [[term, value]] : []));
}

/** What was measured of a file of the encoder when it was exported. @param {import("../api.js").Quality} figures */
function describeQuality({ pictures, knn, zero_shot, cosine_p1 }) {
  const words = [
    knn !== undefined && `k-NN accuracy ${formatScore(knn)}`,
    zero_shot !== undefined && `accuracy by words alone ${formatScore(zero_shot)}`,
    cosine_p1 !== undefined && `cosine to fp32 at least ${formatScore(cosine_p1)} for 99 %`,
  ].filter(Boolean);
  return words.length && pictures ? `${words.join(", ")}, of ${countPictures(pictures)} that it was not trained on` : "";
}

const THEME = "lookalike-theme";

/** Three buttons: as the system, light, dark. */
function makeThemes() {
  const group = make("p", { class: "buttons", role: "group", "aria-label": "Theme" });
  for (const [value, text] of [["", "As the system"], ["light", "Light"], ["dark", "Dark"]]) {
    const isOn = (localStorage.getItem(THEME) ?? "") === value;
    const button = makeButton(text, () => {
      localStorage.setItem(THEME, value);
      applyTheme();
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
    }, { "aria-pressed": String(isOn) });
    group.append(button);
  }
  return group;
}

/** Give the page the theme that the visitor has chosen. */
export function applyTheme() {
  document.documentElement.dataset.theme = localStorage.getItem(THEME) ?? "";
}
