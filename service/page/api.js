// The HTTP API as functions. A failure is an Error whose message can be shown as it is.

const KEY = "lookalike-key"; // kept for as long as the tab is open

/** What runs here: encoder, number of pictures, notice, limits. */
export function getInfo() {
  return ask("info");
}

/** Items in the order of adding; `next` is the cursor of the next page, or null. */
export function listItems(limit, cursor) {
  return ask(`images?${new URLSearchParams(cursor ? { limit, cursor } : { limit })}`);
}

/** The k items most like a picture (a Blob), best first. */
export async function searchByPicture(picture, k, signal) {
  await picture.slice(0, 1).arrayBuffer().catch(() => {
    throw new Error("The file cannot be read. Is it a folder, or has it been moved?");
  });
  // The bytes decide, whatever a file is called: a JSON or text file must not pass for another kind of request.
  const type = picture.type.startsWith("image/") ? picture.type : "application/octet-stream";
  const answer = await ask(`search?k=${k}`, { method: "POST", headers: { "Content-Type": type }, body: picture, signal });
  return answer.hits;
}

/** The k items most like an item, that item left out, best first. */
export async function searchById(id, k, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await ask("search", { method: "POST", headers, body: JSON.stringify({ id, k }), signal });
  return answer.hits;
}

/** Let an <img> show what is at an address of the API. An <img> alone could not send a key. */
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

/** Where an item's thumbnail is. An id may hold any character; "/" stays "/". */
export function thumbnailOf(id) {
  const segments = id.split("/").map(encodeURIComponent);
  // A browser would resolve a "." or ".." between slashes, so there the slashes are written as %2F.
  const slash = segments.some((segment) => segment === "." || segment === "..") ? "%2F" : "/";
  return `images/${segments.join(slash)}/thumbnail`;
}

function keyHeader() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Whether there is a key now that was not sent: one that another request asked for meanwhile, or a new one. */
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
