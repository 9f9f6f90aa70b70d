"""Which items match a filter, remembered for the filters that were used last."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from service import IntArray
from service.store.catalog_reader import CatalogReader
from service.store.columns import Columns
from service.store.faiss_index import AllowedKeys
from service.store.filters import Filter

# Each filter costs a bit for each key, and an index of its own if it matches few.
_MAX_FILTERS, _MAX_ALONE_BYTES = 32, 1 << 26


@dataclass(frozen=True)
class Match:
    """The items that match a filter, as of one moment.

    Attributes:
        sequence: number of the last change that was considered.
        keys: of the matching items.
    """

    sequence: int
    keys: AllowedKeys


class FilterCache:
    """Results of filters, brought up to date when they are used again. Calls may come from any thread.

    Attributes:
        columns: answer new filters sooner; None until they were read, or if the store is small.
    """

    def __init__(self, reader: CatalogReader) -> None:
        self._reader = reader
        self.columns: Columns | None = None
        # Ordered from the least to the most recently used filter.
        self._known: dict[Filter, Match] = {}
        self._lock = threading.Lock()

    def get(self, where: Filter) -> Match:
        """Return which items match a filter now.

        Cost: reads the metadata of all items the first time, unless columns know the filter's fields; later that of the
        items which changed.
        """
        with self._lock:
            known = self._known.pop(where, None)
        columns = self.columns
        if known is None and columns is not None and (found := columns.matching(where, self._reader)) is not None:
            known = Match(columns.sequence, AllowedKeys.of(found))
        latest, changed, matching = self._reader.matching(where, -1 if known is None else known.sequence)
        if known is None:
            known = Match(latest, AllowedKeys.of(matching))
        elif len(changed):
            known = Match(latest, AllowedKeys(_changed(known.keys.bits, changed, matching)))
        with self._lock:
            self._known[where] = known
            while len(self._known) > _MAX_FILTERS:
                del self._known[next(iter(self._known))]
            # The filters that were used last keep the indexes of their own.
            left = _MAX_ALONE_BYTES
            for match in reversed(self._known.values()):
                left -= match.keys.alone_bytes
                if left < 0 and match.keys.alone_bytes and match is not known:
                    match.keys.placement = None
        return known


def _changed(bits: Any, off: IntArray, on: IntArray) -> Any:
    """Return a copy of the bits in which those of some keys are cleared, then those of others set."""
    longest = int(max(off.max(initial=0), on.max(initial=0))) // 8 + 1
    new = np.zeros(max(longest, len(bits)), np.uint8)
    new[: len(bits)] = bits
    np.bitwise_and.at(new, off >> 3, ~(1 << (off & 7)).astype(np.uint8))
    np.bitwise_or.at(new, on >> 3, (1 << (on & 7)).astype(np.uint8))
    return new
