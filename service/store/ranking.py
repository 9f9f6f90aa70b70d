"""From candidates to hits: exact scores, ties, and the best of each query."""

from itertools import islice

import numpy as np
from numpy.typing import NDArray

from service import FloatArray, IntArray
from service.store import Hit
from service.store.catalog_reader import CatalogReader
from service.store.filter_cache import FilterCache
from service.store.filters import Filter
from service.store.live_index import LiveIndex

# Their intermediate results fit into the processor's cache.
_PAIRS_AT_ONCE = 256

DoubleArray = NDArray[np.float64]


def find_hits(
    live: LiveIndex, reader: CatalogReader, filters: FilterCache, queries: FloatArray, k: int, where: Filter | None
) -> list[list[Hit]] | None:
    """Return the k best hits of each query, best first, all as of one moment.

    Args:
        live: proposes candidates.
        reader: has their vectors, which decide.
        filters: knows which items match a filter.
        queries: (N, D), finite rows of L2 norm 1.
        k: 1 or more. Fewer hits come back if fewer items match.
        where: only items whose metadata matches; None for all.

    Returns:
        The hits. None if an item among the candidates, or one that matches the filter, changed in the catalog and not
        yet in the index: then the caller tries again.
    """
    if where is not None:
        # Outside the lock, because evaluating a filter for the first time takes long and would hold up changes.
        filters.get(where)
    with live.lock.reading():
        match = None if where is None else filters.get(where)
        if match is not None and match.sequence > live.sequence:
            return None
        candidates = live.index.candidates(queries, k, None if match is None else match.keys)
        lengths = np.asarray([len(own) for own in candidates])
        keys, places = np.unique(np.concatenate(candidates), return_inverse=True)
        vectors = reader.vectors_at(keys, live.sequence)
        if vectors is None:
            return None
        best, scores = best_of(queries, lengths, vectors, places, k)
        shown = reader.items_at(keys[np.unique(best)], live.sequence)
        if shown is None:
            return None
    found = zip(keys[best].tolist(), scores.tolist(), strict=True)
    hits = iter([Hit(id, score, metadata) for key, score in found for id, metadata in (shown[key],)])
    return [list(islice(hits, count)) for count in np.minimum(lengths, k).tolist()]


def best_of(
    queries: FloatArray, lengths: IntArray, vectors: FloatArray, places: IntArray, k: int
) -> tuple[IntArray, FloatArray]:
    """Return the best k of each query's own candidates, query after query.

    A score is the cosine, computed in float64 with the lengths of both vectors and rounded once, to float32; the order
    is that of the rounded scores. A vector in float32 is rarely of length 1 to the last bit, so without its length its
    product with itself would be 0.99999994 or 1.0000001; so it is 1. Equal vectors have equal scores to the last bit,
    because each score is summed by itself.

    Args:
        queries: (N, D).
        lengths: (N,) numbers of candidates.
        vectors: (M, D) of all candidates, without repetition.
        places: rows of `vectors` that are candidates, query after query.
        k: 1 or more.

    Returns:
        places: rows of `vectors`, best first; equal scores stand in the order of rows.
        scores: float32 cosines in [−1, 1].
    """
    exact, owners = _unit(queries), np.repeat(np.arange(len(queries)), lengths)
    scores = np.empty(len(places), np.float32)
    for start in range(0, len(places), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        scores[part] = (_unit(vectors[places[part]]) * exact[owners[part]]).sum(1)
    scores = np.clip(scores, -1, 1)
    order = np.lexsort((places, -scores, owners))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    best = order[rank < k]
    return places[best], scores[best]


def _unit(rows: FloatArray) -> DoubleArray:
    """Return rows (N, D) in float64, each divided by its length there."""
    exact = rows.astype(np.float64)
    return np.asarray(exact / np.sqrt((exact * exact).sum(1, keepdims=True)))
