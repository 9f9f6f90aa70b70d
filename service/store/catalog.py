"""SQLite: ids, metadata, vectors, pictures. The truth; the index is made from it.

Every change draws the next number of one sequence: `items.sequence` is an item's last change of any kind,
`vectors.sequence` that of its vector, `removed` the tombstones. Whoever knows all up to a number can ask for the rest.
"""

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidStore
from service.store import Item, NewItem
from service.store.filters import Filter

FILE = "catalog.sqlite"
SCHEMA = 3
VECTOR_TYPES = {"float32": "<f4", "float16": "<f2"}
_META = {"fingerprint", "dimension", "vector_type", "model", "model_folder"}
_CHUNK = 8192  # rows read at a time
_CACHE_KB = 16_384  # of a connection
_MAPPED = 1 << 40  # bytes of the file, at most, that are read without a copy; see docs/decisions/0012

# Pictures stand in a table of their own, so that reading all vectors never reads a picture.
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    metadata TEXT NOT NULL, source TEXT, digest TEXT NOT NULL, sequence INTEGER NOT NULL);
CREATE TABLE vectors (
    key INTEGER PRIMARY KEY REFERENCES items ON DELETE CASCADE,
    vector BLOB NOT NULL, checksum INTEGER NOT NULL, sequence INTEGER NOT NULL, variant TEXT NOT NULL);
CREATE TABLE pictures (
    key INTEGER PRIMARY KEY REFERENCES items ON DELETE CASCADE,
    thumbnail BLOB NOT NULL, original BLOB);
CREATE TABLE removed (sequence INTEGER PRIMARY KEY, key INTEGER NOT NULL, id TEXT NOT NULL);
CREATE INDEX items_by_sequence ON items (sequence);
"""
# What brings a catalog from one schema to the next. Schema 1 knew no variants: model.onnx made all it holds. Schema 2
# knew no tombstones, and its sequence numbers were of vectors alone.
_MIGRATIONS = {
    "1": """
ALTER TABLE items ADD COLUMN variant TEXT NOT NULL DEFAULT 'fp32';
UPDATE meta SET value = '2' WHERE name = 'schema';
""",
    "2": """
ALTER TABLE items ADD COLUMN sequence INTEGER NOT NULL DEFAULT 0;
ALTER TABLE vectors ADD COLUMN variant TEXT NOT NULL DEFAULT 'fp32';
UPDATE items SET sequence = (SELECT sequence FROM vectors WHERE vectors.key = items.key);
UPDATE vectors SET variant = (SELECT variant FROM items WHERE items.key = vectors.key);
ALTER TABLE items DROP COLUMN variant;
CREATE TABLE removed (sequence INTEGER PRIMARY KEY, key INTEGER NOT NULL, id TEXT NOT NULL);
CREATE INDEX items_by_sequence ON items (sequence);
INSERT INTO meta VALUES ('vector_type', 'float32');
UPDATE meta SET value = '3' WHERE name = 'schema';
""",
}
_LATEST = "SELECT max((SELECT coalesce(max(sequence), 0) FROM items), (SELECT coalesce(max(sequence), 0) FROM removed))"
_CHANGED = """
SELECT key FROM removed WHERE sequence > ?1
UNION SELECT items.key FROM items JOIN vectors USING (key) WHERE items.sequence > ?1 AND vectors.sequence > ?1
"""
# In the order of the keys that are given: SQLite takes the tables of a CROSS JOIN as they stand.
_OF_KEYS = "SELECT {columns} FROM carray(?) CROSS JOIN {table} ON key = value"


class Change(NamedTuple):
    """What became of a key's vector: (D,) float32 before and after, None where there was or is none."""

    key: int
    old: FloatArray | None
    new: FloatArray | None


