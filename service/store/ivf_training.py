"""An index that looks at a part of the store: learnt on the store's own vectors, used when its recall is measured.

Centroids by spherical k-means on a sample; the vectors in the list of their nearest centroid, as 8-bit residuals. How
many lists a search looks into is chosen by recall@10 on vectors that were held out of the sample; how many of those
that meet a filter it looks at, by recall@10 with filters that a half, a fifth and a twentieth of all meet by chance.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import faiss
import numpy as np

from service import FloatArray, IntArray
from service.store.faiss_index import LEAST_SEEN, Among, FaissIndex, Partition

LEAST_RECALL = 0.99
_NEIGHBOURS = 10  # recall is measured at
_HELD_OUT = 500
_SAMPLED_A_LIST = 32
_ROUNDS = 8
_BLOCK = 4096  # vectors at a time beside all that were held out
_SPARES = (2, 4, 8, 16)
_ONE_OF = (2, 5, 20)  # meets a filter
_MARGIN = 0.1  # of the quantiser's range on either side, for vectors that were not in the sample

Vectors = Callable[[IntArray | None], Iterator[tuple[IntArray, FloatArray]]]
"""All keys and vectors, or those of some keys, chunk by chunk; as Catalog.vectors."""


def approximate(
    vectors: Vectors, keys: IntArray, dimension: int, stopped: Callable[[], bool], seed: int = 0
) -> FaissIndex | None:
    """Return an approximate index of vectors with a recall@10 of 0.99 or more, or None.

    Args:
        vectors: what to index.
        keys: of all of them; those that are gone by the time they are read are passed over.
        dimension: D.
        stopped: asked now and then whether to give up.
        seed: of the samples.

    Returns:
        The index; its partition says what was measured. None where `stopped` says so, or where looking at a part
        of these vectors does not find enough: the lower end of the recall's 95 % interval stays below 0.99.

    Cost: O(count · √count · D); memory of the index twice, and of the sample: 32 vectors a list in float32.
    Source: Jégou, Douze, Schmid, Product quantization for nearest neighbor search, TPAMI 2011 (the inverted lists).
    """
    lists = 2 ** round(math.log2(4 * math.sqrt(len(keys))))
    order = np.random.default_rng(seed).permutation(len(keys))
    held_keys = np.sort(keys[order[:_HELD_OUT]])
    held = _all(vectors, held_keys)
    sample = _all(vectors, keys[order[_HELD_OUT : _HELD_OUT + _SAMPLED_A_LIST * lists]])[1]
    if len(sample) < lists or not len(held[0]):
        return None
    centroids = _centroids(sample, lists, stopped, seed)
    if centroids is None:
        return None
    sample -= centroids[_nearest(sample, centroids)]
    learnt = Partition(centroids, _ranges(sample), 1, 1, _reach(sample, held[1]), LEAST_SEEN, len(keys), 0.0)
    index = FaissIndex(dimension, learnt)
    del sample
    nearest = _Nearest(len(held[0]))
    filtered = {one_of: _Nearest(len(held[0])) for one_of in _ONE_OF}
    for some, block in vectors(None):
        if stopped():
            return None
        index.add(some, block, index.assign(some, block))
        scores = held[1] @ block.T
        scores[held[0][:, None] == some] = -np.inf  # each without itself
        nearest.look_at(some, scores)
        for one_of, those in filtered.items():
            met = _meet(some, one_of)
            those.look_at(some[met], scores[:, met])
    for spare in _SPARES:
        for probes in _steps(lists):
            if stopped():
                return None
            recall = nearest.recall(index.propose(held[1], spare * _NEIGHBOURS + 1, probes))
            if recall[0] >= LEAST_RECALL:
                settled = index.settled(probes, spare, recall[1])
                del index
                return settled if _see_enough(settled, held[1], filtered, stopped) else None
    return None


def _see_enough(
    index: FaissIndex, queries: FloatArray, filtered: dict[int, "_Nearest"], stopped: Callable[[], bool]
) -> bool:
    """Settle how many of those that meet a filter a search looks at: enough, or all. False where it is stopped."""
    assert index.partition is not None
    keys = index.keys()
    for one_of, nearest in filtered.items():
        among = Among.of(keys[_meet(keys, one_of)])
        while nearest.recall(index.candidates(queries, _NEIGHBOURS + 1, among))[0] < LEAST_RECALL:
            if stopped():
                return False
            if index.partition.seen >= among.count:
                break
            index.partition = replace(index.partition, seen=2 * index.partition.seen)
    return True


def _meet(keys: IntArray, one_of: int) -> Any:
    """Which keys meet a filter that one of so many does, by chance and for good: (N,) bool."""
    return (keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(33)) % np.uint64(one_of) == 0


def _steps(lists: int) -> list[int]:
    """Numbers of lists to try: 1, 2, 3, 4, 6, 8, 12 …, not all."""
    steps = {step for power in range(20) for step in (2**power, 3 * 2**power // 2)}
    return sorted(step for step in steps if 1 <= step <= lists // 2)


def _all(vectors: Vectors, keys: IntArray) -> tuple[IntArray, FloatArray]:
    chunks = list(vectors(keys))
    if not chunks:
        return np.empty(0, np.int64), np.empty((0, 0), np.float32)
    return np.concatenate([chunk[0] for chunk in chunks]), np.concatenate([chunk[1] for chunk in chunks])


def _centroids(sample: FloatArray, lists: int, stopped: Callable[[], bool], seed: int) -> FloatArray | None:
    """Spherical k-means: (L, D), unit rows; None where it is stopped."""
    rng = np.random.default_rng(seed)
    centroids = sample[rng.permutation(len(sample))[:lists]].copy()
    for _ in range(_ROUNDS):
        if stopped():
            return None
        nearest = _nearest(sample, centroids)
        order = np.argsort(nearest, kind="stable")
        members, starts = np.unique(nearest[order], return_index=True)
        centroids = sample[rng.permutation(len(sample))[:lists]].copy()  # a list that nobody is in begins anew
        centroids[members] = np.add.reduceat(sample[order], starts, axis=0)
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(centroids, np.float32)


def _nearest(vectors: FloatArray, centroids: FloatArray) -> IntArray:
    flat = faiss.IndexFlatIP(centroids.shape[1])
    flat.add(centroids)
    nearest: IntArray = flat.search(vectors, 1)[1][:, 0]
    return nearest


def _ranges(residuals: FloatArray) -> FloatArray:
    """Of each number of them the least, then the width: what FAISS' 8-bit quantiser wants."""
    least, most = residuals.min(0), residuals.max(0)
    margin = _MARGIN * (most - least) + 1e-6
    return np.concatenate([least - margin, most - least + 2 * margin]).astype(np.float32)


