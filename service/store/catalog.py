"""SQLite: ids, metadata, vectors, pictures. The source of truth; the index is rebuilt from it.

Every change takes the next number of one sequence. `items.sequence` is the number of an item's last change of any
kind, `vectors.sequence` that of the last change of its vector, and `removed` keeps the number of each removal. So a
reader that knows every change up to a number can ask for the changes after it.
"""

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import numpy as np

from service import FloatArray
from service.errors import InvalidRequest, InvalidStore
from service.file_facts import FileFacts, Move
from service.store import Item, NewItem
from service.store.filters import FOLDED, Filter, folded

FILE = "catalog.sqlite"
SCHEMA = 6
# Schemas that are read as they are, beside the process that would migrate them: 3 lacks the table `dismissed`, 3 and 4
# the facts about files, and 5 an index.
_WITHOUT_FACTS = ("3", "4")
_READABLE = (*_WITHOUT_FACTS, "5", str(SCHEMA))
VECTOR_TYPES = {"float32": "<f4", "float16": "<f2"}
LATEST = "SELECT max((SELECT coalesce(max(sequence), 0) FROM items), (SELECT coalesce(max(sequence), 0) FROM removed))"
_FACTS = ", ".join((*FileFacts._fields, "mtime_ns"))
_FIELDS = f"metadata, source, digest, sequence, {_FACTS}"
_META = {"fingerprint", "dimension", "vector_type", "model", "model_folder"}
# Each connection has a page cache of its own.
_CACHE_KB = 16_384
# Upper limit on the bytes of the file that are read without a copy; see docs/decisions/0012.
_MAX_MAPPED_BYTES = 1 << 40

# Pictures have a table of their own, so that a scan of all vectors reads no picture.
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    metadata TEXT NOT NULL, source TEXT, digest TEXT NOT NULL, sequence INTEGER NOT NULL,
    width INTEGER, height INTEGER, size_bytes INTEGER, format TEXT, date TEXT, mtime_ns INTEGER);
CREATE TABLE vectors (
    key INTEGER PRIMARY KEY REFERENCES items ON DELETE CASCADE,
    vector BLOB NOT NULL, checksum INTEGER NOT NULL, sequence INTEGER NOT NULL, variant TEXT NOT NULL);
CREATE TABLE pictures (
    key INTEGER PRIMARY KEY REFERENCES items ON DELETE CASCADE,
    thumbnail BLOB NOT NULL, original BLOB);
CREATE TABLE removed (sequence INTEGER PRIMARY KEY, key INTEGER NOT NULL, id TEXT NOT NULL);
CREATE INDEX items_by_sequence ON items (sequence);
CREATE INDEX items_by_date ON items (date);
CREATE INDEX items_by_size ON items (size_bytes);
CREATE TABLE dismissed (one TEXT NOT NULL, other TEXT NOT NULL, PRIMARY KEY (one, other)) WITHOUT ROWID;
"""
# Each script brings a catalog to the next schema. In schema 1 model.onnx had made every vector, so there were no
# variants. Schema 2 had no tombstones, and numbered only the changes of vectors. Schema 3 had no pairs of digests that
# the user holds for no duplicates. Schema 4 had no facts about files; `lookalike index` fills them in. Schema 5 had no
# index by the size of files.
MIGRATIONS = {
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
    "3": """
CREATE TABLE dismissed (one TEXT NOT NULL, other TEXT NOT NULL, PRIMARY KEY (one, other)) WITHOUT ROWID;
UPDATE meta SET value = '4' WHERE name = 'schema';
""",
    "4": """
ALTER TABLE items ADD COLUMN width INTEGER;
ALTER TABLE items ADD COLUMN height INTEGER;
ALTER TABLE items ADD COLUMN size_bytes INTEGER;
ALTER TABLE items ADD COLUMN format TEXT;
ALTER TABLE items ADD COLUMN date TEXT;
ALTER TABLE items ADD COLUMN mtime_ns INTEGER;
CREATE INDEX items_by_date ON items (date);
UPDATE meta SET value = '5' WHERE name = 'schema';
""",
    "5": """
