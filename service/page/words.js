// Small texts that more than one view shows.

/** Text as nodes, its `backticked` parts as <code>. */
export function withCode(text) {
  return text.split("`").map((part, number) => {
    if (number % 2 === 0) return document.createTextNode(part);
    const code = document.createElement("code");
    code.textContent = part;
    return code;
  });
}

/** "1 picture", "1,797 pictures". */
export function countPictures(count) {
  return `${count.toLocaleString("en-GB")} ${count === 1 ? "picture" : "pictures"}`;
}

/** A cosine with three decimals and a true minus. */
export function formatScore(score) {
  return score.toFixed(3).replace("-", "−");
}

/** Metadata in one line: "label 1 · taken 2024". */
export function describe(metadata) {
  return Object.entries(metadata)
    .map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`)
    .join(" · ");
}
