// Pictures measured, cropped and made smaller in the browser, so that large ones need not be sent whole.

// A query longer than LONG_SIDE is sent with SENT_SIDE, far above what encoders look at.
const LONG_SIDE = 2048; // px
const SENT_SIDE = 1024; // px
// A picture for the collection keeps more.
const STORED_SIDE = 4096; // px
// Up to this side a part of a picture is sent without loss.
const SMALL_SIDE = 256; // px
const QUALITY = 0.92;

/**
 * A part of a picture, as shares of its sides.
 *
 * @typedef {{x: number, y: number, width: number, height: number}} Part
 * @typedef {{blob: Blob, digest: string, note: string}} Sent
 *   blob goes to the service; where it is not the file itself, digest is the file's sha256, if the browser can tell it,
 *   and note says what was done
 */

/** The whole of a picture. @type {Part} */
export const WHOLE = { x: 0, y: 0, width: 1, height: 1 };

/**
 * What is sent of a picture to search by it: the file as it is, unless it is large.
 *
 * @param {Blob} file
 * @param {Record<string, number>} limits of the service
 * @param {boolean} [always] make any picture smaller that the browser can decode
 * @returns {Promise<Sent>}
 */
export async function queryOf(file, limits, always = false) {
  const size = await sizeOf(file);
  const asItIs = { blob: file, digest: "", note: "" };
  if (!size || (!always && !isLarge(file, size, limits))) return asItIs;
  const blob = await redraw(file, WHOLE, SENT_SIDE).catch(() => null);
  if (!blob) return asItIs;
  return { blob, digest: await digestOf(file), note: "Your picture was made smaller before it was sent." };
}

/**
 * A part of a picture, made smaller where it is large.
 *
 * @param {Blob} file
 * @param {Part} part
 * @returns {Promise<Blob>} rejects if the browser cannot decode the file
 */
export function cropOf(file, part) {
  return redraw(file, part, SENT_SIDE);
}

/**
 * A picture within the limits of the service, for the collection.
 *
 * @param {Blob} file
 * @param {Record<string, number>} limits
 * @returns {Promise<Blob>} rejects if the browser cannot decode the file
 */
export async function shrink(file, limits) {
  // A square of this side has as many pixels as are allowed.
  const allowed = Math.floor(Math.sqrt(limits.max_pixels));
  for (let side = Math.min(STORED_SIDE, limits.max_side, allowed); ; side = Math.floor(side / 2)) {
    const blob = await redraw(file, WHOLE, side);
    if (blob.size <= limits.max_image_bytes || side < 64) return blob;
  }
}

/** @param {Blob} file @param {{width: number, height: number}} size @param {Record<string, number>} limits */
function isLarge(file, { width, height }, limits) {
  const side = Math.max(width, height);
  return side > Math.min(LONG_SIDE, limits.max_side) || width * height > limits.max_pixels || file.size > limits.max_image_bytes;
}

/**
 * Width and height in px; null if the browser cannot show the file.
 *
 * @param {Blob} file
 * @returns {Promise<{width: number, height: number} | null>}
 */
function sizeOf(file) {
  const address = URL.createObjectURL(file);
  const picture = new Image();
  // The size is known from the head of the file, long before all of it is decoded.
  return new Promise((/** @type {(size: {width: number, height: number} | null) => void} */ resolve) => {
    picture.addEventListener("load", () => resolve({ width: picture.naturalWidth, height: picture.naturalHeight }));
    picture.addEventListener("error", () => resolve(null));
    picture.src = address;
  }).finally(() => URL.revokeObjectURL(address));
}

/**
 * Draw a part of a picture so that its longer side is at most `side` px.
 *
 * @param {Blob} file
 * @param {Part} part
 * @param {number} side
 * @returns {Promise<Blob>}
 */
async function redraw(file, part, side) {
  const picture = await createImageBitmap(file, { imageOrientation: "from-image" });
  try {
    const left = Math.floor(part.x * picture.width);
    const top = Math.floor(part.y * picture.height);
    const width = Math.max(1, Math.min(picture.width - left, Math.round(part.width * picture.width)));
    const height = Math.max(1, Math.min(picture.height - top, Math.round(part.height * picture.height)));
    const scale = Math.min(1, side / Math.max(width, height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    // The service, too, makes transparent pixels white.
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, left, top, width, height, 0, 0, canvas.width, canvas.height);
    const type = Math.max(canvas.width, canvas.height) <= SMALL_SIDE ? "image/png" : "image/jpeg";
    return await new Promise((resolve, reject) =>
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The picture is too large for the browser."))), type, QUALITY),
    );
  } finally {
    picture.close();
  }
}

/** The sha256 of a file in hexadecimal; "" where the browser does not make one: on pages without encryption. @param {Blob} file */
async function digestOf(file) {
  if (!crypto.subtle) return "";
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
