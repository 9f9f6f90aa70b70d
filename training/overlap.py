"""Queries that the bank holds too: a picture must not vote for itself."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from service import FloatArray, IntArray

Overlap = Mapping[int, IntArray]
"""The positions in the bank of each query that is a picture of the bank, by the query's position."""
NO_OVERLAP: Overlap = {}


class Identities(NamedTuple):
    """What tells the N pictures of one side apart.

    Attributes:
        origin: where the pictures lie (sources.origin_of).
        ids: unique within the origin.
        digests: sha256 (hex) of the image files, or None if they are not known.
        embeddings: (N, D); they take the place of digests that are not known.
    """

    origin: str
    ids: Sequence[str]
    digests: Sequence[str] | None
    embeddings: FloatArray


def find_overlap(bank: Identities, queries: Identities) -> Overlap:
    """Find the queries that are pictures of the bank: of the same bytes, or of the same id in the same source.

    Where a side has no digests, equal embeddings stand for equal bytes.

    Cost: O(B + N), and the names of the queries in memory.
    """
    by_digest = bank.digests is not None and queries.digests is not None
    by_id = bank.origin == queries.origin
    positions: dict[str | bytes, set[int]] = {}

    def names(side: Identities, position: int) -> list[str | bytes]:
        content = side.digests[position] if by_digest and side.digests is not None else None
        own: list[str | bytes] = [content.encode() if content is not None else side.embeddings[position].tobytes()]
        return [*own, side.ids[position]] if by_id else own

    for position in range(len(queries.ids)):
        for name in names(queries, position):
            positions[name] = set()
    for position in range(len(bank.ids)):
        for name in names(bank, position):
            if name in positions:
                positions[name].add(position)
    overlap = {}
    for position in range(len(queries.ids)):
        if found := set[int]().union(*(positions[name] for name in names(queries, position))):
            overlap[position] = np.array(sorted(found), np.int64)
    return overlap
