// The HTTP API as functions. A failure is an Error with a message for the visitor.

// The session storage keeps the API key until the tab closes.
const KEY = "lookalike-key";

/** Facts about the service: encoder, number of pictures, notice, limits. */
export function getInfo() {
  return ask("info");
}

/** A page of items, in the order of adding; `next` is the cursor of the next page, or null. */
export function listItems(limit, cursor) {
  return ask(`images?${new URLSearchParams(cursor ? { limit, cursor } : { limit })}`);
}

/** The k items most like a picture (a Blob), best first. */
export async function searchByPicture(picture, k, signal) {
  await picture.slice(0, 1).arrayBuffer().catch(() => {
    throw new Error("The file cannot be read. Is it a folder, or has it been moved?");
  });
  // A JSON or text file must not be taken for another kind of request. The service recognises pictures by their bytes.
  const type = picture.type.startsWith("image/") ? picture.type : "application/octet-stream";
  const answer = await ask(`search?k=${k}`, { method: "POST", headers: { "Content-Type": type }, body: picture, signal });
  return answer.hits;
}

/** The k items most like an item, without that item, best first. */
export async function searchById(id, k, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await ask("search", { method: "POST", headers, body: JSON.stringify({ id, k }), signal });
  return answer.hits;
}

/** The k items most like words, best first. */
export async function searchByText(text, k, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await ask("search", { method: "POST", headers, body: JSON.stringify({ text, k }), signal });
  return answer.hits;
}

/** Show a picture of the API in an <img>, which cannot send a key by itself. */
export async function showPicture(image, address) {
  if (!sessionStorage.getItem(KEY) || address.startsWith("blob:")) {
    image.src = address;
    return;
  }
  const response = await fetch(address, { headers: keyHeader() }).catch(() => null);
  if (!response || !response.ok) {
    image.dispatchEvent(new Event("error"));
    return;
  }
  const local = URL.createObjectURL(await response.blob());
  image.addEventListener("load", () => URL.revokeObjectURL(local), { once: true });
  image.src = local;
}

/** The address of an item's thumbnail. An id may hold any character; "/" stays "/". */
export function thumbnailOf(id) {
  const segments = id.split("/").map(encodeURIComponent);
  // A browser would resolve "." and ".." between slashes, so such ids get %2F instead.
  const slash = segments.some((segment) => segment === "." || segment === "..") ? "%2F" : "/";
  return `images/${segments.join(slash)}/thumbnail`;
}

function keyHeader() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Whether a key other than the one sent is available: another request may have asked for it; else ask the visitor. */
function hasAnotherKey(sent) {
  if (sessionStorage.getItem(KEY) === sent) {
    const key = window.prompt("This service asks for an API key:");
    if (key) sessionStorage.setItem(KEY, key.trim());
    else sessionStorage.removeItem(KEY);
  }
  const now = sessionStorage.getItem(KEY);
  return now !== null && now !== sent;
}

async function ask(path, options = {}) {
  const sent = sessionStorage.getItem(KEY);
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...keyHeader() } });
    if (response.status === 401 && hasAnotherKey(sent)) return ask(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached. Is it still running?");
  }
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({}));
  throw new Error(problem.detail || `The service answered ${response.status} without saying why.`);
}
