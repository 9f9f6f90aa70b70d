"""FAISS: a rebuildable cache of the catalog's vectors."""

from collections.abc import Sequence

import faiss
import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidQuery


class FaissIndex:
    """Exact inner-product search over (key, vector) pairs. Not for several threads at once.

    FAISS itself takes a wrong D without a word under `python -O`, stores NaN, and pads with −1: the
    checks stand here.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, keys: Sequence[int], vectors: FloatArray) -> None:
        """Add vectors (N, D) under keys that are not in the index yet."""
        self._index.add_with_ids(self._checked(vectors), np.asarray(keys, np.int64))

    def remove(self, keys: Sequence[int]) -> None:
        """Remove keys; those that are not there are passed over. Cost: one pass over the index."""
        if keys:
            self._index.remove_ids(faiss.IDSelectorBatch(np.asarray(keys, np.int64)))

    def search(self, queries: FloatArray, k: int, among: IntArray | None = None) -> tuple[FloatArray, IntArray]:
        """Return the k stored vectors most like each query, best first, equal scores by key.

        Args:
            queries: (N, D), finite rows of L2 norm 1 (within 1e-3).
            k: neighbours per query, 1 <= k. Fewer columns come back when fewer are stored.
            among: look at these keys alone; all of them are stored, none twice.

        Returns:
            scores: (N, K) cosine in [−1, 1], never increasing along a row.
            keys: (N, K) int64.

        Raises:
            InvalidQuery: wrong D, non-finite or non-unit rows, or k < 1.

        Cost: exact, O(N · count · D).
        Source: Douze et al., The Faiss library, arXiv:2401.08281.
        """
        queries = self._checked(queries)
        if k < 1:
            raise InvalidQuery(f"k must be 1 or more, not {k}")
        k = min(k, len(self) if among is None else len(among))
        if not k or not len(queries):
            return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        selector = None if among is None else faiss.IDSelectorBatch(among)
        chosen = None if selector is None else faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        scores, keys = self._index.search(queries, k, params=chosen)
        order = np.lexsort((keys, -scores), axis=1)
        return (
            np.clip(np.take_along_axis(scores, order, 1), -1, 1),
            np.take_along_axis(keys, order, 1),
        )

    def _checked(self, vectors: FloatArray) -> FloatArray:
        if vectors.ndim != 2 or vectors.shape[1] != self._dimension:
            raise InvalidQuery(f"expected vectors of {self._dimension} numbers, got shape {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise InvalidQuery("a vector holds a number that is not finite")
        if np.abs(np.linalg.norm(vectors, axis=1) - 1).max(initial=0) > 1e-3:
            raise InvalidQuery("a vector is not of length 1")
        return np.ascontiguousarray(vectors, np.float32)
