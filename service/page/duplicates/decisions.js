// What the visitor decides about groups of copies. The tab keeps it, so that Back and a reload find it again.

/**
 * A copy and a group as GET /duplicates lists them.
 *
 * @typedef {{id: string, score: number, exact: boolean, digest: string, source: string | null, width: number | null,
 *   height: number | null, size_bytes: number | null, format: string | null, date: string | null}} Copy
 * @typedef {{best: string, reason: string, items: Copy[]}} Group
 * @typedef {"" | "keep" | "skip" | "apart"} Done "" while the visitor has not decided
 */

// A record a group: what was decided, and the places of the kept copies among its ids in order.
const KEPT = "lookalike-decisions";
/** @type {Map<string, [Done, number[]]>} */
const decisions = new Map(Object.entries(JSON.parse(sessionStorage.getItem(KEPT) ?? "{}")));
/** @type {WeakMap<Group, string>} */
const keys = new WeakMap();

/** How many groups have a record, those of other thresholds included. */
export function countRecords() {
  return decisions.size;
}

/** What was decided about a group. @param {Group} group @returns {Done} */
export function doneOf(group) {
  return decisions.get(keyOf(group))?.[0] ?? "";
}

/** Whether anything was chosen or decided. @param {Group} group */
export function hasRecord(group) {
  return decisions.has(keyOf(group));
}

/** The ids of the copies that stay; without a choice the best one. @param {Group} group @returns {Set<string>} */
export function keptOf(group) {
  const record = decisions.get(keyOf(group));
  if (!record) return new Set([group.best]);
  const ids = sorted(group);
  return new Set(record[1].map((place) => ids[place]));
}

/** The copies that a decision removes. @param {Group} group @returns {Copy[]} */
export function removedOf(group) {
  if (doneOf(group) !== "keep") return [];
  const kept = keptOf(group);
  return group.items.filter(({ id }) => !kept.has(id));
}

/**
 * Note a choice or a decision.
 *
 * @param {Group} group
 * @param {Done} done
 * @param {Iterable<string>} [kept] ids of the copies that stay
 */
export function decide(group, done, kept = keptOf(group)) {
  const ids = sorted(group);
  const places = [...kept].map((id) => ids.indexOf(id)).sort((a, b) => a - b);
  if (done === "" && places.length === 1 && ids[places[0]] === group.best) decisions.delete(keyOf(group));
  else decisions.set(keyOf(group), [done, places]);
}

/** Forget all choices and decisions. */
export function forgetDecisions() {
  decisions.clear();
}

/** Write the decisions down. @returns {boolean} whether there was room for them */
export function saveDecisions() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(decisions)));
    return true;
  } catch {
    // Browsers give a page some 5 MB.
    return false;
  }
}

/** @param {Group} group */
function sorted(group) {
  return group.items.map(({ id }) => id).sort();
}

/** A short name of a group, by the ids of its items in whatever order. @param {Group} group */
function keyOf(group) {
  let key = keys.get(group);
  if (key === undefined) {
    let [one, other] = [0x811c9dc5, 0x9747b28c];
    for (const character of sorted(group).join("\n")) {
      const code = character.codePointAt(0) ?? 0;
      one = Math.imul(one ^ code, 0x01000193);
      other = Math.imul(other ^ code, 0x5bd1e995);
      other ^= other >>> 13;
    }
    key = `${(one >>> 0).toString(36)}.${(other >>> 0).toString(36)}`;
    keys.set(group, key);
  }
  return key;
}
