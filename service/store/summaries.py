"""What a catalog's items have in common: their folders by id, and the fields of their metadata with frequent values."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import apsw
import numpy as np

from service.store import Field, Folder, Value
from service.store.catalog_reader import CatalogReader
from service.store.filter_cache import FilterCache
from service.store.filters import EVERY, Filter

S = TypeVar("S")

_MOST_KEPT = 32
_MOST_VALUES = 12
# A longer text would be no name for many items, and some of them would make an answer of megabytes.
_LONGEST_VALUE = 200
_FOLDERS = """
SELECT substr(items.id, 1, ?1 + instr(substr(items.id, ?1 + 1), '/')) AS folder, count(*) FROM items
WHERE instr(substr(items.id, ?1 + 1), '/') > 0 AND {where} GROUP BY folder ORDER BY folder
"""
# Numbers are equal whether they are whole or not, as in filters; a boolean is no number. Lists and objects have no
# atom. To rank values that one item alone has would take as long as all the rest, and they are no help to choose by.
_FIELDS = """
WITH counted AS MATERIALIZED (
    SELECT field.key AS name, iif(field.type IN ('integer', 'real'), 'number', field.type) AS kind, field.atom AS value,
        count(*) AS items
    FROM items, json_each(items.metadata) AS field WHERE {where} GROUP BY 1, 2, 3),
fields AS MATERIALIZED (
    SELECT name, sum(items) AS total, sum(kind NOT IN ('array', 'object')) AS scalars FROM counted GROUP BY name),
ranked AS (
    SELECT name, kind, value, items, row_number() OVER (PARTITION BY name ORDER BY items DESC, kind, value) AS place
    FROM counted JOIN fields USING (name)
    WHERE kind NOT IN ('array', 'object') AND (kind <> 'text' OR length(value) <= {longest})
        AND (items > 1 OR scalars <= {most}))
SELECT fields.name, total, scalars, kind, value, items
FROM fields LEFT JOIN ranked ON ranked.name = fields.name AND place <= {most} ORDER BY total DESC, fields.name, place
"""
_NAMED = {"true": True, "false": False, "null": None}


class Summaries:
    """Summaries of a catalog, kept until it changes. Calls may come from any thread."""

    def __init__(self, reader: CatalogReader, filters: FilterCache) -> None:
        self._reader, self._filters = reader, filters
        # With the sequence number of each; ordered from the least to the most recently used one.
        self._known: OrderedDict[tuple[Any, ...], tuple[int, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def folders(self, prefix: str, where: Filter) -> list[Folder]:
        """See Store.folders. Cost: reads all ids that match, once after each change of the store."""

        def count() -> list[Folder]:
            # The plus keeps SQLite on the index of ids. ?1 is the length; the next question mark counts on from it.
            condition, keys = self._among(where, "+items.key")
            query = _FOLDERS.format(where=condition)
            with self._reader.connections.borrow() as database:
                return [Folder(*row) for row in database.execute(query, (len(prefix), *keys))]

        return self._kept((prefix, where), count)

    def fields(self, where: Filter) -> list[Field]:
        """See Store.fields. Cost: reads the metadata of all items that match, once after each change of the store."""

        def count() -> list[Field]:
            condition, keys = self._among(where, "items.key")
            query = _FIELDS.format(where=condition, longest=_LONGEST_VALUE, most=_MOST_VALUES)
            found: dict[str, Field] = {}
            with self._reader.connections.borrow() as database:
                for name, total, scalars, kind, value, items in database.execute(query, keys):
                    field = found.setdefault(name, Field(name, total, scalars, []))
                    # Without a value that is shown there is no kind.
                    if kind is not None:
                        field.values.append(Value(_NAMED.get(kind, value), items))
            return list(found.values())

        return self._kept((where,), count)

    def _among(self, where: Filter, key: str) -> tuple[str, list[Any]]:
        """Return the condition that a key is of the items that match, and its values."""
        if where == EVERY:
            return "TRUE", []
        # apsw.carray refuses an empty array, and no item has the key -1.
        keys = np.append(self._filters.get(where).keys.every, -1)
        return f"{key} IN (SELECT value FROM carray(?))", [apsw.carray(keys)]  # noqa: S608

    def _kept(self, asked: tuple[Any, ...], make: Callable[[], S]) -> S:
        sequence = self._reader.sequence()
        with self._lock:
            known = self._known.get(asked)
        if known is not None and known[0] == sequence:
            summary: S = known[1]
            return summary
        result = make()
        with self._lock:
            # It may know changes after that number, so it is rebuilt sooner than needed, and never too late.
            self._known[asked] = (sequence, result)
            self._known.move_to_end(asked)
            while len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)
        return result
