"""Reads a catalog: its items, pictures and vectors, and the changes after a sequence number."""

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import orjson

from service import FloatArray, IntArray
from service.errors import InvalidStore, PageNotFound
from service.store import Item, Known, Order
from service.store.catalog import (
    FILE,
    LATEST,
    VECTOR_TYPES,
    checked_meta,
    connect,
    described,
    facts_of,
    no_store,
    one,
    read_items,
    read_meta,
)
from service.store.filters import Filter

_ROWS_AT_ONCE = 8192
# SQLite's longest text is 1 GB, which is a few MB of metadata for each of these.
_ITEMS_AT_ONCE = 256
# The orders by a fact about files, and its column.
_OF_FILES = {"date": "date", "size": "size_bytes"}
# Of SQLite's whole numbers.
_LARGEST = 2**63 - 1
_CHANGED = """
SELECT key FROM removed WHERE sequence > ?1
UNION SELECT items.key FROM items JOIN vectors USING (key) WHERE items.sequence > ?1 AND vectors.sequence > ?1
"""
# Rows come in the order of the given keys, because SQLite does not reorder the tables of a CROSS JOIN.
_OF_KEYS = "SELECT {columns} FROM carray(?) CROSS JOIN {table} ON key = value"


class Connections:
    """Connections that read one SQLite file. Each is used by one thread at a time and kept for the next."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet."""
        self._path = path
        # The key is whether the connections map the file.
        self._idle: dict[bool, list[apsw.Connection]] = {False: [], True: []}
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def borrow(self, mapped: bool = False) -> Iterator[apsw.Connection]:
        """Lend a connection to this thread. Raises InvalidStore for an error of SQLite.

        A mapped file halves the time to read a few rows by their keys. A scan of the whole file would hold all of it
        in memory.
        """
        idle = self._idle[mapped]
        with self._lock:
            if self._closed:
                raise InvalidStore("the store is closed")
            connection = idle.pop() if idle else None
        try:
            if connection is None:
                connection = connect(self._path, mapped=mapped)
            yield connection
        except apsw.Error as error:
            raise InvalidStore(f"{self._path}: {described(error)}") from error
        finally:
            with self._lock:
                if connection is not None and not self._closed:
                    idle.append(connection)
                elif connection is not None:
                    connection.close()

    def close(self) -> None:
        """Close the idle connections now, and those that are in use when their readers are done."""
        with self._lock:
            self._closed = True
            for connection in self._idle[False] + self._idle[True]:
                connection.close()
            self._idle = {False: [], True: []}