CREATE INDEX items_by_size ON items (size_bytes);
UPDATE meta SET value = '6' WHERE name = 'schema';
""",
}


class Change(NamedTuple):
    """The vector of a key before and after a change: (D,) float32, or None if there was or is none."""

    key: int
    old: FloatArray | None
    new: FloatArray | None


class CatalogWriter:
    """The one connection that changes a catalog.

    Changes come from one thread at a time, inside `transaction`; the caller ensures it.

    Attributes:
        path: the catalog's file.
        meta: facts about the store: schema, fingerprint, dimension, vector_type, model, model_folder …
    """

    def __init__(self, folder: Path, meta: dict[str, str]) -> None:
        """Open the catalog in a store's folder, create it there, or migrate it to the current schema.

        Args:
            folder: of the store.
            meta: facts to write into a new catalog.

        Raises:
            InvalidStore: the file is damaged, cannot be written, or is not one of ours. It stays as it is.
        """
        self.path = folder / FILE
        with _opening(self.path):
            self._database = connect(self.path, writable=True)
        try:
            with _opening(self.path):
                self._prepare(meta)
                self.meta = checked_meta(self.path, _meta(self._database))
                self._sequence = int(one(self._database, LATEST))
        except BaseException:
            self._database.close()
            raise
        self._dtype = np.dtype(VECTOR_TYPES[self.meta["vector_type"]])

    def _prepare(self, meta: dict[str, str]) -> None:
        database = self._database
        empty = not one(database, "SELECT count(*) FROM sqlite_schema")
        # One by one: apsw stops a script at its first row until that row is read, and these give rows.
        for pragma in ("page_size = 16384", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        with database:
            if empty:
                database.execute(_TABLES)
                database.executemany("INSERT INTO meta VALUES (?, ?)", {"schema": str(SCHEMA), **meta}.items())
            while (script := MIGRATIONS.get(one(database, "SELECT value FROM meta WHERE name = 'schema'"))) is not None:
                database.execute(script)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes of the block, or none of them. They are on disk when it ends.

        Raises:
            apsw.FullError: the disk or a quota has no room.
            apsw.Error: any other failure.
        """
        try:
            with full_error(self._database):
                self._database.execute("BEGIN IMMEDIATE").fetchall()
                yield
                self._database.execute("COMMIT").fetchall()
        except BaseException:
            # SQLite itself rolls back on some errors.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK").fetchall()
            raise

    @contextmanager
    def part(self) -> Iterator[None]:
        """Keep all changes of the block or none of them, within a transaction that continues in either case."""
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
        """Whether `transaction` is running and SQLite has not rolled it back."""
        return bool(self._database.in_transaction)

    @property
    def drawn(self) -> int:
        """The sequence number of the last change, committed or not."""
        return self._sequence

    def put(self, item: NewItem) -> Change:
        """Add or replace an item."""
        execute = self._database.execute
        self._sequence += 1
        vector = item.embedding.astype(self._dtype)
        blob = vector.tobytes()
        query = "SELECT key, vector, metadata FROM items JOIN vectors USING (key) WHERE id = ?"
        row = next(execute(query, (item.id,)), None)
        metadata = item.metadata
        if row is not None and item.keep_metadata:
            metadata = json.loads(row[2]) | metadata
        fields = (_dump(metadata), item.source, item.digest, self._sequence, *item.facts, item.mtime_ns)
        if row is None:
            # The SQL holds the names of columns alone.
            execute(f"INSERT INTO items (id, {_FIELDS}) VALUES (?{', ?' * len(fields)})", (item.id, *fields))  # noqa: S608
        else:
            execute(f"UPDATE items SET ({_FIELDS}) = (?{', ?' * (len(fields) - 1)}) WHERE key = ?", (*fields, row[0]))  # noqa: S608
        key = self._database.last_insert_rowid() if row is None else row[0]
        execute(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)",
            (key, blob, zlib.crc32(blob), self._sequence, item.variant),
        )
        execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (key, item.thumbnail, item.original))
        old = None if row is None else np.frombuffer(row[1], self._dtype).astype(np.float32)
        return Change(key, old, vector.astype(np.float32))

    def remove(self, id: str) -> Change | None:
        """Remove an item and leave a tombstone; None if no item has this id."""
        query = "SELECT key, vector FROM items JOIN vectors USING (key) WHERE id = ?"
        row = next(self._database.execute(query, (id,)), None)
        if row is None:
            return None
        self._sequence += 1
        self._database.execute("DELETE FROM items WHERE key = ?", (row[0],))
        self._database.execute("INSERT INTO removed VALUES (?, ?, ?)", (self._sequence, row[0], id))
        return Change(row[0], np.frombuffer(row[1], self._dtype).astype(np.float32), None)

    def ids_matching(self, where: Filter) -> list[str]:
        """Return the ids of all items that match. Cost: reads the metadata of all items."""
        # The SQL holds no value itself.
        query = "SELECT id FROM items WHERE " + where.sql  # noqa: S608
        return [id for (id,) in self._database.execute(query, where.values)]

    def change_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """Replace an item's metadata by the result of `change`; None if no item has this id."""
        rows = read_items(self._database, "WHERE id = ?", id)
        if not rows:
            return None
        item = rows[0][1]
        metadata = change(item.metadata)
        self._sequence += 1
        query = "UPDATE items SET metadata = ?, sequence = ? WHERE id = ?"
        self._database.execute(query, (_dump(metadata), self._sequence, id))
        return replace(item, metadata=metadata)

    def move(self, moves: Sequence[Move], changes: list[Change]) -> int:
        """Give items other ids, sources and facts about their files, or remove them; see Store.move.

        Args:
            moves: what to do.
            changes: gets those of vectors.
        """
        execute, count = self._database.execute, 0
        staying: list[tuple[int, Move, str]] = []
        for move in moves:
            key = one(self._database, "SELECT key FROM items WHERE id = ? AND digest = ?", move.id, move.digest)
            if key is None:
                continue
            count += 1
            if move.to is None:
                changes += [change for change in (self.remove(move.id),) if change is not None]
                continue
            if move.to != move.id:
                # Readers that follow the changes forget the id. The item keeps its key, so the tombstone names none.
                self._sequence += 1
                execute("INSERT INTO removed VALUES (?, 0, ?)", (self._sequence, move.id))
                # Items may exchange their ids, so all are free before one is taken. No id has a control character.
                execute("UPDATE items SET id = ? WHERE key = ?", (f"\x01{key}", key))
            staying.append((key, move, move.to))
        for key, move, to in staying:
            if to != move.id and one(self._database, "SELECT 1 FROM items WHERE id = ?", to):
                raise InvalidRequest("an item has the id that another item is to get")
            self._sequence += 1
            values = (to, move.source, self._sequence, *move.facts, move.mtime_ns, key)
            execute(f"UPDATE items SET (id, source, sequence, {_FACTS}) = (?{', ?' * 8}) WHERE key = ?", values)  # noqa: S608
        return count

    def dismiss(self, pairs: Iterable[tuple[str, str]], dismissed: bool = True) -> None:
        """Remember pairs of digests that are no duplicates, or forget them. The order within a pair does not count."""
        query = "INSERT OR IGNORE INTO dismissed VALUES (?, ?)"
        if not dismissed:
            query = "DELETE FROM dismissed WHERE one = ? AND other = ?"
        self._database.executemany(query, [(min(pair), max(pair)) for pair in pairs])

    def note(self, facts: dict[str, str]) -> None:
        """Write facts about the store into the table meta; facts of the same names are replaced."""
        self._database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", facts.items())

    def close(self) -> None:
        """Close the file, after its readers so that SQLite empties the write-ahead log."""
        self._database.close()


