// The page: starts the header, the ways to hand over pictures, and the views. Its addresses are those of router.js.
//
//   #browse?folder=&name=&order=&filter=&size=   the gallery
//   #picture?id=                                 one picture, large
//   #search?id= | text= | kept=                  lookalikes of an item, of words, of the visitor's pictures
//   #duplicates?preset= | threshold=             groups of copies
//   #map?colour=&id= | text=                     all items as points, and marks on lookalikes
//   #add                                         pictures for the collection
//   #about                                       the service

import { ApiError } from "./api.js";
import { watchForFiles } from "./parts/chooser.js";
import { startHeader } from "./parts/header.js";
import { startRouter } from "./router.js";
import { applyTheme, openAbout } from "./views/about.js";
import { openBrowse } from "./views/browse.js";

/**
 * Return a view whose module is fetched with the first visit: most visitors begin with the gallery.
 *
 * @param {() => Promise<import("./router.js").View>} load
 * @returns {import("./router.js").View}
 */
function later(load) {
  return async (visit) => {
    const view = await load().catch(() => {
      throw new ApiError("The service cannot be reached. Is it still running?", 0, "unreachable");
    });
    if (!visit.signal.aborted) await view(visit);
  };
}

applyTheme();
startRouter({
  browse: openBrowse,
  picture: later(async () => (await import("./views/picture.js")).openPicture),
  search: later(async () => (await import("./views/search.js")).openSearch),
  duplicates: later(async () => (await import("./views/duplicates.js")).openDuplicates),
  map: later(async () => (await import("./views/map.js")).openMap),
  add: later(async () => (await import("./views/add.js")).openAdd),
  about: openAbout,
});
watchForFiles();
void startHeader();
