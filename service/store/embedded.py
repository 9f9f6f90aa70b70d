"""Store = catalog + index, in one process."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from service import FloatArray
from service.card import Card
from service.errors import InvalidStore, StoreMismatch
from service.store import Hit, Item, NewItem
from service.store.catalog import FILE, Catalog
from service.store.faiss_index import FaissIndex
from service.store.filters import Filter

_LOCK = "LOCK"


class EmbeddedStore:
    """A folder with a catalog; the index is made from it in memory when the store opens.

    One lock around everything: changes exclude searches, as FAISS demands.
    """

    def __init__(self, folder: Path, card: Card, dimension: int, read_only: bool = False) -> None:
        """Open a store, or make an empty one where there is none.

        Args:
            folder: of the store.
            card: the encoder whose embeddings it holds.
            dimension: D.
            read_only: open an existing store without the right to change it.

        Raises:
            StoreMismatch: it holds embeddings of another encoder.
            InvalidStore: damaged, in use by another process, or read_only and not there.

        Cost: reads every vector once.
        """
        self._guard: int | None = None
        if not read_only:
            self._guard = _lock(folder)
        try:
            self._open(folder, card, dimension, read_only)
        except BaseException:
            self._release()
            raise

    def _open(self, folder: Path, card: Card, dimension: int, read_only: bool) -> None:
        meta = {
            "fingerprint": card.fingerprint,
            "dimension": str(dimension),
            "model": card.name,
            "model_folder": str(card.folder),
        }
        self._catalog = Catalog(folder, None if read_only else meta)
        have = self._catalog.meta
        if have["fingerprint"] != card.fingerprint:
            self._catalog.close()
            raise StoreMismatch(
                f"{folder}: built by the encoder {have['model']} ({have['fingerprint'][:12]}…), "
                f"not by {card.name} ({card.fingerprint[:12]}…); name that encoder with --model, or another --store"
            )
        self._index = FaissIndex(dimension)
        for keys, vectors in self._catalog.vectors():
            self._index.add(keys, vectors)
        self._exclusive = threading.Lock()

    def add(self, items: Sequence[NewItem]) -> list[bool]:
        """See Store.add. The index follows the catalog's commit."""
        latest = {item.id: item for item in items}  # an id given twice keeps its last picture
        with self._exclusive:
            with _writing():
                added = self._catalog.add(list(latest.values()))
            self._index.remove([key for key, new in added if not new])
            keys = [key for key, _ in added]
            self._index.add(keys, np.stack([item.embedding for item in latest.values()]))
        new = dict(zip(latest, (new for _, new in added), strict=True))
        return [new[item.id] for item in items]

    def remove(self, id: str) -> bool:
        """See Store.remove."""
        with self._exclusive:
            with _writing():
                key = self._catalog.remove(id)
            if key is not None:
                self._index.remove([key])
        return key is not None

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """See Store.set_metadata."""
        with self._exclusive:
            item = self._catalog.get(id)
            if item is None:
                return None
            changed = replace(item, metadata=change(item.metadata))
            with _writing():
                self._catalog.set_metadata(id, changed.metadata)
        return changed

    def search(self, queries: FloatArray, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """See Store.search, FaissIndex.search for what a query must be."""
        with self._exclusive:
            scores, keys = self._index.search(queries, k, None if where is None else self._catalog.keys(where))
            items = self._catalog.by_keys(sorted({int(key) for key in keys.flat}))
        return [
            [
                Hit(items[int(key)].id, float(score), items[int(key)].metadata)
                for score, key in zip(row_scores, row_keys, strict=True)
            ]
            for row_scores, row_keys in zip(scores, keys, strict=True)
        ]

    def get(self, id: str) -> Item | None:
        """See Store.get."""
        with self._exclusive:
            return self._catalog.get(id)

    def embedding(self, id: str) -> FloatArray | None:
        """See Store.embedding."""
        with self._exclusive:
            return self._catalog.vector(id)

    def thumbnail(self, id: str) -> bytes | None:
        """See Store.thumbnail."""
        with self._exclusive:
            return self._catalog.thumbnail(id)

    def original(self, id: str) -> bytes | None:
        """See Store.original."""
        with self._exclusive:
            return self._catalog.original(id)

    def scan(self, limit: int, after: int = 0) -> tuple[list[Item], int | None]:
        """See Store.scan."""
        with self._exclusive:
            rows = self._catalog.scan(limit + 1, after)
        return [item for _, item in rows[:limit]], rows[limit - 1][0] if len(rows) > limit else None

    def count(self) -> int:
        """See Store.count."""
        with self._exclusive:
            return len(self._index)

    def close(self) -> None:
        """Close the catalog and let the next process in."""
        with self._exclusive:
            self._catalog.close()
            self._release()

    def _release(self) -> None:
        if self._guard is not None:
            os.close(self._guard)
            self._guard = None


@contextmanager
def _writing() -> Iterator[None]:
    """Turn SQLite's errors into ours: a full disk, or a store opened for reading only."""
    try:
        yield
    except apsw.Error as error:
        raise InvalidStore(f"the store cannot be written: {error}") from error


def recorded_model(folder: Path) -> Path | None:
    """Return the folder of the encoder that a store was built with, or None where there is no store.

    Raises:
        InvalidStore: it is damaged.
    """
    if not (folder / FILE).exists():
        return None
    catalog = Catalog(folder, None)
    catalog.close()
    return Path(catalog.meta["model_folder"])


def _lock(folder: Path) -> int:
    """Take the folder's lock for this process; the system lets go of it however the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [path.name for path in folder.iterdir() if path.name != _LOCK]
        if strangers and not (folder / FILE).exists():
            raise InvalidStore(f"{folder}: is not a store and not empty (it has {strangers[0]}); name another --store")
        guard = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InvalidStore(f"{folder}: cannot be used as a store: {error.strerror}") from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(guard, 32).decode(errors="replace").strip()
        os.close(guard)
        raise InvalidStore(
            f"{folder}: in use by process {holder}; add pictures to a served store with PUT /images/ID"
        ) from error
    os.ftruncate(guard, 0)
    os.write(guard, str(os.getpid()).encode())
    return guard
