"""What scores mean in a store: those of strangers and of nearest neighbours, and the bounds between the bands of hits.

A hit from `near` on shows nearly the same as the query, one from `alike` on is like it, and the others may be anything.
"""

import math
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service import FloatArray, IntArray
from service.duplicates import threshold_of
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from service.store.near_pairs import vectors_of

# Fewer items tell nothing.
_LEAST = 20
# Items whose scores with each other are those of strangers, and items whose neighbours are looked up, so many at once.
_STRANGERS, _SAMPLED, _AT_ONCE = 2000, 256, 16
# Neighbours in which one that is not the same file is looked for.
_K = 5
# One standard deviation above the middle, of a normal distribution.
_Q84 = 0.8413
_NICENESS = 19


class Scores(NamedTuple):
    """Scores in a store; None where it has too few items to tell.

    Attributes:
        near: least score of pictures that show nearly the same: the threshold of the preset near of duplicates.
        alike: least score of pictures that are alike.
        strangers: quantiles 0.05, 0.5 and 0.95 of the scores of two items of the store.
        neighbours: the same quantiles of the scores of an item with its nearest other one that is not the same file.
        sampled: number of the items that were sampled.
    """

    near: float | None
    alike: float | None
    strangers: list[float] | None
    neighbours: list[float] | None
    sampled: int


class Bands:
    """The scores of stores, measured again when the number of changes has doubled. Calls may come from any thread."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._thread = ThreadPoolExecutor(1, "bands", _yield_to_others)
        self._known: dict[Path, tuple[tuple[int, bool], Future[Scores]]] = {}
        self._lock = threading.Lock()

    def soon(self, store: EmbeddedStore, facts: dict[str, Any]) -> "Future[Scores]":
        """Return the scores of a store, which may still be being measured, on a thread of low priority.

        Args:
            store: whose scores.
            facts: the encoder's card.
        """
        mark = store.sequence().bit_length(), store.count() >= _LEAST
        with self._lock:
            known, future = self._known.get(store.folder, (None, None))
            if future is None or known != mark or (future.done() and future.exception() is not None):
                future = self._thread.submit(measure, store, facts)
                self._known[store.folder] = mark, future
            return future

    def close(self) -> None:
        """Wait for what is being measured."""
        self._thread.shutdown(cancel_futures=True)


def measure(store: EmbeddedStore, facts: dict[str, Any]) -> Scores:
    """Return the scores of a store.

    Args:
        store: whose scores.
        facts: the encoder's card.

    Raises:
        InvalidModel: as `threshold_of`.
        InvalidStore: the store cannot be read.

    Cost: the vectors of 2,000 items with each other, and 256 searches.
    """
    count = store.count()
    if count < _LEAST:
        return Scores(None, None, None, None, 0)
    near = threshold_of("near", facts, store.folder)
    reader = CatalogReader(store.folder)
    try:
        keys = np.random.default_rng(0).permutation(reader.keys())
        vectors = vectors_of(reader, keys[:_STRANGERS])[1]
        neighbours = _neighbours(store, reader, keys[:_SAMPLED])
    finally:
        reader.close()
    pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    strangers = _quantiles(pairs, 0.05, 0.5, 0.95)
    deviation = float(np.quantile(pairs, _Q84)) - strangers[1]
    # The highest of `count` scores, if they were normally distributed. Where strangers are of a few kinds, such as ten
    # digits, the distribution has a long end, and half of the way to `near` is better (docs/experiments.md).
    highest = strangers[1] + math.sqrt(2 * math.log(count)) * deviation
    # Where all items are alike, strangers have higher scores than `near`.
    alike = round(min(near, max(strangers[2], min(highest, (strangers[2] + near) / 2))), 4)
    # Where all items are copies of one file there is no neighbour.
    nearest = _quantiles(neighbours, 0.05, 0.5, 0.95) if len(neighbours) else None
    return Scores(near, alike, strangers, nearest, len(neighbours))


def _neighbours(store: EmbeddedStore, reader: CatalogReader, keys: IntArray) -> FloatArray:
    """Return the scores of items with their nearest other ones that are not the same file, as far as they have one."""
    found = []
    for start in range(0, len(keys), _AT_ONCE):
        some, queries = vectors_of(reader, np.sort(keys[start : start + _AT_ONCE]))
        items = dict(reader.items_of(some))
        for key, hits in zip(some.tolist(), store.search(queries, _K), strict=True):
            # An item may have been removed meanwhile.
            item = items.get(key)
            others = [] if item is None else [hit for hit in hits if _digest(store, hit.id) not in (None, item.digest)]
            found += [hit.score for hit in others[:1]]
    return np.asarray(found, np.float32)


def _digest(store: EmbeddedStore, id: str) -> str | None:
    item = store.get(id)
    return None if item is None else item.digest


def _quantiles(scores: FloatArray, *shares: float) -> list[float]:
    return [round(float(value), 4) for value in np.quantile(scores, shares)]


def _yield_to_others() -> None:
    # Linux counts each thread as a process here.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