class CatalogReader:
    """Reads a catalog from any number of threads, beside the process or thread that writes it.

    Each thread has a connection of its own while it reads. Every method raises InvalidStore if SQLite cannot read the
    file, or after `close`.

    Attributes:
        path: the catalog's file.
        connections: to the file, for other queries.
        meta: facts about the store when it was opened: schema, fingerprint, dimension, vector_type, model …
        vector_shape: dimension D and dtype of a vector in the file.
    """

    def __init__(self, folder: Path) -> None:
        """Open the catalog in a store's folder.

        Raises:
            InvalidStore: there is none, it is damaged, or it is not one of ours. The file stays as it is.
        """
        self.path = folder / FILE
        if not self.path.exists():
            raise no_store(folder)
        self.meta = checked_meta(self.path, read_meta(folder))
        self.connections = Connections(self.path)
        self._facts = facts_of(self.meta["schema"])
        self._dtype: np.dtype[Any] = np.dtype(VECTOR_TYPES[self.meta["vector_type"]])
        self._dimension = int(self.meta["dimension"])
        self._vector_bytes = self._dtype.itemsize * self._dimension
        self.vector_shape = self._dimension, self._dtype

    # Items -------------------------------------------------------------------------------------------

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        with self.connections.borrow() as database:
            rows = read_items(database, "WHERE id = ?", id, facts=self._facts)
        return rows[0][1] if rows else None

    def thumbnail(self, id: str) -> bytes | None:
        """Return an item's thumbnail. None if there is no item, or it came as an embedding without a picture."""
        return self._blob("SELECT thumbnail FROM pictures WHERE key = (SELECT key FROM items WHERE id = ?)", id) or None

    def original(self, id: str) -> bytes | None:
        """Return the bytes of an item's image file. None if there is no item, or they were not kept."""
        return self._blob("SELECT original FROM pictures WHERE key = (SELECT key FROM items WHERE id = ?)", id)

    def pictures(self, keys: IntArray) -> dict[int, tuple[bytes, bytes | None]]:
        """Return thumbnails and originals of keys, as `thumbnail` and `original` give them."""
        # apsw.carray refuses an empty array.
        if not len(keys):
            return {}
        query = _OF_KEYS.format(columns="key, thumbnail, original", table="pictures")
        with self.connections.borrow() as database:
            rows: list[Any] = database.execute(query, (apsw.carray(np.ascontiguousarray(keys, np.int64)),)).fetchall()
        return {key: (bytes(small), None if original is None else bytes(original)) for key, small, original in rows}

    def vector(self, id: str) -> FloatArray | None:
        """Return an item's embedding (D,), or None."""
        blob = self._blob("SELECT vector FROM vectors WHERE key = (SELECT key FROM items WHERE id = ?)", id)
        return None if blob is None else np.frombuffer(blob, self._dtype).astype(np.float32)

    def _blob(self, query: str, id: str) -> bytes | None:
        with self.connections.borrow() as database:
            blob = one(database, query, id)
        return None if blob is None else bytes(blob)

    def scan(self, limit: int, after: int) -> list[tuple[int, Item]]:
        """Return up to `limit` items with keys above `after`, in key order."""
        with self.connections.borrow() as database:
            return read_items(database, "WHERE key > ? ORDER BY key LIMIT ?", after, limit, facts=self._facts)

    def below(self, origin: str) -> list[Known]:
        """Return the items that came from a source; see Store.below."""
        with self.connections.borrow() as database:
            return list(map(Known._make, self._below(database, "id, digest, ", origin)))

    def stamps(self, origin: str) -> dict[str, tuple[int | None, int | None]]:
        """Return bytes and times of change of the pictures of a source, by their paths in it."""
        with self.connections.borrow() as database:
            return {path: (size_bytes, mtime_ns) for path, size_bytes, mtime_ns in self._below(database, "", origin)}

    def _below(self, database: apsw.Connection, columns: str, origin: str) -> Any:
        stamp = "size_bytes, mtime_ns" if "mtime_ns" in self._facts else "NULL, NULL"
        # The folders below an origin: 0 is the character after the slash.
        query = f"SELECT substr(source, ?), {columns}{stamp} FROM items WHERE source > ? AND source < ?"  # noqa: S608
        return database.execute(query, (len(origin) + 2, f"{origin}/", f"{origin}0"))

    def page(
        self, limit: int, after: str, among: IntArray | None, order: Order, offset: int
    ) -> tuple[list[Item], str | None]:
        """Return up to `limit` items in an order, and the cursor of the next page or None; see Store.page.

        `among` are the keys of the items that may be shown, None for all. A cursor holds the key of the last item that
        was shown. In the order of ids it stands for the item's id, which a tombstone keeps if the item was removed; in
        those of dates and sizes it holds that value, too.
        """
        column, direction = order.removeprefix("-"), "DESC" if order.startswith("-") else "ASC"
        beyond = "<" if order.startswith("-") else ">"
        value, terms = "NULL", f"items.key {direction}"
        condition, values = "TRUE", list[Any]()
        if column in _OF_FILES:
            # A catalog of schema 3 or 4 knows nothing of files.
            value = f"items.{_OF_FILES[column]}" if _OF_FILES[column] in self._facts else "NULL"
            terms = f"{value} {direction} NULLS LAST, {terms}"
            if after:
                condition, values = _behind_value(after, value, beyond)
        elif after:
            condition, values = f"items.key {beyond} ?1", [_key_of(after)]
        if column == "id":
            terms = f"items.id {direction}"
            last = "coalesce((SELECT id FROM items WHERE key = ?1), (SELECT id FROM removed WHERE key = ?1))"
            condition = f"items.id {beyond} {last}" if after else condition
        if among is not None:
            # The plus keeps SQLite on the index of the order, so that it need not sort. apsw.carray refuses an empty
            # array, and no item has the key -1.
            condition += " AND +items.key IN (SELECT value FROM carray(?))"
            values.append(apsw.carray(np.append(among, -1)))
        # Our own words and question marks alone.
        query = f"SELECT items.key, {value} FROM items WHERE {condition} ORDER BY {terms} LIMIT ? OFFSET ?"  # noqa: S608
        with self.connections.borrow() as database, database:
            rows = database.execute(query, (*values, limit + 1, offset)).fetchall()
            items = _items_of(database, np.asarray([key for key, _ in rows[:limit]], np.int64), self._facts)
        if len(rows) <= limit:
            return [item for _, item in items], None
        key, shown = rows[limit - 1]
        hexadecimal = "" if shown is None else str(shown).encode().hex()
        return [item for _, item in items], f"{key}-{hexadecimal}" if column in _OF_FILES else str(key)

    def keys(self) -> IntArray:
        """Return all keys, in order. Cost: reads an index of the database, no table."""
        with self.connections.borrow() as database:
            rows = database.execute("SELECT key FROM items INDEXED BY items_by_sequence WHERE sequence > -1")
            return np.sort(np.fromiter((key for (key,) in rows), np.int64))

    def ids(self) -> tuple[IntArray, list[str]]:
        """Return all keys, in order, and the ids of their items. Cost: reads an index of the database, no table."""
        with self.connections.borrow() as database:
            rows = sorted(database.execute("SELECT key, id FROM items"))
        return np.asarray([key for key, _ in rows], np.int64), [id for _, id in rows]

    def metadata_values(self, name: str) -> tuple[IntArray, list[Any]]:
        """Return the keys of all items that have a text, a number or a truth value under a metadata key, and these.

        Cost: reads the metadata of every item.
        """
        query = """SELECT items.key, one.value, one.type FROM items, json_each(items.metadata) AS one
            WHERE one.key = ? AND one.type NOT IN ('object', 'array', 'null')"""
        with self.connections.borrow() as database:
            rows = database.execute(query, (name,)).fetchall()
        values = [kind == "true" if kind in ("true", "false") else value for _, value, kind in rows]
        return np.asarray([key for key, _, _ in rows], np.int64), values

    def items_of(self, keys: IntArray) -> list[tuple[int, Item]]:
        """Return the items of keys (N,), in their order; those that are not in the catalog are skipped."""
        with self.connections.borrow() as database:
            return _items_of(database, keys, self._facts)

    def digests(self) -> tuple[IntArray, IntArray]:
        """Return all keys, and hashes of 64 bits of their items' digests, equal for equal ones, in this process.

        Cost: reads every item.
        """
        with self.connections.borrow() as database:
            rows = database.execute("SELECT key, digest FROM items")
            flat = np.fromiter((number for key, digest in rows for number in (key, hash(digest))), np.int64)
        return flat[::2], flat[1::2]

    def dismissed(self) -> set[tuple[str, str]]:
        """Return the pairs of digests that are no duplicates to the user, each pair in both orders."""
        with self.connections.borrow() as database:
            # A catalog of schema 3 has no such table.
            there = one(database, "SELECT 1 FROM sqlite_schema WHERE name = 'dismissed'")
            rows: list[Any] = database.execute("SELECT one, other FROM dismissed").fetchall() if there else []
        return {pair for a, b in rows for pair in ((a, b), (b, a))}

    def original_head(self, id: str, limit: int) -> tuple[bytes, int] | None:
        """Return the first bytes of an item's kept image file, and its size; None if the store does not keep it."""
        query = """SELECT substr(original, 1, ?), length(original) FROM pictures
            WHERE key = (SELECT key FROM items WHERE id = ?) AND original IS NOT NULL"""
        with self.connections.borrow() as database:
            row = next(database.execute(query, (limit, id)), None)
        return None if row is None else (bytes(row[0]), int(row[1]))

    # Changes after a sequence number -----------------------------------------------------------------

    def sequence(self) -> int:
        """Return the sequence number of the last committed change."""
        with self.connections.borrow() as database:
            return int(one(database, LATEST))

    def changed(self, since: int) -> IntArray:
        """Return the keys whose vector was added, replaced or removed after a sequence number."""
        with self.connections.borrow() as database:
            return np.fromiter((key for (key,) in database.execute(_CHANGED, (since,))), np.int64)

    def changed_items(self, since: int, limit: int, after: int) -> list[tuple[int, Item]]:
        """Return up to `limit` items with keys above `after` that changed after a sequence number, in key order."""
        with self.connections.borrow() as database:
            where = "WHERE key > ? AND items.sequence > ? ORDER BY key LIMIT ?"
            return read_items(database, where, after, since, limit, facts=self._facts)

    def removed(self, since: int) -> list[str]:
        """Return the ids that were removed after a sequence number. Some may have been added again."""
        with self.connections.borrow() as database:
            query = "SELECT DISTINCT id FROM removed WHERE sequence > ?"
            return [str(id) for (id,) in database.execute(query, (since,))]

    def matching(self, where: Filter, since: int) -> tuple[int, IntArray, IntArray]:
        """Return which of the items that changed after a sequence number, or of all for -1, match a filter.

        Returns:
            sequence: number of the last change.
            changed: keys of all items that changed or were removed; none if all items count as changed.
            matching: keys of the items that match.

        Cost: reads the metadata of all items that changed.
        """
        if since < 0:
            # Without the other items SQLite can read an index of ids alone.
            query = f"SELECT key FROM items WHERE {where.sql}"  # noqa: S608
            with self.connections.borrow() as database, database:
                latest = int(one(database, LATEST))
                keys = np.fromiter((key for (key,) in database.execute(query, where.values)), np.int64)
            return latest, np.empty(0, np.int64), keys
        # The filter's values precede the sequence number in the text, and SQLite counts question marks in that order.
        # The SQL holds no value itself.
        query = "SELECT key, (" + where.sql + ") FROM items WHERE sequence > ?"  # noqa: S608
        with self.connections.borrow() as database, database:
            latest = int(one(database, LATEST))
            rows = database.execute(query, (*where.values, since)).fetchall()
            removed = [key for (key,) in database.execute("SELECT key FROM removed WHERE sequence > ?", (since,))]
        changed = np.fromiter((key for key, _ in rows), np.int64, len(rows))
        matches = np.fromiter((bool(match) for _, match in rows), np.bool_, len(rows))
        return latest, np.concatenate([changed, np.asarray(removed, np.int64)]), changed[matches]

    # For searches: by key, as of a sequence number ---------------------------------------------------

    def vectors_at(self, keys: IntArray, sequence: int) -> FloatArray | None:
        """Return the vectors (N, D) of keys, or None if one of them changed after a sequence number.

        Raises:
            InvalidStore: a vector does not match its checksum.
        """
        # apsw.carray refuses an empty array.
        if not len(keys):
            return np.empty((0, self._dimension), np.float32)
        query = _OF_KEYS.format(columns="key, vector, checksum, sequence", table="vectors")
        with self.connections.borrow(mapped=True) as database:
            rows: list[Any] = database.execute(query, (apsw.carray(keys),)).fetchall()
        if len(rows) < len(keys) or max(row[3] for row in rows) > sequence:
            return None
        return self._checked(rows)[1]

    def items_at(self, keys: IntArray, sequence: int) -> tuple[list[str], list[str]] | None:
        """Return the ids of keys, and their metadata as JSON, or None if one changed after a sequence number."""
        # One row of two arrays: of many rows, to make their Python objects takes a third of the time.
        columns = "count(*), max(sequence), json_group_array(id), json_group_array(metadata)"
        query = _OF_KEYS.format(columns=columns, table="items")
        all_ids: list[str] = []
        all_metadata: list[str] = []
        with self.connections.borrow(mapped=True) as database:
            for start in range(0, len(keys), _ITEMS_AT_ONCE):
                some = keys[start : start + _ITEMS_AT_ONCE]
                row: Any = database.execute(query, (apsw.carray(some),)).fetchall()[0]
                count, latest, ids, metadata = row
                if count < len(some) or latest > sequence:
                    return None
                all_ids += orjson.loads(ids)
                all_metadata += orjson.loads(metadata)
        return all_ids, all_metadata

    # All vectors -------------------------------------------------------------------------------------

    def vectors(self, keys: IntArray | None = None) -> Iterator[tuple[IntArray, FloatArray]]:
        """Yield chunks of keys and their vectors (N, D), in key order. The catalog may change between two chunks.

        Args:
            keys: only these keys; those that are not in the catalog are skipped.

        Raises:
            InvalidStore: a vector does not match its checksum.
        """
        for rows in self._vector_rows(None if keys is None else np.sort(keys)):
            yield self._checked(rows)

    def _vector_rows(self, keys: IntArray | None) -> Iterator[list[Any]]:
        if keys is not None:
            query = _OF_KEYS.format(columns="key, vector, checksum", table="vectors")
            for start in range(0, len(keys), _ROWS_AT_ONCE):
                with self.connections.borrow() as database:
                    rows = database.execute(query, (apsw.carray(keys[start : start + _ROWS_AT_ONCE]),)).fetchall()
                if rows:
                    yield rows
            return
        query = "SELECT key, vector, checksum FROM vectors WHERE key > ? ORDER BY key LIMIT ?"
        last: Any = -1
        while True:
            with self.connections.borrow() as database:
                rows = database.execute(query, (last, _ROWS_AT_ONCE)).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield rows

    def _checked(self, rows: list[Any]) -> tuple[IntArray, FloatArray]:
        """Return keys and vectors of rows whose first columns are key, vector and checksum."""
        for key, blob, checksum, *_ in rows:
            # A damaged page may hold a value of any type in place of a blob.
            if not isinstance(blob, bytes) or zlib.crc32(blob) != checksum or len(blob) != self._vector_bytes:
                raise InvalidStore(f"{self.path}: the vector of key {key} is damaged; the file is left as it is")
        vectors = np.frombuffer(b"".join(row[1] for row in rows), self._dtype).reshape(-1, self._dimension)
        return np.asarray([row[0] for row in rows], np.int64), vectors.astype(np.float32)

    def close(self) -> None:
        """Close all connections. Reads that are under way finish first."""
        self.connections.close()


