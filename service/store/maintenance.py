"""Maintenance: load the index when a store opens, rebuild it when the store has outgrown it, save snapshots of it.

For large stores it also writes the map of all vectors, and reads the columns of metadata that answer new filters.

A snapshot only saves time: if it cannot be used, the index is rebuilt from the catalog.
"""

import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.errors import InvalidStore
from service.files import replace_file
from service.store import snapshot
from service.store.catalog_reader import CatalogReader
from service.store.columns import Columns
from service.store.commits import Commits
from service.store.faiss_index import FaissIndex
from service.store.filter_cache import FilterCache
from service.store.ivf_training import train
from service.store.live_index import LiveIndex, replay
from service.store.snapshot import SNAPSHOT, DamagedSnapshot
from service.store.vector_map import VECTORS, VectorMap

log = logging.getLogger("bentoml.lookalike")

# A snapshot is due after so many changes, or after a fifth of the store if that is more.
_CHANGES_PER_SNAPSHOT = 50_000
# Fewer vectors lie in SQLite's own cache.
_MANY_VECTORS = 10_000
# Of fewer items SQLite reads the metadata in a tenth of a second. Columns are read again after a fifth has changed.
_MANY_ITEMS = 200_000
# So many random and so many last codes of a snapshot are checked: checking all would read every vector.
_SAMPLED_CODES = 64
_QUIET_S, _MAX_WAIT_S = 1, 30
_NICENESS = 10


@dataclass(frozen=True)
class Loaded:
    """An index, the map of its vectors, the last change that they hold, and the number of changes no snapshot has."""

    index: FaissIndex
    map: VectorMap | None
    sequence: int
    unsaved: int


def load_index(folder: Path, reader: CatalogReader, read_only: bool) -> Loaded:
    """Return the index of a store: from its snapshot and the changes since, else rebuilt from the catalog.

    A snapshot that cannot be used is deleted, unless read_only.

    Raises:
        InvalidStore: the catalog cannot be read, or the snapshot neither be used nor deleted.

    Cost: reads the snapshot and every key, or every vector.
    """
    path = folder / SNAPSHOT
    try:
        return _from_snapshot(path, reader, read_only)
    except FileNotFoundError:
        reason = "there is no snapshot of it"
    except (DamagedSnapshot, ValueError) as error:
        reason = f"{path} cannot be used: {error}"
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
    # The catalog may reach its sequence number again with other changes; the snapshot would then look valid.
    if not read_only:
        _delete(path)
    sequence = reader.sequence()
    index = exact_index(reader)
    unsaved = len(index)
    if unsaved:
        log.warning("the index was rebuilt from %d vectors: %s", unsaved, reason)
    # The process that writes the store may have committed changes meanwhile.
    if read_only:
        sequence = replay(reader, index, sequence)
    return Loaded(index, None, sequence, unsaved)


def _from_snapshot(path: Path, reader: CatalogReader, read_only: bool) -> Loaded:
    """Return the index from a snapshot. Raises DamagedSnapshot, ValueError, OSError for one that cannot be used."""
    facts, arrays = snapshot.read(path)
    if facts.get("fingerprint") != reader.meta["fingerprint"]:
        raise DamagedSnapshot("it is of another encoder's store")
    saved = facts.get("sequence")
    if not isinstance(saved, int) or not 0 <= saved <= reader.sequence():
        raise DamagedSnapshot("it is of a later state than the catalog, which may have come from a backup")
    index = FaissIndex.of_arrays(int(reader.meta["dimension"]), facts, arrays)
    # Frees the memory of the arrays before the changes are replayed.
    del arrays
    # The process that writes the store may be ahead of a reader, whose searches are as of one moment.
    map = None if read_only else _open_map(path.with_name(VECTORS), facts.get("map"), reader)
    sequence = replay(reader, index, saved, map)
    keys = reader.keys()
    if not np.array_equal(index.keys(), keys):
        raise DamagedSnapshot("it holds other items than the catalog")
    sampled = np.random.default_rng().permutation(keys[:-_SAMPLED_CODES])[:_SAMPLED_CODES]
    sampled = np.concatenate([sampled, keys[-_SAMPLED_CODES:]])
    for some, vectors in reader.vectors(sampled):
        if not index.holds(some, vectors):
            raise DamagedSnapshot("it holds other vectors than the catalog")
        if map is not None and not map.holds(some, vectors).all():
            map = None
    return Loaded(index, map, sequence, sequence - saved)


