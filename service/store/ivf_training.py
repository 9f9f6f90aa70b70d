"""Training of the approximate index: on the store's own vectors, and only used if its measured recall is good.

Spherical k-means on a sample gives the centroids of the lists, and the codes are 8-bit residuals. `nprobe` and
`oversampling` are the least with which vectors that were held out of the sample reach recall@10 of 0.99. How many codes
a filtered search scans is measured likewise, with random filters that match a half, a fifth and a twentieth of the
vectors.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import faiss
import numpy as np

from service import FloatArray, IntArray
from service.store.faiss_index import MIN_FILTERED_SCAN, AllowedKeys, FaissIndex, Partition

MIN_RECALL = 0.99
# Recall is measured at so many neighbours.
_NEIGHBOURS = 10
_HELD_OUT = 500
_SAMPLED_PER_LIST = 32
_ROUNDS = 8
# Vectors are compared with the held-out ones in blocks of this size, which bounds the memory.
_BLOCK = 4096
_OVERSAMPLINGS = (2, 4, 8, 16)
# The random filters match one vector in so many.
_ONE_IN = (2, 5, 20)
# The quantiser's range is wider on either side by this share, for vectors that are not in the sample.
_MARGIN = 0.1

Vectors = Callable[[IntArray | None], Iterator[tuple[IntArray, FloatArray]]]
"""Yields chunks of all keys and vectors, or of those with given keys, as CatalogReader.vectors."""


def train(
    vectors: Vectors, keys: IntArray, dimension: int, stopped: Callable[[], bool], seed: int = 0
) -> FaissIndex | None:
    """Return an approximate index of vectors with a recall@10 of at least 0.99, or None.

    Args:
        vectors: yields the vectors to index.
        keys: of all vectors. Keys without a vector by the time they are read are skipped.
        dimension: D.
        stopped: is called now and then; training gives up once it returns True.
        seed: of the samples.

    Returns:
        The index with the measured parameters. None if training was stopped, or if the lower end of the recall's 95 %
        interval stays below 0.99 for every nprobe that is tried.

    Cost: O(count · √count · D). Memory of the index twice, and of the sample: 32 vectors a list in float32.
    Source: Jégou, Douze, Schmid, Product quantization for nearest neighbor search, TPAMI 2011 (the inverted lists).
    """
    lists = 2 ** round(math.log2(4 * math.sqrt(len(keys))))
    order = np.random.default_rng(seed).permutation(len(keys))
    held_keys, held = _all(vectors, np.sort(keys[order[:_HELD_OUT]]))
    sample = _all(vectors, keys[order[_HELD_OUT : _HELD_OUT + _SAMPLED_PER_LIST * lists]])[1]
    if len(sample) < lists or not len(held):
        return None
    centroids = _centroids(sample, lists, stopped, seed)
    if centroids is None:
        return None
    sample -= centroids[_nearest(sample, centroids)]
    layout = Partition(centroids, _ranges(sample), 1, 1, _reach(sample, held), MIN_FILTERED_SCAN, len(keys), 0.0)
    index = FaissIndex(dimension, layout)
    del sample
    nearest = _Nearest(len(held))
    filtered = {one_in: _Nearest(len(held)) for one_in in _ONE_IN}
    for some, block in vectors(None):
        if stopped():
            return None
        index.add(some, block, index.assign(some, block))
        scores = held @ block.T
        # A vector is not its own neighbour.
        scores[held_keys[:, None] == some] = -np.inf
        nearest.consider(some, scores)
        for one_in, matching in filtered.items():
            match = _matches(some, one_in)
            matching.consider(some[match], scores[:, match])
    settled = _settle(index, held, nearest, stopped)
    # Frees the memory of the first index before the second is measured.
    del index
    if settled is None or not _widen_filtered_scan(settled, held, filtered, stopped):
        return None
    return settled


def _settle(index: FaissIndex, held: FloatArray, nearest: "_Nearest", stopped: Callable[[], bool]) -> FaissIndex | None:
    """Return the index with the least oversampling and nprobe that reach the recall; None if none do, or stopped."""
    lists = len(index.partition.centroids) if index.partition is not None else 0
    for oversampling in _OVERSAMPLINGS:
        for nprobe in _steps(lists):
            if stopped():
                return None
            recall = nearest.recall(index.propose(held, oversampling * _NEIGHBOURS + 1, nprobe))
            if recall[0] >= MIN_RECALL:
                return index.settled(nprobe, oversampling, recall[1])
    return None


def _widen_filtered_scan(
    index: FaissIndex, queries: FloatArray, filtered: dict[int, "_Nearest"], stopped: Callable[[], bool]
) -> bool:
    """Double the filtered scan until it reaches the recall, or covers all matches. Return False if it is stopped."""
    assert index.partition is not None
    keys = index.keys()
    for one_in, nearest in filtered.items():
        allowed = AllowedKeys.of(keys[_matches(keys, one_in)])
        while nearest.recall(index.candidates(queries, _NEIGHBOURS + 1, allowed))[0] < MIN_RECALL:
            if stopped():
                return False
            if index.partition.filtered_scan >= allowed.count:
                break
            index.partition = replace(index.partition, filtered_scan=2 * index.partition.filtered_scan)
    return True


def _matches(keys: IntArray, one_in: int) -> Any:
    """Return which keys a random filter matches, (N,) bool: one in so many, always the same."""
    return (keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(33)) % np.uint64(one_in) == 0


def _steps(lists: int) -> list[int]:
    """Return the values of nprobe to try: 1, 2, 3, 4, 6, 8, 12 … up to half of the lists."""
    steps = {step for power in range(20) for step in (2**power, 3 * 2**power // 2)}
    return sorted(step for step in steps if 1 <= step <= lists // 2)


def _all(vectors: Vectors, keys: IntArray) -> tuple[IntArray, FloatArray]:
    chunks = list(vectors(keys))
    if not chunks:
        return np.empty(0, np.int64), np.empty((0, 0), np.float32)
    return np.concatenate([chunk[0] for chunk in chunks]), np.concatenate([chunk[1] for chunk in chunks])


def _centroids(sample: FloatArray, lists: int, stopped: Callable[[], bool], seed: int) -> FloatArray | None:
    """Return the centroids (L, D) of spherical k-means, unit rows; None if it is stopped."""
    rng = np.random.default_rng(seed)
    centroids = sample[rng.permutation(len(sample))[:lists]].copy()
    for _ in range(_ROUNDS):
        if stopped():
            return None
        nearest = _nearest(sample, centroids)
        order = np.argsort(nearest, kind="stable")
        members, starts = np.unique(nearest[order], return_index=True)
        # An empty list starts again from a random vector.
        centroids = sample[rng.permutation(len(sample))[:lists]].copy()
        centroids[members] = np.add.reduceat(sample[order], starts, axis=0)
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(centroids, np.float32)


def _nearest(vectors: FloatArray, centroids: FloatArray) -> IntArray:
    flat = faiss.IndexFlatIP(centroids.shape[1])
    flat.add(centroids)
    nearest: IntArray = flat.search(vectors, 1)[1][:, 0]
    return nearest


def _ranges(residuals: FloatArray) -> FloatArray:
    """Return for each dimension the least value, then for each the width, as FAISS' 8-bit quantiser takes them."""
    least, most = residuals.min(0), residuals.max(0)
    margin = _MARGIN * (most - least) + 1e-6
    return np.concatenate([least - margin, most - least + 2 * margin]).astype(np.float32)


