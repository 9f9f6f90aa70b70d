// Small texts that more than one view shows.

/** Text as nodes, its `backticked` parts as <code>. @param {string} text */
export function withCode(text) {
  return text.split("`").map((part, number) => {
    if (number % 2 === 0) return document.createTextNode(part);
    const code = document.createElement("code");
    code.textContent = part;
    return code;
  });
}

// Making one is slow; a list formats thousands of numbers.
const COUNTS = new Intl.NumberFormat("en-GB");

/** "1,200". @param {number} count */
export function formatCount(count) {
  return COUNTS.format(count);
}

/** "1 picture", "1,797 pictures". @param {number} count */
export function countPictures(count) {
  return `${formatCount(count)} ${count === 1 ? "picture" : "pictures"}`;
}

/** A cosine with three decimals and a true minus. @param {number} score */
export function formatScore(score) {
  return score.toFixed(3).replace("-", "−");
}

/** "812 bytes", "34 kB", "2.1 MB". @param {number} bytes */
export function formatBytes(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  const [value, unit] = bytes < 1e6 ? [bytes / 1e3, "kB"] : bytes < 1e9 ? [bytes / 1e6, "MB"] : [bytes / 1e9, "GB"];
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${unit}`;
}

/** "2024-05-01 13:07" of a date in ISO 8601. @param {string} date */
export function formatDate(date) {
  return date.slice(0, 16).replace("T", " ");
}

/** The file's name in an id. @param {string} id */
export function fileName(id) {
  return id.slice(id.lastIndexOf("/", id.length - 2) + 1);
}

/** The folder in an id, without the slash at its end; "" if there is none. @param {string} id */
export function folderName(id) {
  return id.slice(0, Math.max(0, id.lastIndexOf("/", id.length - 2)));
}

/** Metadata in one line: "label 1 · taken 2024". @param {Record<string, unknown>} metadata */
export function describe(metadata) {
  return Object.entries(metadata)
    .map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`)
    .join(" · ");
}