def has_catalog(folder: Path) -> bool:
    """Return whether a folder has a catalog."""
    return (folder / FILE).exists()


def no_store(folder: Path) -> InvalidStore:
    """Return the error for a folder that should hold a store and holds none."""
    return InvalidStore(f"{folder}: no store there; make one with `lookalike index SOURCE --store {folder}`")


def read_meta(folder: Path) -> dict[str, str]:
    """Return the facts in a catalog's table meta, for any schema version.

    Raises:
        InvalidStore: the catalog is damaged.
    """
    return meta_of(folder / FILE)


def meta_of(path: Path) -> dict[str, str]:
    """Return the facts in the table meta of a catalog's file, as `read_meta` does for a store's."""
    with _opening(path):
        database = connect(path)
        try:
            return _meta(database)
        finally:
            database.close()


# For this file and the reader's ------------------------------------------------------------------


def connect(path: Path, writable: bool = False, mapped: bool = False) -> apsw.Connection:
    """Open a connection, which creates the file if it is writable. Raises apsw.Error."""
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE if writable else apsw.SQLITE_OPEN_READONLY
    connection = apsw.Connection(str(path), flags=flags)
    connection.set_busy_timeout(5000)
    connection.create_scalar_function(FOLDED, lambda *texts: folded(str(texts[0])), 1, deterministic=True)
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KB}").fetchall()
    if mapped:
        connection.execute(f"PRAGMA mmap_size = {_MAX_MAPPED_BYTES}").fetchall()
    return connection


