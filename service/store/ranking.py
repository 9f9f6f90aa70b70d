"""From candidates to hits: exact scores, ties, and the best of each query."""

from itertools import pairwise

import numpy as np

from service import FloatArray, IntArray
from service.store import Hit
from service.store.catalog_reader import CatalogReader
from service.store.filter_cache import FilterCache
from service.store.filters import Filter
from service.store.live_index import LiveIndex

# Their intermediate results fit into the processor's cache.
_PAIRS_AT_ONCE = 256


def find_hits(
    live: LiveIndex, reader: CatalogReader, filters: FilterCache, queries: FloatArray, k: int, where: Filter | None
) -> list[list[Hit]] | None:
    """Return the k best hits of each query, best first, all as of one moment.

    Args:
        live: proposes candidates, and has their vectors, which decide.
        reader: has ids and metadata.
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
        keys = np.concatenate(candidates)
        vectors = live.vectors(keys)
        if vectors is None:
            return None
        best, scores = best_of(queries, lengths, vectors, keys, k)
        shown = reader.items_at(keys[best], live.sequence)
        if shown is None:
            return None
    ids, metadata = shown
    hits = list(map(Hit, ids, scores.tolist(), metadata))
    ends = np.cumsum(np.minimum(lengths, k)).tolist()
    return [hits[start:end] for start, end in pairwise([0, *ends])]


def best_of(
    queries: FloatArray, lengths: IntArray, vectors: FloatArray, order: IntArray, k: int
) -> tuple[IntArray, FloatArray]:
    """Return the best k of each query's own candidates, query after query.

    A score is the cosine, computed in float64 with the lengths of both vectors and rounded once, to float32; the order
    is that of the rounded scores. A vector in float32 is rarely of length 1 to the last bit, so without its length its
    product with itself would be 0.99999994 or 1.0000001; so it is 1. Equal vectors have equal scores to the last bit,
    because each score is summed by itself.

    Args:
        queries: (N, D).
        lengths: (N,) numbers of candidates.
        vectors: (M, D) of the candidates, query after query.
        order: (M,) numbers by which candidates of equal scores are ordered.
        k: 1 or more.

    Returns:
        rows: of `vectors`, best first.
        scores: float32 cosines in [−1, 1].
    """
    asked = queries.astype(np.float64)
    norms = np.sqrt(np.vecdot(asked, asked))
    owners = np.repeat(np.arange(len(queries)), lengths)
    scores = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        rows, own = vectors[part].astype(np.float64), owners[part]
        scores[part] = np.vecdot(rows, asked[own]) / (np.sqrt(np.vecdot(rows, rows)) * norms[own])
    scores = np.clip(scores, -1, 1)
    # A row for each query: many short rows are sorted sooner than all pairs by query and score. Places that a query
    # does not need are behind all others.
    starts = np.cumsum(lengths) - lengths
    columns = np.arange(len(scores)) - starts[owners]
    shape = len(queries), int(lengths.max(initial=0))
    negated, ties = np.full(shape, np.inf, np.float32), np.zeros(shape, np.int64)
    negated[owners, columns], ties[owners, columns] = -scores, order
    ranked = np.lexsort((ties, negated), axis=1)[:, :k]
    best = (ranked + starts[:, None])[ranked < lengths[:, None]]
    return best, scores[best]