class Catalog:
    """One SQLite file.

    Reading may go on in any number of threads, each with a connection of its own for as long as it reads. Changes come
    from one thread at a time, inside `transaction`; whoever calls sees to that.

    Attributes:
        path: of the file.
        meta: what it says of itself: schema, fingerprint, dimension, vector_type, model, model_folder …
    """

    def __init__(self, folder: Path, meta: dict[str, str] | None) -> None:
        """Open the catalog in a folder.

        Args:
            folder: of the store.
            meta: written into a catalog that is new; None opens an existing one for reading only.

        Raises:
            InvalidStore: no catalog to read, a damaged one, or a file that is not one of ours. The file is kept.
        """
        self.path = folder / FILE
        self._idle: dict[bool, list[apsw.Connection]] = {False: [], True: []}  # by whether they map the file
        self._pooling = threading.Lock()
        self._closed = False
        if meta is None and not self.path.exists():
            raise no_store(folder)
        try:
            self._database = self._connect(meta is not None)
        except apsw.Error as error:
            raise InvalidStore(f"{self.path}: {_described(error)}; the file is left as it is") from error
        try:
            if meta is not None:
                self._prepare(meta)
            self.meta: dict[str, str] = dict(self._database.execute("SELECT name, value FROM meta"))
            self._check_meta()
            self._dtype = np.dtype(VECTOR_TYPES[self.meta["vector_type"]])
            self._dimension = int(self.meta["dimension"])
            self._width = self._dtype.itemsize * self._dimension
            self._sequence = int(_one(self._database, _LATEST))
        except apsw.Error as error:
            self.close()
            raise InvalidStore(f"{self.path}: {_described(error)}; the file is left as it is") from error
        except BaseException:
            self.close()
            raise

    def _connect(self, writable: bool, mapped: bool = False) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE if writable else apsw.SQLITE_OPEN_READONLY
        connection = apsw.Connection(str(self.path), flags=flags)
        connection.set_busy_timeout(5000)
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KB}").fetchall()
        if mapped:
            connection.execute(f"PRAGMA mmap_size = {_MAPPED}").fetchall()
        return connection

    def _prepare(self, meta: dict[str, str]) -> None:
        database = self._database
        empty = not _one(database, "SELECT count(*) FROM sqlite_schema")
        # One by one: apsw stops a script at its first row until that row is read, and these give rows.
        for pragma in ("page_size = 16384", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        with database:
            if empty:
                database.execute(_TABLES)
                database.executemany("INSERT INTO meta VALUES (?, ?)", {"schema": str(SCHEMA), **meta}.items())
            while (
                script := _MIGRATIONS.get(_one(database, "SELECT value FROM meta WHERE name = 'schema'"))
            ) is not None:
                database.execute(script)

    def _check_meta(self) -> None:
        schema = self.meta.get("schema")
        if schema != str(SCHEMA):
            hint = "; `lookalike index` or `serve` brings it up to date" if schema in _MIGRATIONS else ""
            raise InvalidStore(f"{self.path}: schema {schema}, this version reads {SCHEMA}{hint}")
        wrong = sorted(_META - self.meta.keys())
        wrong += ["vector_type"] if self.meta.get("vector_type") not in VECTOR_TYPES else []
        wrong += ["dimension"] if not self.meta.get("dimension", "").isdecimal() else []
        if wrong:
            raise InvalidStore(
                f"{self.path}: damaged: its table meta says no {wrong[0]} that can be used; the file is left as it is"
            )

    # Changing ----------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's changes or none; on disk when it ends. Raises apsw.Error."""
        self._database.execute("BEGIN IMMEDIATE").fetchall()
        try:
            yield
            self._database.execute("COMMIT").fetchall()
        except BaseException:
            if self._database.in_transaction:  # SQLite itself rolls back on some errors
                self._database.execute("ROLLBACK").fetchall()
            raise

    @contextmanager
    def part(self) -> Iterator[None]:
        """All of the block's changes or none, within a transaction that goes on either way."""
        self._database.execute("SAVEPOINT part").fetchall()
        before = self._sequence
        try:
            yield
        except BaseException:
            self._sequence = before
            if self._database.in_transaction:
                self._database.execute("ROLLBACK TO part; RELEASE part").fetchall()
            raise
        self._database.execute("RELEASE part").fetchall()

    @property
    def in_transaction(self) -> bool:
        """Whether `transaction` is at work and SQLite has not given it up."""
        return bool(self._database.in_transaction)

    @property
    def drawn(self) -> int:
        """The last sequence number that was drawn by a change."""
        return self._sequence

    def put(self, item: NewItem) -> Change:
        """Add or replace an item."""
        execute = self._database.execute
        self._sequence += 1
        vector = item.embedding.astype(self._dtype)
        blob = vector.tobytes()
        fields = (_dump(item.metadata), item.source, item.digest, self._sequence)
        row = next(execute("SELECT key, vector FROM items JOIN vectors USING (key) WHERE id = ?", (item.id,)), None)
        if row is None:
            execute(
                "INSERT INTO items (id, metadata, source, digest, sequence) VALUES (?, ?, ?, ?, ?)", (item.id, *fields)
            )
        else:
            execute(
                "UPDATE items SET metadata = ?, source = ?, digest = ?, sequence = ? WHERE key = ?", (*fields, row[0])
            )
        key = self._database.last_insert_rowid() if row is None else row[0]
        execute(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)",
            (key, blob, zlib.crc32(blob), self._sequence, item.variant),
        )
        execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (key, item.thumbnail, item.original))
        old = None if row is None else np.frombuffer(row[1], self._dtype).astype(np.float32)
        return Change(key, old, vector.astype(np.float32))

    def remove(self, id: str) -> Change | None:
        """Remove an item and leave a tombstone; None where there was no item."""
        query = "SELECT key, vector FROM items JOIN vectors USING (key) WHERE id = ?"
        row = next(self._database.execute(query, (id,)), None)
        if row is None:
            return None
        self._sequence += 1
        self._database.execute("DELETE FROM items WHERE key = ?", (row[0],))
        self._database.execute("INSERT INTO removed VALUES (?, ?, ?)", (self._sequence, row[0], id))
        return Change(row[0], np.frombuffer(row[1], self._dtype).astype(np.float32), None)

    def change_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """Replace an item's metadata by what `change` makes of it; None where there is no item."""
        item = _item(self._database, id)
        if item is None:
            return None
        metadata = change(item.metadata)
        self._sequence += 1
        query = "UPDATE items SET metadata = ?, sequence = ? WHERE id = ?"
        self._database.execute(query, (_dump(metadata), self._sequence, id))
        return Item(item.id, metadata, item.source, item.digest, item.variant)

    def note(self, facts: dict[str, str]) -> None:
        """Write facts about the store into the table meta; facts of the same names are replaced."""
        self._database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", facts.items())

    # Reading -----------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self, mapped: bool = False) -> Iterator[apsw.Connection]:
        """A connection for this thread alone. Raises InvalidStore for what SQLite cannot read.

        Few rows by their keys are read in half the time where the file is mapped; what reads the whole file that way
        holds it all in memory.
        """
        idle = self._idle[mapped]
        with self._pooling:
            if self._closed:
                raise InvalidStore("the store is closed")
            connection = idle.pop() if idle else None
        try:
            if connection is None:
                connection = self._connect(False, mapped)
            yield connection
        except apsw.Error as error:
            raise InvalidStore(f"{self.path}: {_described(error)}") from error
        finally:
            with self._pooling:
                if connection is not None and not self._closed:
                    idle.append(connection)
                elif connection is not None:
                    connection.close()

    def sequence(self) -> int:
        """Return the number of the last change that is committed."""
        with self._reading() as database:
            return int(_one(database, _LATEST))

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        with self._reading() as database:
            return _item(database, id)

    def some_vectors(self, keys: IntArray, until: int) -> FloatArray | None:
        """Return the vectors (N, D) of keys, or None where one changed or went after `until`.

        Raises:
            InvalidStore: a vector does not have its checksum.
        """
        rows = self._current("key, vector, checksum", "vectors", keys, until)
        return None if rows is None else self._checked(rows)[1]

    def shown(self, keys: IntArray, until: int) -> dict[int, tuple[str, str]] | None:
        """Return the ids of keys and their metadata as JSON, or None where one changed or went after `until`."""
        rows = self._current("key, id, metadata", "items", keys, until)
        return None if rows is None else {key: (id, metadata) for key, id, metadata, _ in rows}

    def _current(self, columns: str, table: str, keys: IntArray, until: int) -> list[Any] | None:
        """The columns, and the sequence number behind them, of keys in order; None as the two above."""
        if not len(keys):  # carray takes none
            return []
        query = _OF_KEYS.format(columns=f"{columns}, sequence", table=table)
        with self._reading(mapped=True) as database:
            rows: list[Any] = database.execute(query, (apsw.carray(keys),)).fetchall()
        return None if len(rows) < len(keys) or max(row[3] for row in rows) > until else rows

    def matching(self, where: Filter, since: int) -> tuple[int, IntArray, IntArray]:
        """Return which items meet a filter, of those that changed after a sequence number.

        Returns:
            The number of the last change; the keys of all that changed or were removed; the keys that meet it.

        Cost: reads the metadata of all that changed.
        """
        # Values come before the number of the sequence in the text, as SQLite counts its question marks.
        query = "SELECT key, (" + where.sql + ") FROM items WHERE sequence > ?"  # noqa: S608  # ? alone
        with self._reading() as database, database:
            latest = int(_one(database, _LATEST))
            rows = database.execute(query, (*where.values, since)).fetchall()
            gone = [key for (key,) in database.execute("SELECT key FROM removed WHERE sequence > ?", (since,))]
        changed = np.fromiter((key for key, _ in rows), np.int64, len(rows))
        meets = np.fromiter((bool(met) for _, met in rows), np.bool_, len(rows))
        return latest, np.concatenate([changed, np.asarray(gone, np.int64)]), changed[meets]

    def scan(self, limit: int, after: int) -> list[tuple[int, Item]]:
        """Return up to `limit` items with keys above `after`, in key order."""
        with self._reading() as database:
            return _items(database, "WHERE key > ? ORDER BY key LIMIT ?", after, limit)

    def changed_items(self, since: int, limit: int, after: int) -> list[tuple[int, Item]]:
        """Return up to `limit` items with keys above `after` that changed after a sequence number, in key order."""
        with self._reading() as database:
            where = "WHERE key > ? AND items.sequence > ? ORDER BY key LIMIT ?"
            return _items(database, where, after, since, limit)

    def removed(self, since: int) -> list[str]:
        """Return the ids that were removed after a sequence number, some of which may be there again."""
        with self._reading() as database:
            query = "SELECT DISTINCT id FROM removed WHERE sequence > ?"
            return [str(id) for (id,) in database.execute(query, (since,))]

    def thumbnail(self, id: str) -> bytes | None:
        """Return an item's thumbnail, or None; an item that came as an embedding has none."""
        return self._blob("SELECT thumbnail FROM pictures WHERE key = (SELECT key FROM items WHERE id = ?)", id) or None

    def original(self, id: str) -> bytes | None:
        """Return an item's own bytes, or None where they were not kept."""
        return self._blob("SELECT original FROM pictures WHERE key = (SELECT key FROM items WHERE id = ?)", id)

    def vector(self, id: str) -> FloatArray | None:
        """Return an item's embedding, or None."""
        blob = self._blob("SELECT vector FROM vectors WHERE key = (SELECT key FROM items WHERE id = ?)", id)
        return None if blob is None else np.frombuffer(blob, self._dtype).astype(np.float32)

    def keys(self) -> IntArray:
        """Return all keys, in order. Cost: reads an index, no table."""
        with self._reading() as database:
            rows = database.execute("SELECT key FROM items INDEXED BY items_by_sequence WHERE sequence > -1")
            return np.sort(np.fromiter((key for (key,) in rows), np.int64))

    def changed(self, since: int) -> IntArray:
        """Return the keys whose vector came, changed or went after a sequence number."""
        with self._reading() as database:
            return np.fromiter((key for (key,) in database.execute(_CHANGED, (since,))), np.int64)

    def vectors(self, among: IntArray | None = None) -> Iterator[tuple[IntArray, FloatArray]]:
        """Yield keys and their vectors (N, D), in key order, chunk by chunk; changes may go on between two chunks.

        Args:
            among: these keys alone, those that are there.

        Raises:
            InvalidStore: a vector does not have its checksum.
        """
        if among is not None:
            among = np.sort(among)
            query = _OF_KEYS.format(columns="key, vector, checksum", table="vectors")
            parts = (among[start : start + _CHUNK] for start in range(0, len(among), _CHUNK))
            for part in parts:
                with self._reading() as database:
                    rows = database.execute(query, (apsw.carray(part),)).fetchall()
                if rows:
                    yield self._checked(rows)
            return
        last: Any = -1
        query = "SELECT key, vector, checksum FROM vectors WHERE key > ? ORDER BY key LIMIT ?"
        while True:
            with self._reading() as database:
                rows = database.execute(query, (last, _CHUNK)).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield self._checked(rows)

    def close(self) -> None:
        """Close the file, for those who read as soon as they are done. Not while anybody changes it."""
        with self._pooling:
            self._closed = True
            for connection in self._idle[False] + self._idle[True]:
                connection.close()
            self._idle = {False: [], True: []}
        self._database.close()

    def _checked(self, rows: list[Any]) -> tuple[IntArray, FloatArray]:
        for key, blob, checksum, *_ in rows:
            # In a damaged page anything may stand where a blob should.
            if not isinstance(blob, bytes) or zlib.crc32(blob) != checksum or len(blob) != self._width:
                raise InvalidStore(f"{self.path}: the vector of key {key} is damaged; the file is left as it is")
        vectors = np.frombuffer(b"".join(row[1] for row in rows), self._dtype).reshape(-1, self._dimension)
        return np.asarray([row[0] for row in rows], np.int64), vectors.astype(np.float32)

    def _blob(self, query: str, id: str) -> bytes | None:
        with self._reading() as database:
            blob = _one(database, query, id)
        return None if blob is None else bytes(blob)


