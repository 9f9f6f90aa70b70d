// The page: starts the header, the ways to hand over pictures, and the views. Its addresses are those of router.js.
//
//   #browse?folder=&name=&order=&filter=&size=   the gallery
//   #picture?id=                                 one picture, large
//   #search?id= | text= | kept=                  lookalikes of an item, of words, of the visitor's pictures
//   #duplicates?preset= | threshold=             groups of copies
//   #map?colour=                                 all items as points
//   #add                                         pictures for the collection
//   #about                                       the service

import { watchForFiles } from "./parts/chooser.js";
import { startHeader } from "./parts/header.js";
import { startRouter } from "./router.js";
import { applyTheme, openAbout } from "./views/about.js";
import { openAdd } from "./views/add.js";
import { openBrowse } from "./views/browse.js";
import { openDuplicates } from "./views/duplicates.js";
import { openMap } from "./views/map.js";
import { openPicture } from "./views/picture.js";
import { openSearch } from "./views/search.js";

applyTheme();
startRouter({
  browse: openBrowse,
  picture: openPicture,
  search: openSearch,
  duplicates: openDuplicates,
  map: openMap,
  add: openAdd,
  about: openAbout,
});
watchForFiles();
void startHeader();
