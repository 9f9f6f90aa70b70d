// A sheet to draw a digit on, and the drawing as a picture set out as MNIST's are.

const SIDE = 280; // px; ten times MNIST's side
const BRUSH = 28; // px, on the sheet
const INK_SIDE = 200; // px: the ink's long side in the picture, as MNIST's 20 of 28
// px: the pen's width in the picture. Of the ten pictures nearest to a drawn digit 83 % are that digit with 20 and
// 72 % with 28 (models/mnist, gallery digits, 60 synthetic drawings; in a gallery of MNIST over 99 % with both).
const PEN = 20;

const view = document.querySelector("#drawing");
const canvas = document.querySelector("#canvas");
const sheet = canvas.parentElement;
const clear = document.querySelector("#clear");

/**
 * Show the sheet, and call onDrawing(png, isNew) at the end of every stroke.
 *
 * isNew is false while strokes are added to a drawing that was handed over before.
 */
export function startDrawing(onDrawing) {
  let strokes = []; // each a list of points [x, y] in px of the canvas
  let stroke = null; // the one being drawn
  let pointer = null; // the one finger, pen or mouse that draws it

  const redraw = () => paint(canvas, strokes, BRUSH);
  redraw();
  view.hidden = false;

  canvas.addEventListener("pointerdown", (event) => {
    if (pointer !== null || event.button !== 0) return;
    event.preventDefault();
    pointer = event.pointerId;
    canvas.setPointerCapture(pointer);
    stroke = [where(event)];
    strokes.push(stroke);
    delete sheet.dataset.empty;
    clear.disabled = false;
    redraw();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) stroke.push(where(one));
    redraw();
  });
  const finish = async (event) => {
    if (event.pointerId !== pointer) return;
    pointer = null;
    const isNew = strokes.length === 1;
    onDrawing(await toPicture(strokes), isNew);
  };
  canvas.addEventListener("pointerup", finish);
  canvas.addEventListener("pointercancel", finish);

  clear.addEventListener("click", () => {
    strokes = [];
    pointer = null;
    sheet.dataset.empty = "";
    clear.disabled = true;
    redraw();
  });
}

/** Where a pointer is, in px of the canvas, whatever size it is shown at. */
function where(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
}

/**
 * The drawing as MNIST sets its digits out: ink's long side 20 of 28, ink's centre of mass in the middle.
 *
 * The strokes are scaled and painted anew, so that a small drawing does not become a fat one.
 */
function toPicture(strokes) {
  const [xs, ys] = [0, 1].map((axis) => strokes.flat().map((point) => point[axis]));
  const long = Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys));
  const scale = (INK_SIDE - PEN) / Math.max(long, BRUSH); // a mere dot stays one
  const place = (dx, dy) => strokes.map((stroke) => stroke.map(([x, y]) => [x * scale + dx, y * scale + dy]));

  const page = document.createElement("canvas");
  page.width = page.height = SIDE;
  const middle = (values) => SIDE / 2 - (scale * (Math.min(...values) + Math.max(...values))) / 2;
  const [left, top] = [middle(xs), middle(ys)];
  paint(page, place(left, top), PEN);
  const [x, y] = centreOfMass(page);
  const most = (SIDE - INK_SIDE) / 2; // px; further and ink would leave the picture
  const towards = (centre) => Math.min(most, Math.max(-most, SIDE / 2 - centre));
  paint(page, place(left + towards(x), top + towards(y)), PEN);
  return new Promise((resolve) => page.toBlob(resolve, "image/png"));
}

/** Paint strokes, each [[x, y], …], white on black. */
function paint(on, strokes, width) {
  const context = on.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "black";
  context.fillRect(0, 0, SIDE, SIDE);
  context.strokeStyle = "white";
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...stroke[0]);
    for (const point of stroke) context.lineTo(...point); // to its own start too: a dot is a stroke
    context.stroke();
  }
}

/** The ink's centre of mass [x, y] in px. */
function centreOfMass(page) {
  const { data } = page.getContext("2d").getImageData(0, 0, SIDE, SIDE); // RGBA, row by row
  let [mass, x, y] = [0, 0, 0];
  for (let at = 0; at < SIDE * SIDE; at += 1) {
    const ink = data[4 * at];
    mass += ink;
    x += ink * ((at % SIDE) + 0.5);
    y += ink * (Math.floor(at / SIDE) + 0.5);
  }
  return [x / mass, y / mass];
}
