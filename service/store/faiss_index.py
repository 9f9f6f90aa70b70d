"""FAISS: a rebuildable cache of the catalog's vectors, as codes in inverted lists.

Up to `exact_limit` the codes are float16 and every list is scanned; above it they are 8-bit and lie in the list of
their nearest centroid (see approximation.py). Either way the index proposes candidates and the catalog's own vectors
decide: float16 rounds by less than a known bound, so the exact index proposes all that can be among the best.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import faiss
import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidQuery
from service.store.snapshot import Array, Section, section

# So that growing means to copy one of them. One core scans them all: FAISS could share them out, but its threads wait
# for each other, and where anybody else is at work that takes 8 ms.
_EXACT_LISTS = 16
_MOST_LISTS = 65_536
# Of a cosine, by rounding one side to float16: half a unit in the last of 11 bits, and what lies below float16's
# smallest normal number.
_ROUNDING = 2**-11 * 1.01 + 1e-5
_EXACT_SPARE = 24  # candidates beyond k at first
_FEW = 256  # of keys: as many are read from the catalog in no time
LEAST_SEEN = 10_000  # of those that meet a filter in an approximate index; up to so many have their codes side by side
_FARTHEST = 2.0  # two cosines differ by no more; of an index that was made before its reach was measured


@dataclass(frozen=True)
class Partition:
    """How an approximate index is laid out; all of it is learnt or measured on the store's own vectors.

    Attributes:
        centroids: (L, D) float32, unit rows; a vector lies in the list of the one most like it.
        ranges: what FAISS' 8-bit quantiser learnt.
        probes: lists that a search looks into.
        spare: candidates for each wanted neighbour.
        reach: how much more alike to a query a vector is than the centroid of its list: the most that was measured.
        seen: how many of those that meet a filter a search looks at, where so many do.
        count: vectors in the store when it was made.
        recall: recall@10 measured with these.
    """

    centroids: FloatArray
    ranges: FloatArray
    probes: int
    spare: int
    reach: float
    seen: int
    count: int
    recall: float


class _Tally(NamedTuple):
    """Some keys as an index has them: how many are in each list (L,), and the codes of few side by side."""

    of: "FaissIndex"
    counts: IntArray
    codes: Any


class Among:
    """The keys that a search is limited to.

    Attributes:
        bits: one for each key, the lowest of the first byte for key 0.
        count: of keys.
        keys: themselves, in order, where they are so few that each is a candidate; else None.
    """

    def __init__(self, bits: Array) -> None:
        self.bits = bits
        self.count = int(np.bitwise_count(bits).sum())
        few = self.count <= _FEW
        self.keys: IntArray | None = np.flatnonzero(np.unpackbits(bits, bitorder="little")) if few else None
        self.tally: _Tally | None = None

    @classmethod
    def of(cls, keys: IntArray) -> "Among":
        """Limit a search to keys, in any order."""
        met = np.zeros(int(keys.max(initial=0)) + 1, np.bool_)
        met[keys] = True
        return cls(np.packbits(met, bitorder="little"))


class FaissIndex:
    """Candidates for inner-product search over (key, vector) pairs.

    Searches may run together; `add`, `remove` and `drop` exclude them and each other, and the caller sees to that.
    FAISS itself takes a wrong D without a word under `python -O`, stores NaN, and pads with −1: `checked` looks.
    """

    def __init__(self, dimension: int, partition: Partition | None = None) -> None:
        """Make an empty index: exact without a partition."""
        self.dimension = dimension
        self.partition = partition
        self._coarse = faiss.IndexFlatIP(dimension)
        if partition is None:
            self._coarse.add(np.zeros((_EXACT_LISTS, dimension), np.float32))
            self._index = self._make(faiss.ScalarQuantizer.QT_fp16, _EXACT_LISTS, residual=False)
            self._all_lists = np.arange(_EXACT_LISTS, dtype=np.int64)[None]
        else:
            self._coarse.add(partition.centroids)
            self._index = self._quantised(len(partition.centroids))
            self._parameters = _probing(partition.probes)
        self._index.is_trained = True
        self._lists: Any = faiss.downcast_InvertedLists(self._index.invlists)

    def _make(self, kind: int, lists: int, residual: bool) -> Any:
        product = faiss.METRIC_INNER_PRODUCT
        return faiss.IndexIVFScalarQuantizer(self._coarse, self.dimension, lists, kind, product, residual)

    def _quantised(self, lists: int) -> Any:
        """Empty lists of 8-bit residuals."""
        assert self.partition is not None
        index = self._make(faiss.ScalarQuantizer.QT_8bit, lists, residual=True)
        faiss.copy_array_to_vector(self.partition.ranges, index.sq.trained)
        index.is_trained = True
        return index

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def assign(self, keys: IntArray, vectors: FloatArray) -> IntArray:
        """Return the list that each vector belongs into. Needs no exclusion. Cost: O(N · L · D)."""
        if self.partition is None:
            return keys % _EXACT_LISTS
        if not len(keys):
            return np.empty(0, np.int64)
        lists: IntArray = self._coarse.search(np.ascontiguousarray(vectors, np.float32), 1)[1][:, 0]
        return lists

    def add(self, keys: IntArray, vectors: FloatArray, lists: IntArray) -> None:
        """Add vectors (N, D) under keys that are not in the index, into the lists that `assign` gave."""
        if len(keys):
            vectors = np.ascontiguousarray(vectors, np.float32)
            keys, lists = np.ascontiguousarray(keys, np.int64), np.ascontiguousarray(lists, np.int64)
            pointers = (faiss.swig_ptr(vectors), faiss.swig_ptr(keys), faiss.swig_ptr(lists))
            self._index.add_core(len(keys), *pointers)

    def remove(self, keys: IntArray, lists: IntArray) -> None:
        """Remove keys from the lists that `assign` gave for their vectors. Cost: the length of those lists."""
        missed = [key for key, number in zip(keys.tolist(), lists.tolist(), strict=True) if not self._take(key, number)]
        if missed:  # a tie between centroids may be decided otherwise in another batch
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
        """Remove keys wherever they are; those that are not there are passed over. Cost: one pass over the index."""
        if len(keys) and len(self):
            self._index.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(keys, np.int64)))

    def candidates(self, queries: FloatArray, k: int, among: Among | None = None) -> list[IntArray]:
        """Return for each query the keys among which its k nearest are looked for.

        Of an exact index these are all that can be among the k nearest. Of an approximate one they are
        `spare` · k, from the lists of the nearest `probes` centroids. With `among` lists in which there is none of
        them are passed over, and the search sees twice as many of them as it would have without. Those that meet a
        filter may be anywhere: it goes on until it has looked at `seen`, in lists which `reach` does not rule out.

        Args:
            queries: (N, D), as `checked` gives them.
            k: 1 or more.
            among: look at these keys alone. It holds for the index as it is now: its lists are counted once.

        Cost: exact O(N · count · D).
        Source: Douze et al., The Faiss library, arXiv:2401.08281.
        """
        if not len(self):
            return [np.empty(0, np.int64)] * len(queries)
        if among is not None and among.keys is not None:
            return [among.keys] * len(queries)
        if self.partition is not None and among is not None:
            return self._filtered(queries, k, among)
        if self.partition is not None:
            wanted = min(self.partition.spare * k, len(self))
            keys = self._index.search(queries, wanted, params=self._parameters)[1]
            return [row[row >= 0] for row in keys]
        selector: Any = None if among is None else faiss.IDSelectorBitmap(among.bits)  # type: ignore[call-arg, arg-type]
        every = np.repeat(self._all_lists, len(queries), axis=0)
        near = np.zeros(every.shape, np.float32)
        wanted = k + _EXACT_SPARE
        while True:
            wanted = min(wanted, len(self))
            scores, keys = _scan(self._index, queries, wanted, every, near, selector)
            if wanted == len(self):
                break
            # The k-th best has a true score of at least this less the rounding; what has a lower one is out.
            least = scores[:, min(k, wanted) - 1] - 2 * _ROUNDING
            if np.all((scores[:, -1] < least) | (keys[:, -1] < 0)):
                break
            wanted *= 4
        least = scores[:, min(k, wanted) - 1 : min(k, wanted)] - 2 * _ROUNDING
        return [row[good] for row, good in zip(keys, (keys >= 0) & (scores >= least), strict=True)]

    def propose(self, queries: FloatArray, wanted: int, probes: int) -> IntArray:
        """Return candidates (N, wanted) as an approximate index of so many probes would; -1 where there are fewer."""
        keys: IntArray = self._index.search(queries, wanted, params=_probing(probes))[1]
        return keys

    def settled(self, probes: int, spare: int, recall: float) -> "FaissIndex":
        """Return the same index with what was measured, its lists no larger than they must be."""
        assert self.partition is not None
        same = FaissIndex(self.dimension, replace(self.partition, probes=probes, spare=spare, recall=recall))
        for number in range(self._lists.nlist):
            if size := self._lists.list_size(number):
                same._lists.add_entries(number, size, self._lists.get_ids(number), self._lists.get_codes(number))
        same._index.ntotal = len(self)
        return same

    def _filtered(self, queries: FloatArray, k: int, among: Among) -> list[IntArray]:
        """As `candidates`, of an approximate index and of the keys that meet a filter."""
        assert self.partition is not None
        tally, wanted = self._tally(among), min(self.partition.spare * k, among.count)
        # One query is not worth BLAS' threads, which wait for each other: where anybody else is at work, for 8 ms.
        near = np.einsum("nd,ld->nl", queries, self.partition.centroids, optimize=len(queries) > 1)
        order = np.argsort(-near, axis=1)
        near, counts = np.take_along_axis(near, order, 1), tally.counts[order]
        any_there, before = counts > 0, np.cumsum(counts, axis=1) - counts

        index, selector = tally.codes, None
        if index is None:
            index, selector = self._index, faiss.IDSelectorBitmap(among.bits)  # type: ignore[call-arg, arg-type]

        def look(chosen: Any) -> tuple[FloatArray, IntArray]:
            """The best in some lists (N, L)."""
            used = np.argsort(~chosen, axis=1, kind="stable")[:, : max(int(chosen.sum(1).max()), 1)]
            lists = np.take_along_axis(np.where(chosen, order, -1), used, 1)
            return _scan(index, queries, wanted, lists, np.take_along_axis(near, used, 1), selector)

        usual = 2 * self.partition.probes * len(self) // len(tally.counts)
        scores, keys = look(any_there & (before < usual))
        least = scores[:, min(k, wanted) - 1 : min(k, wanted)]
        more = any_there & (before >= usual) & (before < self.partition.seen) & (near + self.partition.reach >= least)
        if more.any():
            more_scores, more_keys = look(more)
            best = np.argsort(-np.concatenate([scores, more_scores], axis=1), axis=1, kind="stable")[:, :wanted]
            keys = np.take_along_axis(np.concatenate([keys, more_keys], axis=1), best, 1)
        return [row[row >= 0] for row in keys]

    def _tally(self, among: Among) -> _Tally:
        """See _Tally; made once for a selection. Cost: reads all keys of the index."""
        if among.tally is None or among.tally.of is not self:
            sizes = [self._lists.list_size(number) for number in range(self._lists.nlist)]
            ids = np.concatenate([self._ids(number, size) for number, size in enumerate(sizes)])
            known = ids >> 3 < len(among.bits)
            met = np.zeros(len(ids), np.bool_)
            met[known] = among.bits[ids[known] >> 3] >> (ids[known] & 7).astype(np.uint8) & 1
            ends = np.cumsum([0, *sizes])
            counts = np.diff(np.concatenate([[0], np.cumsum(met, dtype=np.int64)])[ends])
            codes = None
            if counts.sum() <= LEAST_SEEN:
                codes = self._quantised(len(sizes))
                for number in np.flatnonzero(counts).tolist():
                    own = met[ends[number] : ends[number + 1]]
                    keys = self._ids(number, sizes[number])[own]
                    rows = self._codes(number, sizes[number]).reshape(sizes[number], -1)[own]
                    codes.invlists.add_entries(number, len(keys), faiss.swig_ptr(keys), faiss.swig_ptr(rows))
            among.tally = _Tally(self, counts, codes)
        return among.tally

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

    def keys(self) -> IntArray:
        """Return all keys, in order."""
        parts = [self._ids(number, self._lists.list_size(number)) for number in range(self._lists.nlist)]
        return np.sort(np.concatenate(parts))

    def holds(self, keys: IntArray, vectors: FloatArray) -> bool:
        """Whether these keys are there with the codes of these vectors."""
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
        """Return facts and sections for a snapshot; the pieces are views, to be written before anything changes."""
        lengths = np.asarray([self._lists.list_size(number) for number in range(self._lists.nlist)], "<i8")
        count = int(lengths.sum())
        sections = [
            section("lengths", lengths),
            Section("keys", "<i8", (count,), self._pieces(self._ids, lengths)),
            Section("codes", "|u1", (count, self._lists.code_size), self._pieces(self._codes, lengths)),
        ]
        facts: dict[str, Any] = {"dimension": self.dimension, "count": count}
        if self.partition is not None:
            one = self.partition
            sections += [section("centroids", one.centroids), section("ranges", one.ranges)]
            facts |= {"probes": one.probes, "spare": one.spare, "reach": one.reach}
            facts |= {"seen": one.seen, "built": one.count, "recall": one.recall}
        return facts, sections

    def _pieces(self, read: Any, lengths: IntArray) -> Iterator[Array]:
        for number, size in enumerate(lengths.tolist()):
            yield read(number, size)

    @classmethod
    def of_arrays(cls, dimension: int, facts: dict[str, Any], arrays: dict[str, Array]) -> "FaissIndex":
        """Return the index that `sections` described.

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
    """Look through lists of an index, some for each query."""
    lists, near = np.ascontiguousarray(lists, np.int64), np.ascontiguousarray(near, np.float32)
    scores, keys = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    chosen = faiss.SearchParametersIVF(nprobe=lists.shape[1], sel=selector)  # type: ignore[call-arg]
    pointers = [faiss.swig_ptr(array) for array in (lists, near, scores, keys)]
    index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), k, *pointers, False, chosen)
    return scores, keys


