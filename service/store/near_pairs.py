"""Every pair of vectors with a score of at least a threshold: a range search of the index with its own vectors.

The scores of a block of vectors with a list of the index are computed at a time, so memory does not grow with the
square of their number. An exact index compares every list with every other. An approximate one compares each vector
with its `nprobe` lists, as its searches do, so it misses about as many pairs as they miss neighbours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidRequest
from service.store.catalog_reader import CatalogReader
from service.store.faiss_index import FaissIndex

# Of a vector with more near ones, the best so many are kept: a thousand copies make a million pairs.
_MOST_OF_ONE = 50
_MOST_PAIRS = 20_000_000
# Vectors whose scores with a list are computed at a time, and pairs whose scores are computed again at a time.
_BLOCK, _RESCORED = 1024, 4096
# Lists around a list's own centroid among which its vectors look for theirs, as a multiple of nprobe.
_AROUND = 4

_EMPTY = np.empty(0, np.int64)


@dataclass(frozen=True)
class Pairs:
    """Pairs of keys with their scores.

    Attributes:
        first, second: (P,) int64 keys, first < second, no pair twice.
        scores: (P,) float32 cosines.
        compared: keys, in order, whose pairs these are.
        sequence: number of the catalog's last change that they take into account.
    """

    first: IntArray
    second: IntArray
    scores: FloatArray
    compared: IntArray
    sequence: int

    def save(self, path: Path) -> None:
        """Write the pairs into a file. Raises OSError."""
        with path.open("wb") as file:
            np.savez(file, first=self.first, second=self.second, scores=self.scores, compared=self.compared,
                     sequence=np.asarray(self.sequence))  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> "Pairs":
        """Read a file that `save` wrote. Raises OSError or ValueError."""
        with np.load(path) as arrays:
            first, second, scores, compared = (arrays[name] for name in ("first", "second", "scores", "compared"))
            return cls(first, second, scores, compared, int(arrays["sequence"]))


class _Found(NamedTuple):
    first: IntArray
    second: IntArray
    scores: FloatArray


def near_pairs(
    index: FaissIndex,
    reader: CatalogReader,
    threshold: float,
    keys: IntArray,
    sequence: int,
    earlier: Pairs | None = None,
    progress: Callable[[float], object] = lambda _: None,
) -> Pairs:
    """Return every pair of keys whose vectors have a score of at least a threshold.

    Args:
        index: holds the vectors. Nothing else may change it meanwhile.
        reader: of the catalog, whose vectors decide about each pair that the index proposes.
        threshold: in (0, 1].
        keys: (N,) in order; only their pairs.
        sequence: number of the last change that the index holds.
        earlier: pairs of an earlier state at the same threshold. Only those of keys that are new, or whose vectors
            have changed since, are searched then.
        progress: is called with the share that is done, in [0, 1].

    Returns:
        The pairs. Of a key with more than 50 others, its best 50 at least.

    Raises:
        InvalidRequest: more than 20 million pairs: the threshold is too low.
        InvalidStore: the catalog cannot be read.

    Cost: O(N² · D / 2) for an exact index; O(N · nprobe · count / L · D) for an approximate one of L lists. Memory of
        the pairs, and of a block.
    """
    rows, kept = keys, _Found(_EMPTY, _EMPTY, np.empty(0, np.float32))
    if earlier is not None:
        changed = reader.changed(earlier.sequence)
        rows = np.setdiff1d(keys, np.setdiff1d(earlier.compared, changed))
        known = np.setdiff1d(keys, rows)
        good = np.isin(earlier.first, known) & np.isin(earlier.second, known)
        kept = _Found(earlier.first[good], earlier.second[good], earlier.scores[good])
    found = [kept]
    count = len(kept.first)
    propose = _exact if index.partition is None else _probed
    proposals = propose(index, threshold, keys, rows)
    for share, proposed in proposals:
        first, second = np.minimum(*proposed[:2]), np.maximum(*proposed[:2])
        rescored = _rescored(reader, first, second, threshold)
        found.append(rescored)
        count += len(rescored.first)
        if count > _MOST_PAIRS:
            raise InvalidRequest(
                f"threshold: {threshold:g} joins over {_MOST_PAIRS // 1_000_000} million pairs; choose a higher one"
            )
        progress(share)
    first, second, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((second, first))
    first, second, scores = first[order], second[order], scores[order]
    new = np.ones(len(first), np.bool_)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return Pairs(first[new], second[new], scores[new], keys, sequence)


def _exact(index: FaissIndex, threshold: float, keys: IntArray, rows: IntArray) -> Iterator[tuple[float, _Found]]:
    """Yield the pairs of some rows with all keys, by lists of the index, with the share that is done."""
    partial, lists = len(rows) < len(keys), index.lists
    for number in range(lists):
        own, vectors = _members(index, number, rows)
        for start in range(0, len(own), _BLOCK):
            block, some = vectors[start : start + _BLOCK], own[start : start + _BLOCK]
            parts = []
            # Without the lists before: those pairs have been found from the other side.
            for other in range(0 if partial else number, lists):
                their, theirs = _members(index, other, keys)
                parts.append(_above(some, their, block @ theirs.T, threshold - index.rounding))
            yield (number + start / len(own)) / lists, _best_of_each(parts)


def _probed(index: FaissIndex, threshold: float, keys: IntArray, rows: IntArray) -> Iterator[tuple[float, _Found]]:
    """Yield the pairs of some rows with all keys in the lists that a search for them probes."""
    assert index.partition is not None
    centroids, nprobe = index.partition.centroids, index.partition.nprobe
    # No vector of a list whose centroid is further away can be as near as the threshold: twice its angle, because a
    # vector is nearest to its own centroid.
    reach = 2 * np.arccos(min(threshold, 1.0))
    for number in range(index.lists):
        own, vectors = _members(index, number, rows)
        if not len(own):
            continue
        around = _largest(centroids @ centroids[number], _AROUND * nprobe)
        near = vectors @ centroids[around].T
        angles = np.arccos(np.clip(near, -1, 1))
        probed = np.zeros(near.shape, np.bool_)
        best = np.argpartition(-near, min(nprobe, len(around)) - 1, axis=1)[:, :nprobe]
        np.put_along_axis(probed, best, True, axis=1)
        probed &= angles <= angles.min(1, keepdims=True) + reach
        parts = []
        for column in np.flatnonzero(probed.any(0)).tolist():
            their, theirs = _members(index, int(around[column]), keys)
            mine = probed[:, column]
            parts.append(_above(own[mine], their, vectors[mine] @ theirs.T, threshold - index.rounding))
        yield number / index.lists, _best_of_each(parts)


def _members(index: FaissIndex, number: int, keys: IntArray) -> tuple[IntArray, FloatArray]:
    """Return those of the keys that a list has, and their vectors."""
    own, vectors = index.members(number)
    wanted = _among(own, keys)
    return (own, vectors) if wanted.all() else (own[wanted], vectors[wanted])


def _above(rows: IntArray, columns: IntArray, scores: FloatArray, threshold: float) -> _Found:
    """Return the pairs of a block of scores (N, M) that reach a threshold; not those of a key with itself."""
    at, to = np.nonzero(scores >= threshold)
    other = rows[at] != columns[to]
    at, to = at[other], to[other]
    return _best_of_each([_Found(rows[at], columns[to], scores[at, to])])


def _best_of_each(parts: list[_Found]) -> _Found:
    """Return the best pairs of each key that stands first."""
    if not parts:
        return _Found(_EMPTY, _EMPTY, np.empty(0, np.float32))
    first, second, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(first) <= _MOST_OF_ONE:
        return _Found(first, second, scores)
    order = np.lexsort((-scores, first))
    first, second, scores = first[order], second[order], scores[order]
    begins = np.flatnonzero(np.r_[True, first[1:] != first[:-1]])
    rank = np.arange(len(first)) - np.repeat(begins, np.diff(np.r_[begins, len(first)]))
    kept = rank < _MOST_OF_ONE
    return _Found(first[kept], second[kept], scores[kept])


def _rescored(reader: CatalogReader, first: IntArray, second: IntArray, threshold: float) -> _Found:
    """Return the pairs that reach the threshold by the catalog's own vectors."""
    kept = []
    for start in range(0, len(first), _RESCORED):
        one, other = first[start : start + _RESCORED], second[start : start + _RESCORED]
        keys, vectors = vectors_of(reader, np.unique(np.concatenate([one, other])))
        # A key that was removed meanwhile has no vector.
        there = _among(one, keys) & _among(other, keys)
        one, other = one[there], other[there]
        scores = np.einsum("nd,nd->n", vectors[np.searchsorted(keys, one)], vectors[np.searchsorted(keys, other)])
        good = scores >= threshold
        kept.append(_Found(one[good], other[good], scores[good]))
    return _Found(*(np.concatenate(part) for part in zip(*kept, strict=True))) if kept else _best_of_each([])


def vectors_of(reader: CatalogReader, keys: IntArray) -> tuple[IntArray, FloatArray]:
    """Return those of the keys that the catalog has, in order, and their vectors (N, D). Raises InvalidStore."""
    chunks = list(reader.vectors(keys))
    if not chunks:
        return _EMPTY, np.empty((0, int(reader.meta["dimension"])), np.float32)
    return np.concatenate([chunk[0] for chunk in chunks]), np.concatenate([chunk[1] for chunk in chunks])


def _among(keys: IntArray, sorted_keys: IntArray) -> np.typing.NDArray[np.bool_]:
    """Return which keys (N,) are among others in order (M,)."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.bool_)
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.asarray(sorted_keys[places] == keys)


def _largest(scores: FloatArray, count: int) -> IntArray:
    """Return the places of the largest of some numbers, in no order."""
    return np.argpartition(-scores, min(count, len(scores)) - 1)[:count]