def _reach(residuals: FloatArray, queries: FloatArray) -> float:
    """See Partition.reach."""
    blocks = (residuals[start : start + _BLOCK] for start in range(0, len(residuals), _BLOCK))
    return max(float((queries @ block.T).max()) for block in blocks)


class _Nearest:
    """The true nearest neighbours of some vectors, from a scan of all vectors."""

    def __init__(self, count: int) -> None:
        self._scores = np.full((count, _NEIGHBOURS), -np.inf, np.float32)
        self._keys = np.full((count, _NEIGHBOURS), -1, np.int64)

    def consider(self, keys: IntArray, scores: FloatArray) -> None:
        """Take vectors into account, by their keys (N,) and their scores (count, N)."""
        scores = np.concatenate([self._scores, scores], axis=1)
        best = np.argpartition(-scores, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
        every = np.concatenate([self._keys, np.broadcast_to(keys, (len(scores), len(keys)))], axis=1)
        self._scores, self._keys = np.take_along_axis(scores, best, 1), np.take_along_axis(every, best, 1)

    def recall(self, proposed: Iterable[IntArray]) -> tuple[float, float]:
        """Return the share of the true neighbours among proposed keys: the lower end of its 95 % interval, the mean."""
        shares = np.asarray([np.isin(own, row).mean() for own, row in zip(self._keys, proposed, strict=True)])
        return float(shares.mean() - 1.96 * shares.std() / math.sqrt(len(shares))), float(shares.mean())
