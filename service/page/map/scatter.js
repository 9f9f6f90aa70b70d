// Many points drawn at once: by WebGL2 on a graphics card, else pixel by pixel, which takes a few ms for 100,000 points.

// Colours, by the code of a point: the first is for points without a value.
const MOST_COLOURS = 61;
// Set in the code of a point that others stand out from.
const FAINT = 128;
const FAINTNESS = 0.2;
// Names of renderers that have the processor do the work of a graphics card.
const SOFTWARE = /swiftshader|llvmpipe|softpipe|basic render/i;

/**
 * The part of the plane in sight: its middle, and pixels for a unit of it.
 *
 * @typedef {{x: number, y: number, scale: number}} Sight
 * @typedef {[number, number, number]} Colour red, green and blue from 0 to 255
 */

/**
 * @typedef {object} Look
 * @property {Colour[]} colours by code, at most 61
 * @property {Colour} paper behind the points
 * @property {number} size of a point in px
 */

const VERTICES = `#version 300 es
layout(location = 0) in vec2 position;
layout(location = 1) in float code;
uniform vec2 middle;
uniform vec2 scale;
uniform float size;
uniform vec3 colours[${MOST_COLOURS}];
uniform vec3 paper;
out vec3 colour;
void main() {
  bool faint = code >= ${FAINT}.0;
  colour = colours[int(faint ? code - ${FAINT}.0 : code)];
  if (faint) colour = mix(paper, colour, ${FAINTNESS});
  gl_Position = vec4((position - middle) * scale, faint ? 0.5 : 0.0, 1.0);
  gl_PointSize = size;
}`;

const FRAGMENTS = `#version 300 es
precision mediump float;
in vec3 colour;
uniform bool isRound;
out vec4 drawn;
void main() {
  vec2 from = gl_PointCoord - 0.5;
  if (isRound && dot(from, from) > 0.25) discard;
  drawn = vec4(colour, 1.0);
}`;

/**
 * Draw points on a canvas.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {Uint16Array} positions x and y of each point
 */
export function makeScatter(canvas, positions) {
  // No group of points always lies above another.
  const order = shuffled(positions.length / 2);
  const places = new Uint16Array(positions.length);
  order.forEach((point, at) => {
    places[2 * at] = positions[2 * point];
    places[2 * at + 1] = positions[2 * point + 1];
  });
  const codes = new Uint8Array(order.length);
  const draw = drawByWebGL(canvas, places, codes) ?? drawByPixels(canvas, places, codes);

  return {
    kind: draw.kind,

    /**
     * Give each point its colour.
     *
     * @param {(point: number) => number} codeOf
     * @param {(point: number) => boolean} isFaint whether others stand out from it
     */
    setCodes(codeOf, isFaint) {
      order.forEach((point, at) => {
        codes[at] = codeOf(point) + (isFaint(point) ? FAINT : 0);
      });
      draw.update();
    },

    /** @param {Sight} sight @param {Look} look */
    draw(sight, look) {
      draw.draw(sight, look);
    },

    /** Give the graphics memory back. */
    close: draw.close,
  };
}

/**
 * @typedef {object} Drawing
 * @property {string} kind
 * @property {() => void} update takes other codes
 * @property {(sight: Sight, look: Look) => void} draw
 * @property {() => void} close
 */

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Uint16Array} places
 * @param {Uint8Array} codes
 * @returns {Drawing | null} null where the browser has no WebGL2, or has the processor do its work, which is slow
 */