def _probing(lists: int) -> Any:
    return faiss.SearchParametersIVF(nprobe=lists)  # type: ignore[call-arg]


def checked(vectors: FloatArray, dimension: int) -> FloatArray:
    """Return vectors as C-contiguous float32.

    Raises:
        InvalidQuery: not (N, D), not finite, or a row's L2 norm not 1 (within 1e-3).
    """
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise InvalidQuery(f"expected vectors of {dimension} numbers, got shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise InvalidQuery("a vector holds a number that is not finite")
    if np.abs(np.linalg.norm(vectors, axis=1) - 1).max(initial=0) > 1e-3:
        raise InvalidQuery("a vector is not of length 1")
    return np.ascontiguousarray(vectors, np.float32)


def _partition(dimension: int, facts: dict[str, Any], arrays: dict[str, Array]) -> Partition | None:
    if "centroids" not in arrays:
        return None
    centroids, ranges = arrays["centroids"], arrays.get("ranges", np.empty(0))
    _expect(centroids.dtype == np.float32 and centroids.ndim == 2 and centroids.shape[1] == dimension, "centroids")
    _expect(1 <= len(centroids) <= _MOST_LISTS and bool(np.isfinite(centroids).all()), "centroids")
    _expect(
        ranges.dtype == np.float32 and ranges.shape == (2 * dimension,) and bool(np.isfinite(ranges).all()), "ranges"
    )
    numbers = [facts.get(name) for name in ("probes", "spare", "built")]
    probes, spare, built = (number if type(number) is int else 0 for number in numbers)
    _expect(1 <= probes <= len(centroids) and 1 <= spare <= 1000 and built >= 1, "probes")
    reach, seen, recall = (facts.get(name) for name in ("reach", "seen", "recall"))
    if not isinstance(reach, float) or not -_FARTHEST <= reach <= _FARTHEST:
        reach = _FARTHEST
    seen = seen if type(seen) is int and seen > LEAST_SEEN else LEAST_SEEN
    recall = recall if isinstance(recall, float) else 0.0
    return Partition(centroids, ranges, probes, spare, reach, seen, built, recall)


def _expect(good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"its {what} are not those of an index")
