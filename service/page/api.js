// The HTTP API as functions. A failure is an Error whose message can be shown as it is.

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

/** Where an item's thumbnail is. An id may hold any character; "/" stays "/". */
export function thumbnailOf(id) {
  const segments = id.split("/").map(encodeURIComponent);
  // A browser would resolve a "." or ".." between slashes, so there the slashes are written as %2F.
  const slash = segments.some((segment) => segment === "." || segment === "..") ? "%2F" : "/";
  return `images/${segments.join(slash)}/thumbnail`;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached. Is it still running?");
  }
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({}));
  throw new Error(problem.detail || `The service answered ${response.status} without saying why.`);
}