function drawByWebGL(canvas, places, codes) {
  const gl = hasGraphicsCard() && canvas.getContext("webgl2", { antialias: false, alpha: false });
  if (!gl) return null;
  /** @type {WebGLProgram} */
  let program;
  /** @type {WebGLBuffer} */
  let codeBuffer;
  /** @type {(() => void) | null} */
  let again = null;
  let isClosed = false;

  function start() {
    if (!gl) return;
    program = gl.createProgram();
    for (const [kind, source] of /** @type {const} */ ([[gl.VERTEX_SHADER, VERTICES], [gl.FRAGMENT_SHADER, FRAGMENTS]])) {
      const shader = /** @type {WebGLShader} */ (gl.createShader(kind));
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, places, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.UNSIGNED_SHORT, false, 0, 0);
    codeBuffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, codeBuffer);
    gl.bufferData(gl.ARRAY_BUFFER, codes, gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(1);
    gl.vertexAttribPointer(1, 1, gl.UNSIGNED_BYTE, false, 0, 0);
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LEQUAL);
  }

  start();
  canvas.addEventListener("webglcontextlost", (event) => {
    // Only then may the browser give the context back.
    if (!isClosed) event.preventDefault();
  });
  canvas.addEventListener("webglcontextrestored", () => {
    start();
    again?.();
  });
  const place = (/** @type {string} */ name) => gl.getUniformLocation(program, name);
  const share = (/** @type {Colour} */ colour) => colour.map((part) => part / 255);

  return {
    kind: "WebGL2",
    update() {
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, codes);
    },
    draw(sight, look) {
      again = () => this.draw(sight, look);
      const [red, green, blue] = share(look.paper);
      gl.viewport(0, 0, canvas.width, canvas.height);
      gl.clearColor(red, green, blue, 1);
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      gl.uniform2f(place("middle"), sight.x, sight.y);
      gl.uniform2f(place("scale"), (2 * sight.scale) / canvas.width, (-2 * sight.scale) / canvas.height);
      gl.uniform1f(place("size"), look.size);
      gl.uniform1i(place("isRound"), look.size > 3 ? 1 : 0);
      gl.uniform3f(place("paper"), red, green, blue);
      gl.uniform3fv(place("colours"), new Float32Array(look.colours.flatMap(share)));
      gl.drawArrays(gl.POINTS, 0, codes.length);
    },
    close() {
      isClosed = true;
      gl.getExtension("WEBGL_lose_context")?.loseContext();
    },
  };
}

/** Whether WebGL2 is there and is drawn by a graphics card, as far as the browser tells. */
function hasGraphicsCard() {
  const gl = document.createElement("canvas").getContext("webgl2");
  if (!gl) return false;
  let renderer = gl.getParameter(gl.RENDERER);
  // Chromium tells the extension alone, which Firefox warns of.
  const told = renderer === "WebKit WebGL" && gl.getExtension("WEBGL_debug_renderer_info");
  if (told) renderer = gl.getParameter(told.UNMASKED_RENDERER_WEBGL);
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return !SOFTWARE.test(renderer);
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Uint16Array} places
 * @param {Uint8Array} codes
 * @returns {Drawing}
 */
function drawByPixels(canvas, places, codes) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }));
  let image = context.createImageData(1, 1);
  return {
    kind: "pixels",
    update() {},
    draw(sight, look) {
      const { width, height } = canvas;
      if (image.width !== width || image.height !== height) image = context.createImageData(width, height);
      const pixels = new Uint32Array(image.data.buffer);
      pixels.fill(packed(look.paper));
      const disc = discOf(look.size);
      const colours = new Uint32Array(2 * FAINT);
      look.colours.forEach((colour, code) => {
        colours[code] = packed(colour);
        colours[code + FAINT] = packed(/** @type {Colour} */ (colour.map((part, at) => part * FAINTNESS + look.paper[at] * (1 - FAINTNESS))));
      });
      // The faint ones first, so that they are behind.
      for (const isFaint of [true, false]) {
        for (let at = 0; at < codes.length; at += 1) {
          if (codes[at] >= FAINT !== isFaint) continue;
          const x = Math.round((places[2 * at] - sight.x) * sight.scale + width / 2);
          const y = Math.round((places[2 * at + 1] - sight.y) * sight.scale + height / 2);
          if (x < 0 || y < 0 || x >= width || y >= height) continue;
          const colour = colours[codes[at]];
          for (const { row, half } of disc) {
            if (y + row < 0 || y + row >= height) continue;
            const begin = (y + row) * width;
            const end = begin + Math.min(width - 1, x + half);
            for (let pixel = begin + Math.max(0, x - half); pixel <= end; pixel += 1) pixels[pixel] = colour;
          }
        }
      }
      context.putImageData(image, 0, 0);
    },
    close() {},
  };
}

/** The rows of a disc: how far each reaches to both sides. @param {number} size */
function discOf(size) {
  const radius = size / 2;
  const reach = Math.floor(radius);
  return Array.from({ length: 2 * reach + 1 }, (_, at) => ({
    row: at - reach,
    half: Math.floor(Math.sqrt(Math.max(0, radius ** 2 - (at - reach) ** 2)) + 0.2),
  }));
}

/** A colour as a canvas keeps it in memory. @param {Colour} colour */
function packed([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** The numbers below `count` in an order that is the same each time. @param {number} count */
function shuffled(count) {
  const order = Uint32Array.from({ length: count }, (_, at) => at);
  let state = 1;
  for (let at = count - 1; at > 0; at -= 1) {
    // Numerical Recipes' generator.
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const other = Math.floor((state / 2 ** 32) * (at + 1));
    [order[at], order[other]] = [order[other], order[at]];
  }
  return order;
}