def _items_of(database: apsw.Connection, keys: IntArray, facts: str) -> list[tuple[int, Item]]:
    # apsw.carray refuses an empty array.
    if not len(keys):
        return []
    tables = "carray(?) CROSS JOIN items ON items.key = value CROSS JOIN vectors ON vectors.key = value"
    return read_items(database, "", apsw.carray(np.ascontiguousarray(keys, np.int64)), tables=tables, facts=facts)


def _key_of(cursor: str) -> int:
    """Return the key that a cursor holds. Raises PageNotFound for a cursor of an order that has values."""
    if not cursor.isdecimal():
        raise _no_cursor()
    return int(cursor)


def _behind_value(cursor: str, value: str, beyond: str) -> tuple[str, list[Any]]:
    """Return the condition that an item stands behind a cursor in an order of values, of which NULL is the last.

    Args:
        cursor: of `CatalogReader.page`.
        value: the column.
        beyond: < or >.

    Raises:
        PageNotFound: the cursor is none of this order.
    """
    key, dash, shown = cursor.partition("-")
    try:
        last: Any = bytes.fromhex(shown).decode()
        if value == "items.size_bytes" and shown:
            last = int(last)
    except ValueError as error:
        raise _no_cursor() from error
    if not dash or (isinstance(last, int) and abs(last) > _LARGEST):
        raise _no_cursor()
    if not shown:
        return f"{value} IS NULL AND items.key {beyond} ?", [int(key)]
    return f"(({value}, items.key) {beyond} (?, ?) OR {value} IS NULL)", [last, int(key)]


def _no_cursor() -> PageNotFound:
    return PageNotFound("cursor: it is none of this order; begin again without a cursor")
