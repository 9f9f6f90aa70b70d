"""Embeddings → a map: a place in the plane for each item, so that items that are alike lie together.

PCA takes seconds for any number of items. t-SNE takes minutes and shows groups far better; it places 20,000 items at
most, and the others lie among their nearest ones of those.
"""

import contextlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidRequest
from service.store.catalog_reader import CatalogReader

Method = Literal["pca", "t-sne"]

# Items that t-SNE places itself; fewer than the second number make no picture by it.
_MOST_OF_TSNE, _FEWEST_OF_TSNE = 20_000, 10
# Directions that t-SNE is given: van der Maaten and Hinton, Visualizing data using t-SNE, 2008, take 30.
_DIRECTIONS = 50
_PERPLEXITY, _ITERATIONS = 30, 1000
_NEAREST = 5
# Vectors whose scores with all placed ones are computed at a time.
_BLOCK = 512
# Shares of the whole work after which PCA is done, and after which t-SNE is.
_PCA_DONE, _TSNE_DONE = 0.05, 0.85
_LARGEST = 65535

Share = Callable[[float], object]


class Projection(NamedTuple):
    """A map.

    Attributes:
        keys: (N,) int64 catalog keys, in order.
        positions: (N, 2) uint16. Both axes have one scale, and the longer one reaches from 0 to 65,535.
        sequence: number of the last change of the store that it takes into account.
        method: by which it was made.
    """

    keys: IntArray
    positions: np.typing.NDArray[np.uint16]
    sequence: int
    method: Method


def default_method() -> Method:
    """Return t-SNE where scikit-learn is installed, else PCA."""
    return "pca" if find_spec("sklearn") is None else "t-sne"


def check_method(method: Method) -> Method:
    """Return the method. Raises InvalidRequest for t-SNE where scikit-learn is not installed."""
    if method == "t-sne" and default_method() != method:
        raise InvalidRequest("method: t-sne needs scikit-learn beside the service: pip install scikit-learn")
    return method


def project(reader: CatalogReader, method: Method, progress: Share = lambda _: None) -> Projection:
    """Return the map of a store, which another process may be changing.

    Args:
        reader: of the store's catalog.
        method: pca, or t-sne; a store of fewer than 10 items gets the former in any case.
        progress: is called with the share that is done, in [0, 1].

    Raises:
        InvalidStore: the catalog cannot be read.

    Cost: PCA reads all vectors twice, O(N · D²). t-SNE adds O(n log n) for n placed items, and O(N · n · D) for all
        others. Memory D², and n · D.
    """
    sequence = reader.sequence()
    total = max(1, len(reader.keys()))
    own = (lambda share: progress(share * _PCA_DONE)) if method == "t-sne" else progress
    mean, axes = principal_axes(_chunks(reader, total, lambda share: own(share / 2)), int(reader.meta["dimension"]))
    if method == "pca" or total < _FEWEST_OF_TSNE:
        parts = [
            (keys, (vectors - mean) @ axes[:, :2])
            for keys, vectors in _chunks(reader, total, lambda share: own((1 + share) / 2))
        ]
        keys = np.concatenate([keys for keys, _ in parts]) if parts else np.empty(0, np.int64)
        plane = np.concatenate([plane for _, plane in parts]) if parts else np.empty((0, 2), np.float32)
        return Projection(keys, scaled(plane), sequence, "pca")
    keys, plane = _by_tsne(reader, total, mean, axes, progress)
    return Projection(keys, scaled(plane), sequence, "t-sne")


def _chunks(reader: CatalogReader, total: int, progress: Share) -> Iterator[tuple[IntArray, FloatArray]]:
    done = 0
    for keys, vectors in reader.vectors():
        yield keys, vectors
        done += len(keys)
        progress(min(1.0, done / total))


def principal_axes(chunks: Iterator[tuple[IntArray, FloatArray]], dimension: int) -> tuple[FloatArray, FloatArray]:
    """Return the mean (D,) of vectors and their principal axes (D, D) as columns, that of the largest variance first.

    The largest entry of an axis is positive: the axes of equal vectors are equal.

    Cost: O(N · D²). Memory D².
    """
    count, total = 0, np.zeros(dimension)
    products = np.zeros((dimension, dimension))
    origin: FloatArray | None = None
    for _, vectors in chunks:
        if origin is None:
            # Far from the mean, the products would lose the digits in which vectors differ.
            origin = vectors.mean(0)
        moved = vectors - origin
        count += len(moved)
        total += moved.sum(0)
        products += moved.T @ moved
    if origin is None:
        return np.zeros(dimension, np.float32), np.eye(dimension, dtype=np.float32)
    mean = total / count
    axes = np.linalg.eigh(products / count - np.outer(mean, mean))[1][:, ::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], axis=0)
    return (origin + mean).astype(np.float32), (axes * np.where(largest < 0, -1, 1)).astype(np.float32)


