// The copies to remove as a list of paths and as a shell script. Names of files may hold anything that a disk allows.

import { formatBytes, formatCount } from "../parts/words.js";

/** @typedef {import("./decisions.js").Copy} Copy */

/**
 * A copy to remove, and the copies of its group that stay.
 *
 * @typedef {{copy: Copy, kept: Copy[]}} Marked
 */

const HEAD = `set -u
sum() { if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi <"$1" | cut -d ' ' -f 1; }
# remove FILE ITS-SHA256 COPY-THAT-STAYS
remove() {
  if [ ! -f "$1" ]; then why='it is not there'
  elif [ ! -f "$3" ] || [ "$1" -ef "$3" ]; then why='no copy of it would stay'
  elif [ "$(sum "$1")" != "$2" ]; then why='it has changed since it was indexed'
  else rm -- "$1"; return
  fi
  printf 'left, as %s: %s\\n' "$why" "$1" >&2
}
`;

/**
 * A line for each copy: its path, or its id if it came from no file. One with control characters is put as JSON does.
 *
 * @param {Marked[]} marked
 */
export function makeList(marked) {
  return marked
    .map(({ copy }) => {
      const name = copy.source ?? copy.id;
      return `${/[\p{Cc}\p{Surrogate}]/u.test(name) ? JSON.stringify(name) : name}\n`;
    })
    .join("");
}

/**
 * A script for POSIX shells that removes the files of copies.
 *
 * It leaves a file that has changed since it was indexed, and one whose group would have no copy left. A comment names
 * each copy that it cannot remove.
 *
 * @param {Marked[]} marked
 * @param {Set<string>} staying sources of all other copies
 */
export function makeScript(marked, staying) {
  let [count, bytes] = [0, 0];
  const lines = marked.map(({ copy, kept }) => {
    const path = pathOf(copy);
    const stays = kept.map(pathOf).find((one) => one !== "");
    if (!path) return `# not removed, as it came from no file whose name a script can hold: ${printable(copy.source ?? copy.id)}`;
    if (staying.has(path)) return `# not removed, as another item has the same file: ${printable(path)}`;
    if (!stays) return `# not removed, as the copy that stays is no file: ${printable(path)}`;
    count += 1;
    bytes += copy.size_bytes ?? 0;
    return `remove ${quoted(path)} ${quoted(copy.digest)} ${quoted(stays)}`;
  });
  return [
    "#!/bin/sh",
    `# Removes ${formatCount(count)} ${count === 1 ? "file" : "files"}, ${formatBytes(bytes)}. Read it before you run it.`,
    HEAD + lines.join("\n"),
    "",
  ].join("\n");
}

/** Let the browser save a text. @param {string} text @param {string} name of the file */
export function saveText(text, name) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  // The browser reads it after the click.
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** The path of a copy's file; "" if it came from none, or its name is no text. @param {Copy} copy */
function pathOf({ source }) {
  return source?.startsWith("/") && !/[\0\p{Surrogate}]/u.test(source) ? source : "";
}

/** A text as one word of a POSIX shell. @param {string} text */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A text in one line, without what would change how a terminal shows it. @param {string} text */
function printable(text) {
  return text.replace(
    /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Surrogate}]/gu,
    (character) => `\\u{${character.codePointAt(0)?.toString(16)}}`,
  );
}