def _reach(residuals: FloatArray, queries: FloatArray) -> float:
    """See Partition.reach."""
    blocks = (residuals[start : start + _BLOCK] for start in range(0, len(residuals), _BLOCK))
    return max(float((queries @ block.T).max()) for block in blocks)


class _Nearest:
    """The true nearest of some vectors, found by looking at every vector."""

    def __init__(self, count: int) -> None:
        self._scores = np.full((count, _NEIGHBOURS), -np.inf, np.float32)
        self._keys = np.full((count, _NEIGHBOURS), -1, np.int64)

    def look_at(self, keys: IntArray, scores: FloatArray) -> None:
        """Take vectors into account by their keys (N,) and what they score (count, N)."""
        scores = np.concatenate([self._scores, scores], axis=1)
        best = np.argpartition(-scores, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
        every = np.concatenate([self._keys, np.broadcast_to(keys, (len(scores), len(keys)))], axis=1)
        self._scores, self._keys = np.take_along_axis(scores, best, 1), np.take_along_axis(every, best, 1)

    def recall(self, proposed: Iterable[IntArray]) -> tuple[float, float]:
        """The share of the true nearest that were proposed: the lower end of its 95 % interval, and the mean."""
        shares = np.asarray([np.isin(own, row).mean() for own, row in zip(self._keys, proposed, strict=True)])
        return float(shares.mean() - 1.96 * shares.std() / math.sqrt(len(shares))), float(shares.mean())
