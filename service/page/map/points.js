// Places in the plane, sorted into cells, so that those near a place, in a rectangle or in an outline are found at once.

// The side of the plane, which the places are whole numbers in, and the number of cells along it.
export const SIDE = 65535;
const CELLS = 256;
const CELL = (SIDE + 1) / CELLS;

/**
 * A rectangle in the plane.
 *
 * @typedef {{left: number, top: number, right: number, bottom: number}} Box
 */

/**
 * @param {Uint16Array} positions x and y of each point
 */
export function makePoints(positions) {
  const count = positions.length / 2;
  // Points of one cell stand together in `order`, from `begins[cell]` on.
  const begins = new Uint32Array(CELLS * CELLS + 1);
  const order = new Uint32Array(count);
  const cellOf = (/** @type {number} */ point) => (positions[2 * point + 1] >> 8) * CELLS + (positions[2 * point] >> 8);
  for (let point = 0; point < count; point += 1) begins[cellOf(point) + 1] += 1;
  for (let cell = 0; cell < CELLS * CELLS; cell += 1) begins[cell + 1] += begins[cell];
  const next = begins.slice();
  for (let point = 0; point < count; point += 1) order[next[cellOf(point)]++] = point;

  const x = (/** @type {number} */ point) => positions[2 * point];
  const y = (/** @type {number} */ point) => positions[2 * point + 1];

  /** Call a function with each point in a box. @param {Box} box @param {(point: number) => void} act */
  function forEachIn(box, act) {
    const clamp = (/** @type {number} */ value) => Math.min(CELLS - 1, Math.max(0, Math.floor(value / CELL)));
    const [first, last] = [clamp(box.left), clamp(box.right)];
    for (let row = clamp(box.top); row <= clamp(box.bottom); row += 1) {
      for (let at = begins[row * CELLS + first]; at < begins[row * CELLS + last + 1]; at += 1) {
        const point = order[at];
        if (x(point) >= box.left && x(point) <= box.right && y(point) >= box.top && y(point) <= box.bottom) act(point);
      }
    }
  }

  /** The number of points in a box. @param {Box} box */
  function countIn(box) {
    let found = 0;
    forEachIn(box, () => {
      found += 1;
    });
    return found;
  }

  /**
   * The points in a box that are nearest a place, the nearest first.
   *
   * @param {Box} box
   * @param {number} px
   * @param {number} py
   * @param {number} most
   * @returns {number[]}
   */
  function nearestIn(box, px, py, most) {
    const around = (/** @type {number} */ radius) => ({
      left: Math.max(box.left, px - radius),
      top: Math.max(box.top, py - radius),
      right: Math.min(box.right, px + radius),
      bottom: Math.min(box.bottom, py + radius),
    });
    const farthest = Math.max(px - box.left, box.right - px, py - box.top, box.bottom - py);
    let radius = Math.min(farthest, CELL);
    while (radius < farthest && countIn(around(radius)) < most) radius *= 2;
    /** @type {{point: number, distance: number}[]} */
    const found = [];
    // A corner of the square is farther away than points beside it.
    forEachIn(around(radius * Math.SQRT2), (point) => {
      found.push({ point, distance: (x(point) - px) ** 2 + (y(point) - py) ** 2 });
    });
    found.sort((a, b) => a.distance - b.distance || a.point - b.point);
    return found.slice(0, most).map(({ point }) => point);
  }

  /**
   * The points inside an outline.
   *
   * @param {[number, number][]} outline its corners
   * @returns {number[]}
   */
  function inside(outline) {
    const xs = outline.map(([px]) => px);
    const ys = outline.map(([, py]) => py);
    const box = { left: Math.min(...xs), top: Math.min(...ys), right: Math.max(...xs), bottom: Math.max(...ys) };
    /** @type {number[]} */
    const found = [];
    forEachIn(box, (point) => {
      // A ray from an inner point crosses the outline an odd number of times.
      let isInside = false;
      for (let at = 0, before = outline.length - 1; at < outline.length; before = at, at += 1) {
        const crosses = ys[at] > y(point) !== ys[before] > y(point);
        if (crosses && x(point) < ((xs[before] - xs[at]) * (y(point) - ys[at])) / (ys[before] - ys[at]) + xs[at]) isInside = !isInside;
      }
      if (isInside) found.push(point);
    });
    return found.sort((a, b) => a - b);
  }

  return { count, x, y, countIn, nearestIn, inside };
}

/** @typedef {ReturnType<typeof makePoints>} Points */
