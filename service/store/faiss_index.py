"""FAISS: an index of the catalog's vectors, as codes in inverted lists. It can be rebuilt from them at any time.

The exact index has float16 codes and scans every list. The approximate one has 8-bit codes, each in the list of its
nearest centroid, and probes a few lists (see ivf_training.py). Both propose candidates, and the catalog's own vectors
decide. float16 rounds by less than a known bound, so the exact index proposes every vector that can be among the best.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import faiss
import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidQuery
from service.store.snapshot import Array, Section, section

# A list that grows is copied, so several lists make each copy small. One core scans all of them, because
# FAISS' threads would wait for each other, up to 8 ms on a busy machine.
_EXACT_LISTS = 16
_MAX_LISTS = 65_536
# Upper bound on the error of a cosine with one side rounded to float16: half a unit in the last of 11 bits, plus the
# rounding of numbers below float16's smallest normal one.
_ROUNDING = 2**-11 * 1.01 + 1e-5
# The error of a cosine of two vectors from 8-bit codes is below this.
_CODE_ERROR = 0.02
# From so many vectors on it is faster to add to one list of an exact index after the other.
_MANY_TO_ADD = 512
# The exact index proposes at first so many candidates beyond k.
_EXACT_EXTRA = 24
# A filter that matches so few keys needs no index: the catalog reads their vectors at once.
_FEW_KEYS = 256
# A filtered search of an approximate index scans at least so many matching codes.
MIN_FILTERED_SCAN = 10_000
# Up to so many matching keys have an exact index of their own: in the lists they may lie so far apart that a scan takes
# longer. It takes 0.1 s to make.
_MOST_ALONE, _AT_ONCE = 32_768, 2048
# The largest difference of two cosines. In place of an unknown `reach` it rules out no list.
_MAX_REACH = 2.0


@dataclass(frozen=True)
class Partition:
    """The layout of an approximate index, learnt and measured on the store's own vectors.

    Attributes:
        centroids: (L, D) float32, unit rows. A vector lies in the list of its nearest centroid.
        ranges: (2 D,) float32, least values and widths of FAISS' 8-bit quantiser.
        nprobe: number of lists that a search without filter scans.
        oversampling: candidates per wanted neighbour.
        reach: upper bound, as measured, on how much a vector's score exceeds that of its list's centroid.
        filtered_scan: number of matching codes that a filtered search scans, if so many match.
        count: number of vectors in the store when the layout was learnt.
        recall: recall@10 measured with this layout.
    """

    centroids: FloatArray
    ranges: FloatArray
    nprobe: int
    oversampling: int
    reach: float
    filtered_scan: int
    count: int
    recall: float


class _Placement(NamedTuple):
    """Where allowed keys lie in an index: their number in each list (L,), and an exact index of them alone if few."""

    of: "FaissIndex"
    counts: IntArray
    alone: "FaissIndex | None"


class AllowedKeys:
    """The keys that a search is limited to, such as those of items that match a filter.

    Attributes:
        bits: (M,) uint8, a bit for each key from 0 on, the lowest bit of a byte first.
        count: number of keys.
        keys: (count,) in order, if they are so few that each is a candidate; else None.
        placement: where they lie in the index that was searched last.
    """

    def __init__(self, bits: Array) -> None:
        self.bits = bits
        self.count = int(np.bitwise_count(bits).sum())
        few = self.count <= _FEW_KEYS
        self.keys: IntArray | None = self.every if few else None
        self.placement: _Placement | None = None

    @property
    def alone_bytes(self) -> int:
        """Bytes of the index of these keys alone, if they have one."""
        placement = self.placement
        alone = None if placement is None else placement.alone
        return 0 if alone is None else len(alone) * (int(alone._index.code_size) + 8)

    @property
    def every(self) -> IntArray:
        """All keys, in order."""
        return np.flatnonzero(np.unpackbits(self.bits, bitorder="little"))

    @classmethod
    def of(cls, keys: IntArray) -> "AllowedKeys":
        """Limit a search to keys (N,), in any order."""
        allowed = np.zeros(int(keys.max(initial=0)) + 1, np.bool_)
        allowed[keys] = True
        return cls(np.packbits(allowed, bitorder="little"))


class FaissIndex:
    """Proposes candidates for inner-product search over (key, vector) pairs.

    Searches may run side by side. `add`, `remove` and `drop` need exclusive access; the caller ensures it. Under
    `python -O` FAISS accepts vectors of the wrong dimension, and it always stores NaN: pass vectors through `checked`.
    """

    def __init__(self, dimension: int, partition: Partition | None = None) -> None:
        """Make an empty index: exact without a partition, else approximate."""
        self.dimension = dimension
        self.partition = partition
        self._coarse = faiss.IndexFlatIP(dimension)
        if partition is None:
            self._coarse.add(np.zeros((_EXACT_LISTS, dimension), np.float32))
            self._index = self._empty_lists(_EXACT_LISTS)
            self._all_lists = np.arange(_EXACT_LISTS, dtype=np.int64)[None]
        else:
            self._coarse.add(partition.centroids)
            self._index = self._empty_lists(len(partition.centroids))
            self._parameters = _probing(partition.nprobe)
        self._lists: Any = faiss.downcast_InvertedLists(self._index.invlists)

    def _empty_lists(self, lists: int) -> Any:
        """Return an empty index of FAISS: of float16 codes if exact, else of 8-bit residuals."""
        exact = self.partition is None
        kind = faiss.ScalarQuantizer.QT_fp16 if exact else faiss.ScalarQuantizer.QT_8bit
        product = faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexIVFScalarQuantizer(self._coarse, self.dimension, lists, kind, product, not exact)
        if self.partition is not None:
            faiss.copy_array_to_vector(self.partition.ranges, index.sq.trained)
        index.is_trained = True
        return index

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def assign(self, keys: IntArray, vectors: FloatArray) -> IntArray:
        """Return the list (N,) that each vector belongs into. Searches may run meanwhile. Cost: O(N · L · D)."""
        if self.partition is None:
            return keys % _EXACT_LISTS
        if not len(keys):
            return np.empty(0, np.int64)
        lists: IntArray = self._coarse.search(np.ascontiguousarray(vectors, np.float32), 1)[1][:, 0]
        return lists

    def add(self, keys: IntArray, vectors: FloatArray, lists: IntArray) -> None:
        """Add vectors (N, D) under keys (N,) that are not in the index, into the lists that `assign` returned."""
        if self.partition is None and len(keys) >= _MANY_TO_ADD:
            codes = self._index.sq.compute_codes(np.ascontiguousarray(vectors, np.float32))
            for number in np.unique(lists).tolist():
                some = np.flatnonzero(lists == number)
                own, wanted = keys[some].astype(np.int64), codes[some]
                self._lists.add_entries(number, len(some), faiss.swig_ptr(own), faiss.swig_ptr(wanted))
            self._index.ntotal += len(keys)
        elif len(keys):
            vectors = np.ascontiguousarray(vectors, np.float32)
            keys, lists = np.ascontiguousarray(keys, np.int64), np.ascontiguousarray(lists, np.int64)
            pointers = (faiss.swig_ptr(vectors), faiss.swig_ptr(keys), faiss.swig_ptr(lists))
            self._index.add_core(len(keys), *pointers)

    def remove(self, keys: IntArray, lists: IntArray) -> None:
        """Remove keys from the lists that `assign` returned for their vectors. Cost: the length of those lists."""
        missed = [key for key, number in zip(keys.tolist(), lists.tolist(), strict=True) if not self._take(key, number)]
        # FAISS may break a tie between two centroids differently in another batch.
        if missed:
            self.drop(np.asarray(missed, np.int64))

    def _take(self, key: int, number: int) -> bool:
        size = self._lists.list_size(number)
        ids = self._ids(number, size)
        found = np.flatnonzero(ids == key)
        if not len(found):
            return False
        last = size - 1
        if found[0] != last:
            self._lists.update_entry(number, int(found[0]), int(ids[last]), self._lists.get_single_code(number, last))
        self._lists.resize(number, last)
        self._index.ntotal -= 1
        return True

    def drop(self, keys: IntArray) -> None:
        """Remove keys from all lists; unknown keys are skipped. Cost: one pass over the index."""
        if len(keys) and len(self):
            self._index.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(keys, np.int64)))

    def candidates(self, queries: FloatArray, k: int, allowed: AllowedKeys | None = None) -> list[IntArray]:
        """Return for each query the keys of candidates for its k nearest vectors.

        The exact index returns every key that can be among the k nearest. The approximate index returns
        `oversampling` · k keys from the `nprobe` lists of the nearest centroids. With `allowed` it skips lists without
        an allowed key, and scans at least twice the codes that it would scan without. Matching vectors may lie far
        from the query, so it then continues until it has scanned `filtered_scan` of them, except in lists whose
        centroid is so far that `reach` rules out a better hit.

        Args:
            queries: (N, D), as `checked` returns them.
            k: 1 or more.
            allowed: return only these keys. The object remembers where they lie in the index, so it must not be used
                again after the index has changed.

        Cost: exact O(N · count · D).
        Source: Douze et al., The Faiss library, arXiv:2401.08281.
        """
        if not len(self):
            return [np.empty(0, np.int64)] * len(queries)
        if allowed is not None and allowed.keys is not None:
            return [allowed.keys] * len(queries)
        if self.partition is not None and allowed is not None:
            return self._filtered(queries, k, allowed)
        if self.partition is not None:
            wanted = min(self.partition.oversampling * k, len(self))
            keys = self._index.search(queries, wanted, params=self._parameters)[1]
            return [row[row >= 0] for row in keys]
        selector: Any = None if allowed is None else faiss.IDSelectorBitmap(allowed.bits)  # type: ignore[call-arg, arg-type]
        every = np.repeat(self._all_lists, len(queries), axis=0)
        near = np.zeros(every.shape, np.float32)
        wanted = k + _EXACT_EXTRA
        while True:
            wanted = min(wanted, len(self))
            scores, keys = _scan(self._index, queries, wanted, every, near, selector)
            if wanted == len(self):
                break
            # Rounding may have changed two scores in opposite directions, so a vector that scores less than the k-th
            # best by more than twice the bound cannot be among the k best.
            least = scores[:, min(k, wanted) - 1] - 2 * _ROUNDING
            if np.all((scores[:, -1] < least) | (keys[:, -1] < 0)):
                break
            wanted *= 4
        least = scores[:, min(k, wanted) - 1 : min(k, wanted)] - 2 * _ROUNDING
        return [row[good] for row, good in zip(keys, (keys >= 0) & (scores >= least), strict=True)]

    def propose(self, queries: FloatArray, wanted: int, nprobe: int) -> IntArray:
        """Return the keys (N, wanted) that an approximate index with this nprobe would; -1 fills up missing ones."""
        keys: IntArray = self._index.search(queries, wanted, params=_probing(nprobe))[1]
        return keys

    def settled(self, nprobe: int, oversampling: int, recall: float) -> "FaissIndex":
        """Return a copy with measured parameters, whose lists take no more memory than they need."""
        assert self.partition is not None
        measured = replace(self.partition, nprobe=nprobe, oversampling=oversampling, recall=recall)
        same = FaissIndex(self.dimension, measured)
        for number in range(self._lists.nlist):
            if size := self._lists.list_size(number):
                same._lists.add_entries(number, size, self._lists.get_ids(number), self._lists.get_codes(number))
        same._index.ntotal = len(self)
        return same

    def _filtered(self, queries: FloatArray, k: int, allowed: AllowedKeys) -> list[IntArray]:
        """Return the candidates of an approximate index among allowed keys."""
        assert self.partition is not None
        placement, wanted = self._placement(allowed), min(self.partition.oversampling * k, allowed.count)
        if placement.alone is not None:
            return placement.alone.candidates(queries, wanted)
        # vecdot computes a single query without BLAS' threads, which wait for each other: 8 ms on a busy machine.
        centroids = self.partition.centroids
        near = np.vecdot(centroids, queries) if len(queries) == 1 else queries @ centroids.T
        near = near.reshape(len(queries), -1)
        order = np.argsort(-near, axis=1)
        near, counts = np.take_along_axis(near, order, 1), placement.counts[order]
        any_there, before = counts > 0, np.cumsum(counts, axis=1) - counts

        selector: Any = faiss.IDSelectorBitmap(allowed.bits)  # type: ignore[call-arg, arg-type]

        def scan(chosen: Any) -> tuple[FloatArray, IntArray]:
            """Return scores and keys of the best in chosen lists (N, L)."""
            if len(queries) == 1:
                used = np.flatnonzero(chosen)[None]
                return _scan(self._index, queries, wanted, order[:, used[0]], near[:, used[0]], selector)
            used = np.argsort(~chosen, axis=1, kind="stable")[:, : max(int(chosen.sum(1).max()), 1)]
            lists = np.take_along_axis(np.where(chosen, order, -1), used, 1)
            return _scan(self._index, queries, wanted, lists, np.take_along_axis(near, used, 1), selector)

        usual = 2 * self.partition.nprobe * len(self) // len(placement.counts)
        scores, keys = scan(any_there & (before < usual))
        least = scores[:, min(k, wanted) - 1 : min(k, wanted)]
        more = any_there & (before >= usual) & (before < self.partition.filtered_scan)
        more &= near + self.partition.reach >= least
        if more.any():
            more_scores, more_keys = scan(more)
            best = np.argsort(-np.concatenate([scores, more_scores], axis=1), axis=1, kind="stable")[:, :wanted]
            keys = np.take_along_axis(np.concatenate([keys, more_keys], axis=1), best, 1)
        return [row[row >= 0] for row in keys]

    def _placement(self, allowed: AllowedKeys) -> _Placement:
        """Return where allowed keys lie, found out at their first use. Cost: reads all keys of the index."""
        # Another thread may take it away to save memory.
        placement = allowed.placement
        if placement is None or placement.of is not self:
            sizes = [self._lists.list_size(number) for number in range(self._lists.nlist)]
            ids = np.concatenate([self._ids(number, size) for number, size in enumerate(sizes)])
            known = ids >> 3 < len(allowed.bits)
            good = np.zeros(len(ids), np.bool_)
            good[known] = allowed.bits[ids[known] >> 3] >> (ids[known] & 7).astype(np.uint8) & 1
            ends = np.cumsum([0, *sizes])
            counts = np.diff(np.concatenate([[0], np.cumsum(good, dtype=np.int64)])[ends])
            alone = self._alone(np.flatnonzero(good), ids[good], sizes, counts) if counts.sum() <= _MOST_ALONE else None
            placement = allowed.placement = _Placement(self, counts, alone)
        return placement

    def _alone(self, places: IntArray, keys: IntArray, sizes: list[int], counts: IntArray) -> "FaissIndex":
        """Return an exact index of members, of their vectors as the codes have them.

        Args:
            places: (N,) of the members, counted through all lists.
            keys: (N,) of the members.
            sizes: of the lists.
            counts: (L,) members of each list.
        """
        assert self.partition is not None
        alone, ends = FaissIndex(self.dimension), np.cumsum([0, *sizes]).tolist()
        starts = np.concatenate([[0], np.cumsum(counts)])
        # Some lists at a time, because their vectors fit into the processor's cache.
        for numbers in np.array_split(np.flatnonzero(counts), len(keys) // _AT_ONCE + 1):
            if not len(numbers):
                continue
            codes = [
                self._codes(number, sizes[number]).reshape(sizes[number], -1)[places[start:stop] - ends[number]]
                for number, start, stop in zip(
                    numbers.tolist(), starts[numbers].tolist(), starts[numbers + 1].tolist(), strict=True
                )
            ]
            vectors: FloatArray = self._index.sq.decode(np.concatenate(codes))
            vectors += np.repeat(self.partition.centroids[numbers], counts[numbers], axis=0)
            own = keys[starts[numbers[0]] : starts[numbers[-1] + 1]]
            alone.add(own, vectors, alone.assign(own, vectors))
        return alone

    def _ids(self, number: int, size: int) -> IntArray:
        if not size:
            return np.empty(0, np.int64)
        ids: IntArray = faiss.rev_swig_ptr(self._lists.get_ids(number), size)
        return ids

    def _codes(self, number: int, size: int) -> Array:
        if not size:
            return np.empty(0, np.uint8)
        codes: Array = faiss.rev_swig_ptr(self._lists.get_codes(number), size * self._lists.code_size)
        return codes

    # As arrays ---------------------------------------------------------------------------------------

    @property
    def lists(self) -> int:
        """The number of lists."""
        return int(self._lists.nlist)

    @property
    def rounding(self) -> float:
        """Upper bound on the error of a score of two members; as measured for an approximate index."""
        return 2 * _ROUNDING if self.partition is None else _CODE_ERROR

    def members(self, number: int) -> tuple[IntArray, FloatArray]:
        """Return the keys (N,) of a list and their vectors (N, D), rounded as its codes are."""
        size = self._lists.list_size(number)
        if not size:
            return np.empty(0, np.int64), np.empty((0, self.dimension), np.float32)
        codes = self._codes(number, size).reshape(size, -1)
        vectors: FloatArray = (
            codes.view("<f2").astype(np.float32) if self.partition is None else self._index.sq.decode(codes)
        )
        if self.partition is not None:
            vectors += self.partition.centroids[number]
        # A copy: the list may move in memory.
        return self._ids(number, size).copy(), vectors

    def keys(self) -> IntArray:
        """Return all keys, in order."""
        parts = [self._ids(number, self._lists.list_size(number)) for number in range(self._lists.nlist)]
        return np.sort(np.concatenate(parts))

    def holds(self, keys: IntArray, vectors: FloatArray) -> bool:
        """Whether the index holds these keys (N,) with the codes of these vectors (N, D)."""
        alike = FaissIndex(self.dimension, self.partition)
        alike.add(keys, vectors, lists := self.assign(keys, vectors))
        return all(
            alike._code(key, n) == self._code(key, n) for key, n in zip(keys.tolist(), lists.tolist(), strict=True)
        )

    def _code(self, key: int, number: int) -> bytes | None:
        size = self._lists.list_size(number)
        found = np.flatnonzero(self._ids(number, size) == key)
        return self._codes(number, size).reshape(size, -1)[found[0]].tobytes() if len(found) else None

    def sections(self) -> tuple[dict[str, Any], list[Section]]:
        """Return the facts and sections of a snapshot. They are views: write them before the index changes."""
        lengths = np.asarray([self._lists.list_size(number) for number in range(self._lists.nlist)], "<i8")
        count = int(lengths.sum())
        sections = [
            section("lengths", lengths),
            Section("keys", "<i8", (count,), (self._ids(n, size) for n, size in enumerate(lengths.tolist()))),
            Section(
                "codes",
                "|u1",
                (count, self._lists.code_size),
                (self._codes(n, size) for n, size in enumerate(lengths.tolist())),
            ),
        ]
        facts: dict[str, Any] = {"dimension": self.dimension, "count": count}
        if self.partition is not None:
            one = self.partition
            sections += [section("centroids", one.centroids), section("ranges", one.ranges)]
            facts |= {"probes": one.nprobe, "spare": one.oversampling, "reach": one.reach}
            facts |= {"seen": one.filtered_scan, "built": one.count, "recall": one.recall}
        return facts, sections

    @classmethod
    def of_arrays(cls, dimension: int, facts: dict[str, Any], arrays: dict[str, Array]) -> "FaissIndex":
        """Return an index from the facts and arrays of a snapshot, whose sections `sections` returned.

        Raises:
            ValueError: the arrays are not those of an index of this dimension.
        """
        index = cls(dimension, _partition(dimension, facts, arrays))
        lists, code_size = index._lists.nlist, index._lists.code_size
        lengths, keys, codes = (arrays.get(name, np.empty(0)) for name in ("lengths", "keys", "codes"))
        _expect(facts.get("dimension") == dimension, "dimension")
        _expect(lengths.dtype == np.int64 and lengths.shape == (lists,) and bool((lengths >= 0).all()), "lengths")
        _expect(keys.dtype == np.int64 and keys.shape == (facts.get("count"),), "keys")
        _expect(bool((lengths <= len(keys)).all()) and int(lengths.sum()) == len(keys), "lengths")
        _expect(codes.dtype == np.uint8 and codes.shape == (len(keys), code_size), "codes")
        ends = np.cumsum(lengths)
        for number, (size, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
            if size:
                one, many = keys[end - size : end], codes[end - size : end]
                index._lists.add_entries(number, size, faiss.swig_ptr(one), faiss.swig_ptr(many))
        index._index.ntotal = len(keys)
        return index


def _scan(
    index: Any, queries: FloatArray, k: int, lists: IntArray, near: FloatArray, selector: Any
) -> tuple[FloatArray, IntArray]:
    """Return scores and keys (N, k) of the best in given lists (N, L) of an index of FAISS.

    `near` are the scores (N, L) of the lists' centroids, `selector` limits the keys; -1 fills up missing ones.
    """
    lists, near = np.ascontiguousarray(lists, np.int64), np.ascontiguousarray(near, np.float32)
    scores, keys = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    chosen = faiss.SearchParametersIVF(nprobe=lists.shape[1], sel=selector)  # type: ignore[call-arg]
    pointers = [faiss.swig_ptr(array) for array in (lists, near, scores, keys)]
    index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), k, *pointers, False, chosen)
    return scores, keys


def _probing(nprobe: int) -> Any:
    return faiss.SearchParametersIVF(nprobe=nprobe)  # type: ignore[call-arg]


def checked(vectors: FloatArray, dimension: int) -> FloatArray:
    """Return vectors as C-contiguous float32.

    Raises:
        InvalidQuery: not (N, D), not finite, or a row's L2 norm not 1 (within 1e-3).
    """
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise InvalidQuery(f"expected vectors of {dimension} numbers, got shape {vectors.shape}")
    # A number that is not finite makes the square so, too.
    squares = np.vecdot(vectors, vectors)
    if not np.isfinite(squares).all():
        raise InvalidQuery("a vector holds a number that is not finite")
    if (np.abs(squares - 1) > 2e-3).any():
        raise InvalidQuery("a vector is not of length 1")
    return np.ascontiguousarray(vectors, np.float32)


def _partition(dimension: int, facts: dict[str, Any], arrays: dict[str, Array]) -> Partition | None:
    if "centroids" not in arrays:
        return None
    centroids, ranges = arrays["centroids"], arrays.get("ranges", np.empty(0))
    _expect(centroids.dtype == np.float32 and centroids.ndim == 2 and centroids.shape[1] == dimension, "centroids")
    _expect(1 <= len(centroids) <= _MAX_LISTS and bool(np.isfinite(centroids).all()), "centroids")
    _expect(
        ranges.dtype == np.float32 and ranges.shape == (2 * dimension,) and bool(np.isfinite(ranges).all()), "ranges"
    )
    numbers = [facts.get(name) for name in ("probes", "spare", "built")]
    nprobe, oversampling, count = (number if type(number) is int else 0 for number in numbers)
    _expect(1 <= nprobe <= len(centroids) and 1 <= oversampling <= 1000 and count >= 1, "probes")
    reach, scan, recall = (facts.get(name) for name in ("reach", "seen", "recall"))
    if not isinstance(reach, float) or not -_MAX_REACH <= reach <= _MAX_REACH:
        reach = _MAX_REACH
    scan = scan if type(scan) is int and scan > MIN_FILTERED_SCAN else MIN_FILTERED_SCAN
    recall = recall if isinstance(recall, float) else 0.0
    return Partition(centroids, ranges, nprobe, oversampling, reach, scan, count, recall)


def _expect(good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"its {what} are not those of an index")
