"""The index that searches use and the map of its vectors, kept in step with the catalog."""

import numpy as np

from service import FloatArray, IntArray
from service.store.catalog import Change
from service.store.catalog_reader import CatalogReader
from service.store.faiss_index import FaissIndex
from service.store.rwlock import ReadersWriterLock
from service.store.vector_map import VectorMap


class LiveIndex:
    """The index in memory, and the last change of the catalog that it holds.

    Attributes:
        lock: searches hold it for reading; each method here that changes the index holds it for writing.
        index: the index.
        map: the vectors of the index; None where searches read them from the catalog.
        sequence: number of the last change that the index and the map hold.
    """

    def __init__(self, reader: CatalogReader, index: FaissIndex, sequence: int, map: VectorMap | None) -> None:
        """Take an index, and a map, that hold all changes of the catalog up to a sequence number."""
        self._reader = reader
        self.lock = ReadersWriterLock()
        self.index, self.map, self.sequence = index, map, sequence

    def vectors(self, keys: IntArray) -> FloatArray | None:
        """Return the vectors (N, D) of keys (N,) of the index; the caller holds the lock for reading.

        Returns:
            The vectors. None if one of them changed in the catalog and not yet in the index.

        Raises:
            InvalidStore: a vector in the catalog does not match its checksum.
        """
        vectors = None if self.map is None else self.map.read(keys)
        return self._reader.vectors_at(keys, self.sequence) if vectors is None else vectors

    def apply(self, changes: list[Change], sequence: int) -> None:
        """Make the changes of a commit, the last of which has this sequence number.

        One commit at a time: the caller ensures it. Searches wait only while the lists of the index change.
        """
        first: dict[int, Change] = {}
        last: dict[int, Change] = {}
        for change in changes:
            first.setdefault(change.key, change)
            last[change.key] = change
        old = [(key, change.old) for key, change in first.items() if change.old is not None]
        new = [(key, change.new) for key, change in last.items() if change.new is not None]
        old_keys, _, old_lists = self._assigned(old)
        keys, vectors, lists = self._assigned(new)
        with self.lock.writing():
            self.index.remove(old_keys, old_lists)
            self.index.add(keys, vectors, lists)
            if self.map is not None:
                self.map.write(keys, vectors)
            self.sequence = sequence

    def catch_up(self) -> None:
        """Make the changes that another process committed, or whose commit ended in an error.

        No commit may be under way: the caller ensures it.
        """
        with self.lock.writing():
            self.sequence = replay(self._reader, self.index, self.sequence, self.map)

    def replace(self, index: FaissIndex, sequence: int) -> None:
        """Let searches use another index, which holds all changes up to a sequence number."""
        with self.lock.writing():
            self.index, self.sequence = index, sequence

    def replace_map(self, map: VectorMap) -> None:
        """Let searches use another map, which holds all changes that the index holds."""
        with self.lock.writing():
            self.map = map

    def _assigned(self, pairs: list[tuple[int, FloatArray]]) -> tuple[IntArray, FloatArray, IntArray]:
        """Return keys (N,), vectors (N, D) and the lists (N,) that they belong into."""
        keys = np.asarray([key for key, _ in pairs], np.int64)
        vectors = (
            np.stack([vector for _, vector in pairs]) if pairs else np.empty((0, self.index.dimension), np.float32)
        )
        return keys, vectors, self.index.assign(keys, vectors)


def replay(reader: CatalogReader, index: FaissIndex, since: int, map: VectorMap | None = None) -> int:
    """Make the catalog's changes after a sequence number in an index, and a map, that nothing else uses.

    Returns:
        The sequence number of the last change.
    """
    latest = reader.sequence()
    changed = reader.changed(since)
    index.drop(changed)
    for keys, vectors in reader.vectors(changed):
        index.add(keys, vectors, index.assign(keys, vectors))
        if map is not None:
            map.write(keys, vectors)
    return latest
