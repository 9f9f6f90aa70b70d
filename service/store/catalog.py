"""SQLite: id, metadata, vector, thumbnail. The truth; the index is made from it."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidStore
from service.store import Item, NewItem
from service.store.filters import Filter

FILE = "catalog.sqlite"
SCHEMA = 2

# Pictures stand in a table of their own, so that reading all vectors never reads a picture.
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    metadata TEXT NOT NULL, source TEXT, digest TEXT NOT NULL, variant TEXT NOT NULL);
CREATE TABLE vectors (
    key INTEGER PRIMARY KEY REFERENCES items ON DELETE CASCADE,
    vector BLOB NOT NULL, checksum INTEGER NOT NULL, sequence INTEGER NOT NULL);
CREATE TABLE pictures (
    key INTEGER PRIMARY KEY REFERENCES items ON DELETE CASCADE,
    thumbnail BLOB NOT NULL, original BLOB);
"""
# Schema 1 knew no variants: model.onnx made all it holds.
_FROM_SCHEMA_1 = """
ALTER TABLE items ADD COLUMN variant TEXT NOT NULL DEFAULT 'fp32';
UPDATE meta SET value = '2' WHERE name = 'schema';
"""


class Catalog:
    """One SQLite file. Not for several threads at once: the store holds a lock around every call."""

    def __init__(self, folder: Path, meta: dict[str, str] | None) -> None:
        """Open the catalog in a folder.

        Args:
            folder: of the store.
            meta: written into a catalog that is new; None opens an existing one for reading only.

        Raises:
            InvalidStore: no catalog to read, or a file that is not one of ours.
        """
        path = folder / FILE
        if meta is None and not path.exists():
            raise InvalidStore(f"{folder}: no store there; make one with `lookalike index SOURCE --store {folder}`")
        reading = apsw.SQLITE_OPEN_READONLY
        writing = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        try:
            self._database = apsw.Connection(str(path), flags=reading if meta is None else writing)
            self._database.set_busy_timeout(5000)
            if meta is not None:
                self._prepare(meta)
            self.meta = dict(self._database.execute("SELECT name, value FROM meta"))
        except apsw.Error as error:
            raise InvalidStore(f"{path}: not a catalog that can be used: {error}") from error
        if self.meta.get("schema") != str(SCHEMA):
            hint = "; `lookalike index` or `serve` brings it up to date" if self.meta.get("schema") == "1" else ""
            raise InvalidStore(f"{path}: schema {self.meta.get('schema')}, this version reads {SCHEMA}{hint}")
        self._sequence: int = self._one("SELECT coalesce(max(sequence), 0) FROM vectors") or 0

    def _prepare(self, meta: dict[str, str]) -> None:
        database = self._database
        empty = not self._one("SELECT count(*) FROM sqlite_schema")
        # One by one: apsw stops a script at its first row until that row is read, and these give rows.
        for pragma in ("page_size = 16384", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        with database:
            if empty:
                database.execute(_TABLES)
                database.executemany("INSERT INTO meta VALUES (?, ?)", {"schema": str(SCHEMA), **meta}.items())
            elif self._one("SELECT value FROM meta WHERE name = 'schema'") == "1":
                database.execute(_FROM_SCHEMA_1)

    def add(self, items: Sequence[NewItem]) -> list[tuple[int, bool]]:
        """Add or replace items in one transaction; return each one's key and whether its id was new."""
        with self._database:
            added = [self._put(item) for item in items]
        return added

    def _put(self, item: NewItem) -> tuple[int, bool]:
        self._sequence += 1
        known = self.key(item.id)
        fields = (_dump(item.metadata), item.source, item.digest, item.variant)
        if known is None:
            self._database.execute(
                "INSERT INTO items (id, metadata, source, digest, variant) VALUES (?, ?, ?, ?, ?)", (item.id, *fields)
            )
        else:
            self._database.execute(
                "UPDATE items SET metadata = ?, source = ?, digest = ?, variant = ? WHERE key = ?", (*fields, known)
            )
        key = self._database.last_insert_rowid() if known is None else known
        vector = item.embedding.astype("<f4").tobytes()
        self._database.execute(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", (key, vector, zlib.crc32(vector), self._sequence)
        )
        self._database.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (key, item.thumbnail, item.original))
        return key, known is None

    def set_metadata(self, id: str, metadata: dict[str, Any]) -> None:
        """Replace an item's metadata."""
        with self._database:
            self._database.execute("UPDATE items SET metadata = ? WHERE id = ?", (_dump(metadata), id))

    def remove(self, id: str) -> int | None:
        """Remove an item; return its key, or None when there was none."""
        key = self.key(id)
        if key is not None:
            with self._database:
                self._database.execute("DELETE FROM items WHERE key = ?", (key,))
        return key

    def key(self, id: str) -> int | None:
        """Return the key of an id, or None."""
        key = self._one("SELECT key FROM items WHERE id = ?", id)
        return None if key is None else int(key)

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        rows = self._items("WHERE id = ?", id)
        return rows[0][1] if rows else None

    def by_keys(self, keys: Sequence[int]) -> dict[int, Item]:
        """Return the items of keys, those that are there."""
        return dict(self._items("WHERE key IN (SELECT value FROM json_each(?))", json.dumps(list(keys))))

    def keys(self, where: Filter) -> IntArray:
        """Return the keys of the items that meet a filter. Cost: reads all metadata."""
        rows = self._database.execute("SELECT key FROM items WHERE " + where.sql, where.values)  # noqa: S608  # ? alone
        return np.fromiter((key for (key,) in rows), np.int64)

    def scan(self, limit: int, after: int) -> list[tuple[int, Item]]:
        """Return up to `limit` items with keys above `after`, in key order."""
        return self._items("WHERE key > ? ORDER BY key LIMIT ?", after, limit)

    def thumbnail(self, id: str) -> bytes | None:
        """Return an item's thumbnail, or None."""
        return self._blob("SELECT thumbnail FROM pictures WHERE key = (SELECT key FROM items WHERE id = ?)", id)

    def original(self, id: str) -> bytes | None:
        """Return an item's own bytes, or None where they were not kept."""
        return self._blob("SELECT original FROM pictures WHERE key = (SELECT key FROM items WHERE id = ?)", id)

    def vector(self, id: str) -> FloatArray | None:
        """Return an item's embedding, or None."""
        blob = self._blob("SELECT vector FROM vectors WHERE key = (SELECT key FROM items WHERE id = ?)", id)
        return None if blob is None else np.frombuffer(blob, "<f4").astype(np.float32)

    def vectors(self, chunk: int = 8192) -> Iterator[tuple[list[int], FloatArray]]:
        """Yield all keys and their vectors (N, D), in key order, chunk by chunk.

        Raises:
            InvalidStore: a vector does not have its checksum.
        """
        keys: list[int] = []
        blobs: list[bytes] = []
        for key, blob, checksum in self._database.execute("SELECT key, vector, checksum FROM vectors ORDER BY key"):
            if zlib.crc32(blob) != checksum:
                raise InvalidStore(f"{self._database.filename}: the vector of key {key} is damaged")
            keys.append(key)
            blobs.append(blob)
            if len(keys) == chunk:
                yield keys, _matrix(blobs)
                keys, blobs = [], []
        if keys:
            yield keys, _matrix(blobs)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _items(self, where: str, *values: Any) -> list[tuple[int, Item]]:
        query = "SELECT key, id, metadata, source, digest, variant FROM items " + where  # noqa: S608  # ours alone
        rows = self._database.execute(query, values)
        return [(key, Item(id, json.loads(metadata), *rest)) for key, id, metadata, *rest in rows]

    def _blob(self, query: str, id: str) -> bytes | None:
        blob = self._one(query, id)
        return None if blob is None else bytes(blob)

    def _one(self, query: str, *values: Any) -> Any:
        row = next(iter(self._database.execute(query, values)), None)
        return None if row is None else row[0]


def _dump(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False, allow_nan=False)


def _matrix(blobs: list[bytes]) -> FloatArray:
    return np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), -1).astype(np.float32)
