"""Queries: a picture, a text, a vector or a stored item to search with, or a weighted sum of them.

A parser builds one of these at the edge (HTTP, command line). `gallery.Search` alone tells them apart.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import FloatArray
from service.errors import InvalidQuery

# A sum of unit vectors is no direction if its length is below this share of its weights.
_LEAST_SUM = 1e-6


@dataclass(frozen=True)
class PictureQuery:
    """Search with a picture.

    Attributes:
        data: the bytes of an image file, or a function that returns them. The function runs on a decoder thread, so it
            may do work such as decoding base64, and may raise any LookalikeError.
    """

    data: bytes | Callable[[], bytes]


@dataclass(frozen=True)
class VectorQuery:
    """Search with a vector.

    Attributes:
        numbers: D finite numbers of any length, not all 0.
    """

    numbers: Sequence[float] | NDArray[Any]

    def unit(self, dimension: int) -> FloatArray:
        """Return the vector scaled to L2 norm 1, (D,) float32.

        Args:
            dimension: D of the encoder.

        Raises:
            InvalidQuery: wrong D, NaN, infinity or only zeros.
        """
        try:
            vector = np.array(self.numbers, np.float64)
        except OverflowError as error:
            raise InvalidQuery("vector: a number is too large") from error
        if vector.shape != (dimension,):
            raise InvalidQuery(f"vector: expected {dimension} numbers, got {vector.size}")
        unit = unit_rows(vector[None])
        if unit is None and np.isfinite(vector).all():
            raise InvalidQuery("vector: expected a direction, got only zeros")
        if unit is None:
            raise InvalidQuery("vector: expected finite numbers, got NaN or infinity")
        return np.asarray(unit[0])


@dataclass(frozen=True)
class ItemQuery:
    """Search with the embedding of a stored item, which is left out of its own hits.

    Attributes:
        id: the item's id, in any Unicode normal form.
    """

    id: str


@dataclass(frozen=True)
class TextQuery:
    """Search with words; the encoder needs a text tower.

    Attributes:
        text: in any language that the encoder knows.
    """

    text: str


def unit_rows(rows: NDArray[np.float64]) -> FloatArray | None:
    """Return rows (N, D) scaled to L2 norm 1; None if one has a number that is not finite, or only zeros."""
    largest = np.abs(rows).max(1, keepdims=True)
    if not (np.isfinite(largest) & (largest > 0)).all():
        return None
    # Dividing by the largest number first keeps the squares of 1e308 and of 1e-308 inside the range of a double.
    scaled = rows / largest
    return np.asarray(scaled / np.sqrt(np.vecdot(scaled, scaled))[:, None], np.float32)


def unit_vectors(queries: Sequence["Query"], dimension: int) -> FloatArray | None:
    """Return the vectors (N, D) of queries by vector, as their `unit` does, all at once.

    None if one of them is of another kind, or raises an error there.
    """
    numbers = [query.numbers for query in queries if isinstance(query, VectorQuery)]
    if len(numbers) < len(queries):
        return None
    try:
        rows = np.array(numbers, np.float64)
    # A number is too large, or they are not as many in each.
    except (OverflowError, ValueError):
        return None
    return unit_rows(rows) if rows.shape == (len(queries), dimension) else None


SimpleQuery = PictureQuery | TextQuery | VectorQuery | ItemQuery


@dataclass(frozen=True)
class SumQuery:
    """Search with the weighted sum of the unit vectors of other queries.

    Attributes:
        parts: one or more queries, each with its weight: a finite number, negative for what the hits shall be unlike.
    """

    parts: Sequence[tuple[SimpleQuery, float]]


Query = SimpleQuery | SumQuery


def simple_queries(queries: Sequence[Query]) -> list[SimpleQuery]:
    """Return the queries, with the parts of sums in place of the sums."""
    return [
        part
        for query in queries
        for part in ([one for one, _ in query.parts] if isinstance(query, SumQuery) else [query])
    ]


@dataclass(frozen=True)
class BegunQuery:
    """A query whose vector is known or being computed: `gallery.Search` makes it of a query.

    Attributes:
        vector: returns the unit vector (D,); blocks until it is known, and raises the query's error.
        embeddings: the futures behind `vector` that the encoder computes.
        excluded_ids: the items that must not appear among the hits.
    """

    vector: Callable[[], FloatArray]
    embeddings: tuple[Future[FloatArray], ...] = ()
    excluded_ids: frozenset[str] = frozenset()


def begin_sum(parts: Sequence[BegunQuery], weights: Sequence[float]) -> BegunQuery:
    """Return the begun query of a weighted sum. Items that are among its parts are left out of its hits.

    Args:
        parts: N begun queries.
        weights: N finite numbers.

    Raises, from its vector:
        InvalidQuery: the sum has no direction. Also the error of the first part that has one.
    """

    def vector() -> FloatArray:
        rows = np.stack([part.vector() for part in parts]).astype(np.float64)
        # Dividing by the largest weight first keeps all squares inside the range of a double.
        scaled = np.asarray(weights, np.float64) / (max(map(abs, weights)) or 1)
        total = scaled @ rows
        norm = math.sqrt(total @ total)
        # Rows of float32 that cancel each other leave their rounding.
        if norm <= _LEAST_SUM * np.abs(scaled).sum():
            raise InvalidQuery("all: expected a sum with a direction; these parts and weights cancel each other")
        return np.asarray(total / norm, np.float32)

    embeddings = tuple(future for part in parts for future in part.embeddings)
    return BegunQuery(vector, embeddings, frozenset[str]().union(*(part.excluded_ids for part in parts)))
