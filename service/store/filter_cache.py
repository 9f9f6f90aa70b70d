"""Which items meet a filter, kept for the filters that were asked for last."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from service import IntArray
from service.store.catalog import Catalog
from service.store.faiss_index import Among
from service.store.filters import Filter

_KEPT = 32  # filters; each costs a bit for each key, and up to 3 MB for codes of its own


@dataclass(frozen=True)
class Selection:
    """The items that met a filter at one moment.

    Attributes:
        sequence: the number of the last change that it knows.
        among: their keys, as the index takes them.
    """

    sequence: int
    among: Among


class Selections:
    """Filters that were evaluated. Calls may come from any thread."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: dict[Filter, Selection] = {}  # in the order of their last use
        self._using = threading.Lock()

    def get(self, where: Filter) -> Selection:
        """Return what meets a filter by now.

        Cost: the first time reads all metadata, later that of the items which changed.
        """
        with self._using:
            known = self._known.pop(where, None)
        latest, changed, matching = self._catalog.matching(where, -1 if known is None else known.sequence)
        if known is None:
            known = Selection(latest, Among.of(matching))
        elif len(changed):
            known = Selection(latest, Among(_changed(known.among.bits, changed, matching)))
        with self._using:
            self._known[where] = known
            while len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]
        return known


def _changed(bits: Any, off: IntArray, on: IntArray) -> Any:
    """The same bits with those of some keys off and then those of others on."""
    longest = int(max(off.max(initial=0), on.max(initial=0))) // 8 + 1
    new = np.zeros(max(longest, len(bits)), np.uint8)
    new[: len(bits)] = bits
    np.bitwise_and.at(new, off >> 3, ~(1 << (off & 7)).astype(np.uint8))
    np.bitwise_or.at(new, on >> 3, (1 << (on & 7)).astype(np.uint8))
    return new
