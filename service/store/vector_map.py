"""A file of all vectors by key, from which searches rank their candidates without a query of SQLite.

    head (128 bytes: name, tag, type, dimension) · a row for each key from 0 on: checksum (u64) · vector · padding

It is a copy: the catalog has every vector, and decides. Rows are written in place, so the file alone does not say how
far it can be trusted. The snapshot of the index does, which names the file's tag: before a snapshot is published the
file is synced, and what changed after it is written again from the catalog. Rows of keys that were never used, or whose
items were removed, are never read; those that were never written take no room on the disk.
"""

import logging
import mmap
import os
import secrets
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import FloatArray, IntArray

VECTORS = "vectors.map"
_HEAD_BYTES = 128
_WORD = 8
# Of the file's length, which grows in steps; the rest of a step takes no room on the disk.
_STEP_BYTES = 1 << 24
_SEED = np.uint64(0x9E3779B97F4A7C15)
# Sparse keys, after many removals, leave rows that nothing reads.
_MOST_UNUSED, _UNUSED_BYTES = 3, 1 << 26

Words = NDArray[np.uint64]

log = logging.getLogger("bentoml.lookalike")


class VectorMap:
    """Vectors by key. Reads may run side by side; a write needs exclusive access, which the caller ensures.

    Attributes:
        path: of the file.
        tag: of this file alone; a snapshot that names it knows it.
        usable: False once a row was found damaged, or could not be written.
    """

    def __init__(self, path: Path, tag: str, dimension: int, dtype: "np.dtype[Any]", read_only: bool = False) -> None:
        """Open a file.

        Args:
            path: the file.
            tag: that it must have.
            dimension: D.
            dtype: of the vectors in the catalog.
            read_only: nothing will be written.

        Raises:
            OSError: it is missing or cannot be read.
            ValueError: it is another file.
        """
        self.path, self.tag, self.usable = path, tag, True
        self._dimension, self._dtype = dimension, dtype
        self._words = 1 + -(-dimension * dtype.itemsize // _WORD)
        # An odd factor for each word: a change of any one bit, and an exchange of two words, changes the sum.
        random = np.random.default_rng(0).integers(1 << 63, size=self._words - 1, dtype=np.uint64)
        self._factors = random << np.uint64(1) | np.uint64(1)
        self._file = path.open("rb" if read_only else "r+b", buffering=0)
        if self._file.read(_HEAD_BYTES) != _head(tag, dimension, dtype):
            raise ValueError("it is another file")
        self._map()

    @classmethod
    def create(cls, path: Path, dimension: int, dtype: "np.dtype[Any]") -> "VectorMap":
        """Make an empty file, in place of any earlier one. Raises OSError."""
        tag = secrets.token_hex(16)
        path.write_bytes(_head(tag, dimension, dtype))
        return cls(path, tag, dimension, dtype)

    def _map(self) -> None:
        """Map the rows of the file as it is now."""
        count = max(os.fstat(self._file.fileno()).st_size - _HEAD_BYTES, 0) // (_WORD * self._words)
        self._rows: Words = np.empty((0, self._words), np.uint64)
        if count:
            mapped = mmap.mmap(self._file.fileno(), _HEAD_BYTES + count * self._words * _WORD, access=mmap.ACCESS_READ)
            # Searches read single rows anywhere, so the kernel need not read ahead.
            mapped.madvise(mmap.MADV_RANDOM)
            self._rows = np.frombuffer(mapped, "<u8", offset=_HEAD_BYTES).reshape(count, self._words)

    def write(self, keys: IntArray, vectors: FloatArray) -> None:
        """Write the vectors (N, D) of keys (N,). If the disk refuses them, the file is not usable from then on."""
        if not len(keys) or not self.usable:
            return
        order = np.argsort(keys)
        keys = keys[order]
        rows = np.zeros((len(keys), self._words), "<u8")
        rows[:, 1:].view(self._dtype)[:, : self._dimension] = vectors[order]
        rows[:, 0] = self._checksums(keys, rows[:, 1:])
        # Rows of consecutive keys go out at once.
        starts = [0, *(np.flatnonzero(np.diff(keys) != 1) + 1).tolist(), len(keys)]
        try:
            if keys[-1] >= len(self._rows):
                self._file.truncate(self._place(int(keys[-1]) + 1) + _STEP_BYTES)
                self._map()
            for start, stop in pairwise(starts):
                _write(self._file.fileno(), rows[start:stop].tobytes(), self._place(int(keys[start])))
        except OSError as error:
            self._give_up(f"cannot be written: {error.strerror or error}")

    def read(self, keys: IntArray) -> FloatArray | None:
        """Return the vectors (N, D) of keys (N,), or None if the file does not have them."""
        if not self.usable:
            return None
        if int(keys.max(initial=-1)) < len(self._rows):
            rows = self._rows[keys]
            if (rows[:, 0] == self._checksums(keys, rows[:, 1:])).all():
                return self._vectors(rows)
        self._give_up("is damaged")
        return None

    def holds(self, keys: IntArray, vectors: FloatArray) -> NDArray[np.bool_]:
        """Return for each of the keys (N,) whether the file has its vector, a row of (N, D)."""
        good = keys < len(self._rows)
        rows = self._rows[keys[good]]
        intact = rows[:, 0] == self._checksums(keys[good], rows[:, 1:])
        good[good] = intact & (self._vectors(rows) == vectors[good]).all(1)
        return good

    def _vectors(self, rows: Words) -> FloatArray:
        return np.asarray(rows[:, 1:].view(self._dtype)[:, : self._dimension], np.float32)

    def _give_up(self, why: str) -> None:
        self.usable = False
        log.warning("%s %s: searches read the catalog, until the file is written anew", self.path, why)

    def sync(self) -> None:
        """Force all rows out to the disk. Raises OSError."""
        os.fsync(self._file.fileno())

    def bloated(self, count: int) -> bool:
        """Whether the file takes much more room on the disk than `count` vectors need."""
        needed = count * self._words * _WORD
        return os.fstat(self._file.fileno()).st_blocks * 512 > _MOST_UNUSED * needed + _UNUSED_BYTES

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _place(self, key: int) -> int:
        return _HEAD_BYTES + key * self._words * _WORD

    def _checksums(self, keys: IntArray, words: Words) -> Words:
        """Return the checksums (N,) of rows, which belong to their keys. A row of zeros has another one than 0."""
        sums: Words = np.vecdot(words, self._factors) + (keys.astype(np.uint64) + np.uint64(1)) * _SEED
        return sums


def _head(tag: str, dimension: int, dtype: "np.dtype[Any]") -> bytes:
    return f"LOOKVECS {tag} {dtype.str} {dimension}\n".encode().ljust(_HEAD_BYTES, b"\0")


def _write(file: int, data: bytes, place: int) -> None:
    """Write all bytes at a place. A full disk is an error here; through a memory map it would end the process."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, place)
        rest, place = rest[written:], place + written