def has_catalog(folder: Path) -> bool:
    """Whether there is a catalog in a folder."""
    return (folder / FILE).exists()


def no_store(folder: Path) -> InvalidStore:
    """Return the error for a folder that should have a store and has none."""
    return InvalidStore(f"{folder}: no store there; make one with `lookalike index SOURCE --store {folder}`")


def read_meta(folder: Path) -> dict[str, str]:
    """Return what the catalog in a folder says of itself, whatever its schema.

    Raises:
        InvalidStore: it is damaged.
    """
    path = folder / FILE
    try:
        database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            return dict(database.execute("SELECT name, value FROM meta"))
        finally:
            database.close()
    except apsw.Error as error:
        raise InvalidStore(f"{path}: {_described(error)}; the file is left as it is") from error


def _items(database: apsw.Connection, where: str, *values: Any) -> list[tuple[int, Item]]:
    columns = "SELECT key, id, metadata, source, digest, variant FROM items JOIN vectors USING (key) "
    query = columns + where  # ours alone
    return [
        (key, Item(id, json.loads(metadata), *rest)) for key, id, metadata, *rest in database.execute(query, values)
    ]


def _item(database: apsw.Connection, id: str) -> Item | None:
    rows = _items(database, "WHERE id = ?", id)
    return rows[0][1] if rows else None


def _one(database: apsw.Connection, query: str, *values: Any) -> Any:
    row = next(iter(database.execute(query, values)), None)
    return None if row is None else row[0]


def _dump(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False, allow_nan=False)


def _described(error: apsw.Error) -> str:
    damaged = isinstance(error, apsw.CorruptError | apsw.NotADBError)
    return f"damaged: {error}" if damaged else f"cannot be used: {error}"