def _open_map(path: Path, tag: object, reader: CatalogReader) -> VectorMap | None:
    """Return the map that a snapshot names by its tag, or None if it is not there."""
    try:
        return VectorMap(path, tag, *reader.vector_shape) if isinstance(tag, str) else None
    except (OSError, ValueError):
        return None


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        snapshot.sync(path.parent)
    except OSError as error:
        raise InvalidStore(f"{path}: cannot be used, and not removed either: {error.strerror}") from error


def exact_index(reader: CatalogReader) -> FaissIndex:
    """Return an exact index of all vectors in the catalog."""
    index = FaissIndex(int(reader.meta["dimension"]))
    for keys, vectors in reader.vectors():
        index.add(keys, vectors, index.assign(keys, vectors))
    return index


class Maintenance:
    """Rebuilds the index and saves snapshots of it in a thread of low priority, while searches and changes go on."""

    def __init__(
        self,
        folder: Path,
        reader: CatalogReader,
        commits: Commits,
        live: LiveIndex,
        filters: FilterCache,
        unsaved: int,
        exact_limit: int,
    ) -> None:
        """Maintain an index, in the background after `start`.

        Args:
            folder: where snapshots are saved.
            reader: has all vectors.
            commits: are paused for moments.
            live: the index.
            filters: get the columns.
            unsaved: number of changes that no snapshot has.
            exact_limit: number of vectors up to which the index is exact.
        """
        self._path = folder / SNAPSHOT
        self._reader, self._commits, self._live, self._filters = reader, commits, live, filters
        self._unsaved, self._exact_limit = unsaved, exact_limit
        # Up to this number of vectors an approximate index need not be tried again.
        self._futile = 0
        # Up to this sequence number the map need not be tried again.
        self._map_futile = 0
        self._changed_at = 0.0
        self._due, self._settling = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="index maintenance", daemon=True)
        self.closing = False

    def start(self) -> None:
        """Start the thread."""
        if self._outgrown() or self._map_due() or self.snapshot_due or self._columns_due():
            self._due.set()
        self._thread.start()

    def count(self, changes: int) -> None:
        """Take note of committed changes that the index holds."""
        self._unsaved += changes
        self._changed_at = time.monotonic()
        if self._outgrown() or self._map_due() or self.snapshot_due or self._columns_due():
            self._due.set()

    def settle(self) -> None:
        """Rebuild the index, write the map, save a snapshot and read columns if they are due, in this thread.

        Raises:
            InvalidStore: the catalog cannot be read.
        """
        with self._settling:
            if self._outgrown():
                self.rebuild()
            if self._map_due():
                self.write_map()
            if self.snapshot_due:
                self.save()
            if self._columns_due():
                self._filters.columns = Columns.read(self._reader, lambda: self.closing)

    def rebuild(self) -> None:
        """Build an index of the kind that the store's size asks for, and let searches use it.

        Searches and changes go on; changes wait at the end while the last of them are replayed.
        """
        start, sequence, keys = time.monotonic(), self._reader.sequence(), self._reader.keys()
        index: FaissIndex | None
        if len(keys) <= self._exact_limit:
            index = exact_index(self._reader)
        else:
            index = train(self._reader.vectors, keys, self._live.index.dimension, lambda: self.closing)
        if self.closing:
            return
        if index is None:
            self._futile = 2 * len(keys)
            log.warning(
                "an index that looks at a part of these %d vectors misses too many: all are looked at", len(keys)
            )
            if self._live.index.partition is None:
                return
            index = exact_index(self._reader)
        sequence = replay(self._reader, index, sequence)
        with self._commits.paused():
            sequence = replay(self._reader, index, sequence)
            self._live.replace(index, sequence)
        if index.partition is not None:
            log.info(
                "an approximate index of %d vectors is in use: %d of %d lists a search, recall@10 %.4f; made in %.0f s",
                len(index),
                index.partition.nprobe,
                len(index.partition.centroids),
                index.partition.recall,
                time.monotonic() - start,
            )
        self._unsaved = max(self._unsaved, self._snapshot_after())

    def write_map(self) -> None:
        """Write the map of all vectors anew, and let searches use it.

        Searches and changes go on; changes wait at the end while the last of them are written.
        """
        path = self._path.with_name(VECTORS)
        sequence = self._reader.sequence()
        try:
            # Searches read the earlier file until it is replaced.
            with replace_file(path) as temporary:
                new = VectorMap.create(temporary, *self._reader.vector_shape)
                for keys, vectors in self._reader.vectors():
                    new.write(keys, vectors)
                    if self.closing or not new.usable:
                        raise InterruptedError("it was not finished")
            new.path = path
            with self._commits.paused():
                for keys, vectors in self._reader.vectors(self._reader.changed(sequence)):
                    new.write(keys, vectors)
                self._live.replace_map(new)
        except OSError as error:
            if not self.closing:
                log.warning("%s cannot be written: %s; searches read the catalog", path, error.strerror or error)
            self._map_futile = self._live.sequence + _CHANGES_PER_SNAPSHOT
            return
        self._unsaved = max(self._unsaved, self._snapshot_after())

    def save(self) -> None:
        """Save a snapshot. Changes wait while it is written, not while it is synced; searches go on."""
        saved = 0
        try:
            with self._commits.paused():
                facts, sections = self._live.index.sections()
                facts |= {"fingerprint": self._reader.meta["fingerprint"], "sequence": self._live.sequence}
                map = self._live.map if self._live.map is not None and self._live.map.usable else None
                facts |= {"map": map.tag} if map is not None else {}
                temporary = snapshot.write(self._path, facts, sections)
                saved, self._unsaved = self._unsaved, 0
            # The snapshot says that the map has all that it has.
            if map is not None:
                map.sync()
            snapshot.publish(temporary, self._path)
        # Only a warning: the catalog has everything.
        except OSError as error:
            with self._commits.paused():
                self._unsaved += saved
            log.warning("no snapshot of the index could be written to %s: %s", self._path, error.strerror or error)

    def close(self) -> None:
        """End the thread, and save a snapshot if anything changed."""
        self.closing = True
        self._due.set()
        if self._thread.ident is not None:
            self._thread.join()
            if self._unsaved:
                self.save()

    @property
    def snapshot_due(self) -> bool:
        """Whether the last snapshot lacks so many changes that the next one is due."""
        return self._unsaved >= self._snapshot_after()

    def _outgrown(self) -> bool:
        """Whether the index is of the wrong kind for its size, or trained on less than half or more than twice it."""
        count, partition = len(self._live.index), self._live.index.partition
        if partition is None:
            return count > max(self._exact_limit, self._futile)
        return not partition.count // 2 <= count <= partition.count * 2

    def _map_due(self) -> bool:
        """Whether the store is large enough for a map of its vectors, and has none that is any good."""
        count, map = len(self._live.index), self._live.map
        if count < _MANY_VECTORS or self._live.sequence < self._map_futile:
            return False
        return map is None or not map.usable or map.bloated(count)

    def _columns_due(self) -> bool:
        """Whether the store is so large that a filter takes long, and no columns are there or they are too old."""
        count, columns = len(self._live.index), self._filters.columns
        return count > _MANY_ITEMS and (columns is None or self._live.sequence - columns.sequence > count // 5)

    def _snapshot_after(self) -> int:
        """Return the number of changes after which a snapshot is due."""
        return max(_CHANGES_PER_SNAPSHOT, len(self._live.index) // 5)

    def _run(self) -> None:
        # On Linux a thread has a priority of its own, and the threads that FAISS starts in it inherit that.
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            self._due.wait()
            self._due.clear()
            self._await_quiet()
            if self.closing:
                return
            try:
                self.settle()
            except Exception:
                log.exception("the index could not be looked after; it goes on as it is")

    def _await_quiet(self) -> None:
        """Wait until there was no change for a second, but no longer than 30 seconds."""
        start = time.monotonic()
        while not self.closing and time.monotonic() < min(self._changed_at + _QUIET_S, start + _MAX_WAIT_S):
            time.sleep(0.05)