def checked_meta(path: Path, meta: dict[str, str]) -> dict[str, str]:
    """Return the facts of the table meta unchanged.

    Args:
        path: the catalog's file, for messages.
        meta: its facts.

    Raises:
        InvalidStore: another schema, or a fact that is missing or cannot be used.
    """
    schema = meta.get("schema")
    if schema not in _READABLE:
        hint = "; `lookalike index` or `serve` brings it up to date" if schema in MIGRATIONS else ""
        raise InvalidStore(f"{path}: schema {schema}, this version reads {SCHEMA}{hint}")
    wrong = sorted(_META - meta.keys())
    wrong += ["vector_type"] if meta.get("vector_type") not in VECTOR_TYPES else []
    wrong += ["dimension"] if not meta.get("dimension", "").isdecimal() else []
    if wrong:
        raise InvalidStore(
            f"{path}: damaged: its table meta says no {wrong[0]} that can be used; the file is left as it is"
        )
    return meta


def facts_of(schema: str) -> str:
    """Return the columns of facts about files, which are null in a catalog of an earlier schema."""
    return ", ".join(["NULL"] * (len(FileFacts._fields) + 1)) if schema in _WITHOUT_FACTS else _FACTS


def read_items(
    database: apsw.Connection,
    where: str,
    *values: Any,
    tables: str = "items JOIN vectors USING (key)",
    facts: str = _FACTS,
) -> list[tuple[int, Item]]:
    """Return keys and items that match a condition in SQL; `facts` are the columns that `facts_of` gives."""
    query = f"SELECT items.key, id, metadata, source, digest, variant, {facts} FROM {tables} {where}"  # noqa: S608
    return [
        (key, Item(id, json.loads(metadata), source, digest, variant, facts=FileFacts(*known), mtime_ns=mtime_ns))
        for key, id, metadata, source, digest, variant, *known, mtime_ns in database.execute(query, values)
    ]


def one(database: apsw.Connection, query: str, *values: Any) -> Any:
    """Return the first column of a query's first row; None without a row."""
    row = next(iter(database.execute(query, values)), None)
    return None if row is None else row[0]


def described(error: apsw.Error) -> str:
    """Return an error of SQLite in words."""
    damaged = isinstance(error, apsw.CorruptError | apsw.NotADBError)
    return f"damaged: {error}" if damaged else f"cannot be used: {error}"


@contextmanager
def full_error(database: apsw.Connection) -> Iterator[None]:
    """Raise FullError where a write of the block found no room. SQLite itself tells only a full disk, not a quota."""
    try:
        yield
    except apsw.IOError as error:
        # After a sync that failed it is uncertain how much the disk holds, whatever the reason.
        writes = (apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR_SHMSIZE)
        reason = database.system_errno
        # An error that a VFS written in Python raised has no such code.
        result: int | None = getattr(error, "extendedresult", None)
        if result not in writes or reason not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise apsw.FullError(os.strerror(reason)) from error


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Raise InvalidStore for an error of SQLite while a catalog is opened."""
    try:
        yield
    except apsw.Error as error:
        raise InvalidStore(f"{path}: {described(error)}; the file is left as it is") from error


def _meta(database: apsw.Connection) -> dict[str, str]:
    return dict(database.execute("SELECT name, value FROM meta"))


def _dump(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False, allow_nan=False)
