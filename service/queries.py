"""Queries: a picture, a vector or a stored item to search with.

A parser builds one of these at the edge (HTTP, command line). `gallery.Search` alone tells them apart.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from service import FloatArray
from service.errors import InvalidQuery


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

    numbers: Sequence[float]

    def unit(self, dimension: int) -> FloatArray:
        """Return the vector scaled to L2 norm 1, (D,) float32.

        Args:
            dimension: D of the encoder.

        Raises:
            InvalidQuery: wrong D, NaN, infinity or only zeros.
        """
        try:
            vector = np.asarray(self.numbers, np.float64)
        except OverflowError as error:
            raise InvalidQuery("vector: a number is too large") from error
        if vector.shape != (dimension,):
            raise InvalidQuery(f"vector: expected {dimension} numbers, got {vector.size}")
        largest = float(np.abs(vector).max())
        if not math.isfinite(largest):
            raise InvalidQuery("vector: expected finite numbers, got NaN or infinity")
        if not largest:
            raise InvalidQuery("vector: expected a direction, got only zeros")
        # Dividing by the largest number first keeps the squares of 1e308 and of 1e-308 inside the range of a double.
        vector /= largest
        return np.asarray(vector / math.sqrt(vector @ vector), np.float32)


@dataclass(frozen=True)
class ItemQuery:
    """Search with the embedding of a stored item, which is left out of its own hits.

    Attributes:
        id: the item's id, in any Unicode normal form.
    """

    id: str


Query = PictureQuery | VectorQuery | ItemQuery


@dataclass(frozen=True)
class BegunQuery:
    """A query whose vector is known or being computed: `gallery.Search` makes it of a query.

    Attributes:
        vector: returns the unit vector (D,); blocks until it is known, and raises the query's error.
        embedding: the future behind `vector`, if the encoder computes it.
        excluded_id: the item that must not appear among the hits.
    """

    vector: Callable[[], FloatArray]
    embedding: Future[FloatArray] | None = None
    excluded_id: str | None = None
