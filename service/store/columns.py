"""Columns of metadata: which of a field's distinct values each item has, so that a new filter need not read them all.

SQLite evaluates a filter on a million items in half a second. Of a field with few distinct values it is enough to
evaluate it on one item for each of them. The catalog's own SQL does that, so both ways give the same items.
"""

import json
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import apsw
import numpy as np
from numpy.typing import NDArray

from service import IntArray
from service.store.catalog import LATEST, one
from service.store.catalog_reader import CatalogReader
from service.store.filters import Filter, parse_filter, spellings

# Fields, distinct values of a field, and bytes of examples that are kept in memory.
_MOST_FIELDS, _MOST_VALUES, _MOST_BYTES = 64, 2000, 1 << 25
_ROWS_PER_LOOK = 50_000
_EVALUATE = "SELECT number FROM (SELECT key AS number, value AS metadata FROM json_each(?)) AS items WHERE "

Mask = NDArray[np.bool_]


class _NoColumn(Exception):
    """A filter asks for what no column tells."""


class _Column(NamedTuple):
    """A field at the top of the metadata.

    Attributes:
        codes: (N,) the number of each item's value; 0 where the field is missing.
        examples: JSON of the metadata of one item for each number.
    """

    codes: NDArray[Any]
    examples: list[str]


class Columns:
    """The fields with few distinct values, as of one moment.

    Attributes:
        sequence: number of the last change that was considered.
    """

    def __init__(self, sequence: int, keys: IntArray, columns: dict[str, _Column], without: frozenset[str]) -> None:
        """Take columns over keys (N,) in order; `without` are the names of the other fields."""
        self.sequence = sequence
        self._keys, self._columns, self._without = keys, columns, without

    @classmethod
    def read(cls, reader: CatalogReader, stopped: Callable[[], bool]) -> "Columns | None":
        """Read the columns of a catalog; None if `stopped` returns True meanwhile.

        Cost: about 1 s for a million items and a field.
        """
        rows: dict[str, array[int]] = {}
        codes: dict[str, array[int]] = {}
        numbers: dict[str, dict[Any, int]] = {}
        firsts: dict[str, list[int]] = {}
        without: set[str] = set()
        with reader.connections.borrow() as database, database:
            latest = int(one(database, LATEST))
            keys = np.fromiter((key for (key,) in database.execute("SELECT key FROM items ORDER BY key")), np.int64)
            query = "SELECT items.key, field.key, type, value FROM items, json_each(items.metadata) AS field"
            for count, (key, name, kind, value) in enumerate(database.execute(query)):
                if not count % _ROWS_PER_LOOK and stopped():
                    return None
                if name in without:
                    continue
                known = numbers.setdefault(name, {})
                number = known.get((kind, value))
                if number is None:
                    if len(known) == _MOST_VALUES or len(numbers) > _MOST_FIELDS:
                        without.add(name)
                        for of_names in (rows, codes, numbers, firsts):
                            of_names.pop(name, None)
                        continue
                    number = known[kind, value] = len(known) + 1
                    firsts.setdefault(name, []).append(key)
                rows.setdefault(name, array("q")).append(key)
                codes.setdefault(name, array("H")).append(number)
            columns: dict[str, _Column] = {}
            left = _MOST_BYTES
            for name in numbers:
                examples = _metadata(database, firsts[name])
                left -= sum(map(len, examples))
                if left < 0:
                    without.add(name)
                    continue
                column = np.zeros(len(keys), np.min_scalar_type(len(examples)))
                column[np.searchsorted(keys, np.frombuffer(rows[name], np.int64))] = codes[name]
                columns[name] = _Column(column, ["{}", *examples])
        return cls(latest, keys, columns, frozenset(without))

    def matching(self, where: Filter, reader: CatalogReader) -> IntArray | None:
        """Return the keys of the items that matched a filter then; None if the columns cannot tell."""
        with reader.connections.borrow() as database:
            try:
                return self._keys[self._all(json.loads(where.asked), database)]
            except _NoColumn:
                return None

    def _all(self, asked: dict[str, Any], database: apsw.Connection) -> Mask:
        """Return which items match all members of a filter as it was asked."""
        mask = np.ones(len(self._keys), np.bool_)
        for name, wanted in asked.items():
            mask &= self._one(name, wanted, database)
        return mask

    def _one(self, name: str, wanted: Any, database: apsw.Connection) -> Mask:
        match name:
            case "$and":
                return np.asarray(np.all([self._all(each, database) for each in wanted], axis=0))
            case "$or":
                return np.asarray(np.any([self._all(each, database) for each in wanted], axis=0))
            case "$not":
                return ~self._all(wanted, database)
        # Conditions on ids, and names that may lead into objects and lists.
        if name.startswith("$") or "." in name:
            raise _NoColumn
        there = [spelt for spelt in spellings(name) if spelt in self._columns or spelt in self._without]
        if len(there) > 1 or not self._without.isdisjoint(there):
            raise _NoColumn
        column = self._columns[there[0]] if there else _Column(np.zeros(len(self._keys), np.uint8), ["{}"])
        leaf = parse_filter({name: wanted})
        good = np.zeros(len(column.examples), np.bool_)
        rows = database.execute(_EVALUATE + leaf.sql, (json.dumps(column.examples), *leaf.values))
        good[[number for (number,) in rows]] = True
        mask: Mask = good[column.codes]
        return mask


def _metadata(database: apsw.Connection, keys: list[int]) -> list[str]:
    """Return the metadata of keys as JSON, in their order."""
    # Rows come in the order of the given keys, because SQLite does not reorder the tables of a CROSS JOIN.
    query = "SELECT metadata FROM carray(?) CROSS JOIN items ON key = value"
    given = apsw.carray(np.asarray(keys, np.int64))
    return [metadata for (metadata,) in database.execute(query, (given,))]