def _by_tsne(
    reader: CatalogReader, total: int, mean: FloatArray, axes: FloatArray, progress: Share
) -> tuple[IntArray, FloatArray]:
    every = reader.keys()
    chosen = np.sort(np.random.default_rng(0).permutation(every)[:_MOST_OF_TSNE])
    parts = list(reader.vectors(chosen))
    keys, vectors = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    plane = tsne(
        (vectors - mean) @ axes[:, :_DIRECTIONS],
        lambda share: progress(_PCA_DONE + share * (_TSNE_DONE - _PCA_DONE)),
    )
    if len(every) <= _MOST_OF_TSNE:
        return keys, plane
    all_keys, all_planes = [keys], [plane]
    for some, chunk in _chunks(reader, total, lambda share: progress(_TSNE_DONE + share * (1 - _TSNE_DONE))):
        others = ~np.isin(some, keys)
        all_keys.append(some[others])
        all_planes.append(place(chunk[others], vectors, plane))
    keys, plane = np.concatenate(all_keys), np.concatenate(all_planes)
    order = np.argsort(keys)
    return keys[order], plane[order]


def tsne(vectors: FloatArray, progress: Share = lambda _: None) -> FloatArray:
    """Return places (N, 2) of vectors (N, D), N ≥ 10, whose first two columns are their principal components.

    Those are where it begins, so that the same vectors give the same map.

    Source: van der Maaten, Accelerating t-SNE using tree-based algorithms, JMLR 2014; Kobak and Berens, The art of
        using t-SNE, 2019 (where to begin).
    """
    from sklearn.manifold import TSNE

    begin = np.pad(vectors[:, :2], ((0, 0), (0, max(0, 2 - vectors.shape[1]))))
    spread = begin[:, 0].std()
    # Vectors that are all the same have no better map.
    if spread < 1e-6:
        return np.zeros((len(vectors), 2), np.float32)
    model = TSNE(
        perplexity=min(_PERPLEXITY, (len(vectors) - 1) / 3),
        init=begin / spread * 1e-4,
        max_iter=_ITERATIONS,
        random_state=0,
        # It prints a line every 50 iterations, and tells its progress in no other way.
        verbose=2,
    )
    with contextlib.redirect_stdout(_Printed(progress)):
        plane: FloatArray = model.fit_transform(vectors)
    return plane


class _Printed(io.StringIO):
    """Stands in for stdout, and reads the progress of t-SNE from what it prints."""

    def __init__(self, progress: Share) -> None:
        super().__init__()
        self._progress = progress

    def write(self, text: str) -> int:
        """Take a text, and keep nothing of it."""
        for iteration in re.findall(r"Iteration (\d+):", text):
            self._progress(int(iteration) / _ITERATIONS)
        return len(text)


def place(vectors: FloatArray, placed: FloatArray, places: FloatArray) -> FloatArray:
    """Return places (N, 2) of vectors: the mean of those of their 5 nearest placed ones, weighted by the scores.

    Args:
        vectors: (N, D) unit rows.
        placed: (M, D) unit rows, M ≥ 1.
        places: (M, 2) of `placed`.

    Cost: O(N · M · D). Memory of 512 · M scores.
    """
    nearest = min(_NEAREST, len(placed))
    made = np.empty((len(vectors), 2), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        scores = vectors[start : start + _BLOCK] @ placed.T
        best = np.argpartition(-scores, nearest - 1, axis=1)[:, :nearest]
        # Negative scores weigh nothing, unless there are no others.
        weights = np.maximum(np.take_along_axis(scores, best, axis=1), 1e-6)
        weights /= weights.sum(1, keepdims=True)
        made[start : start + _BLOCK] = np.einsum("nk,nkd->nd", weights, places[best])
    return made


def scaled(plane: FloatArray) -> np.typing.NDArray[np.uint16]:
    """Return places as whole numbers (N, 2), in the middle of the square that reaches from 0 to 65,535."""
    if not len(plane):
        return np.empty((0, 2), np.uint16)
    low, high = plane.min(0), plane.max(0)
    span = float((high - low).max())
    # Rounding alone makes a little span of places that are all the same.
    factor = _LARGEST / span if span > 1e-6 else 0.0
    places = np.rint(_LARGEST / 2 + (plane.astype(np.float64) - (low + high) / 2) * factor)
    return np.asarray(places.clip(0, _LARGEST), np.uint16)


class Colours(NamedTuple):
    """The values of one metadata key on a map.

    Attributes:
        values: the most frequent ones first.
        codes: (N,) uint16: 0 for an item without the key or with another value, else the number of a value, from 1.
    """

    values: list[Any]
    codes: np.typing.NDArray[np.uint16]


def colours(reader: CatalogReader, keys: IntArray, name: str, most: int) -> Colours:
    """Return the most frequent scalar values of a metadata key among the items of a map, as they are now.

    Cost: reads the metadata of all items.
    """
    found, values = reader.metadata_values(name)
    places = np.minimum(np.searchsorted(keys, found), max(0, len(keys) - 1))
    there = keys[places] == found if len(keys) else np.zeros(len(found), np.bool_)
    # Python takes 1, 1.0 and true for equal; JSON does not.
    typed = [(type(value), value) for value in values]
    counts = Counter(one for one, is_there in zip(typed, there.tolist(), strict=True) if is_there)
    best = [one for one, _ in counts.most_common(most)]
    code_of = {one: code for code, one in enumerate(best, 1)}
    codes = np.zeros(len(keys), np.uint16)
    codes[places[there]] = np.asarray([code_of.get(one, 0) for one in typed], np.uint16)[there]
    return Colours([value for _, value in best], codes)
