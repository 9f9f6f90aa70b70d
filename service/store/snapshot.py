"""A file of arrays whose damage is always noticed.

    magic (8 bytes) · length of the header (u32) · header (JSON: facts; name, dtype, shape of each array) · the arrays,
    one after the other · CRC-32 of everything before it (u32); numbers are little-endian

The file holds no code and no references. `read` checks every length against the file's size before it allocates
memory, and returns no array before it has compared the checksum.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

# A snapshot is written while changes wait and published after that, so the two steps of files.replace_file are apart.
from service.files import publish as publish
from service.files import sync as sync
from service.files import temporary_path

SNAPSHOT = "index.snapshot"
_MAGIC = b"LOOKSNAP"
_NUMBER = np.dtype("<u4")
_MAX_HEADER_BYTES = 65_536
_DTYPES = ("|u1", "<i8", "<f4")

Array = NDArray[Any]


class DamagedSnapshot(Exception):
    """The file is not a snapshot, or not as `write` left it."""


class Section(NamedTuple):
    """An array to write, in pieces along its first axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[Array]


def section(name: str, array: Array) -> Section:
    """Return an array as a section of one piece."""
    return Section(name, array.dtype.str, array.shape, [array])


def write(path: Path, facts: dict[str, Any], sections: list[Section]) -> Path:
    """Write a snapshot into a temporary file beside `path`, and return that file's path for `publish`.

    Raises:
        OSError.
    """
    described = [{"name": one.name, "dtype": one.dtype, "shape": one.shape} for one in sections]
    header = json.dumps({"facts": facts, "arrays": described}).encode()
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        checksum = _put(file, 0, _MAGIC + _number(len(header)) + header)
        for one in sections:
            for piece in one.pieces:
                checksum = _put(file, checksum, np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        _put(file, 0, _number(checksum))
    return temporary


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the facts and arrays of a snapshot.

    Raises:
        DamagedSnapshot: the file is damaged, or not a snapshot.
        OSError: the file is missing, or cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_MAGIC) + 4)
        if len(start) < len(_MAGIC) + 4 or not start.startswith(_MAGIC):
            raise DamagedSnapshot("it does not begin like a snapshot")
        length = int(np.frombuffer(start[len(_MAGIC) :], _NUMBER)[0])
        if length > _MAX_HEADER_BYTES:
            raise DamagedSnapshot(f"its header says that it is {length} bytes long")
        header = file.read(length)
        facts, shapes = _parse(header)
        if size != len(start) + length + sum(_bytes(*shape) for shape in shapes.values()) + 4:
            raise DamagedSnapshot(f"it has {size} bytes, which its header does not say")
        checksum = zlib.crc32(header, zlib.crc32(start))
        arrays = {}
        for name, (dtype, shape) in shapes.items():
            array = np.fromfile(file, dtype, math.prod(shape))
            if array.size != math.prod(shape):
                raise DamagedSnapshot("it ended while it was read")
            checksum = zlib.crc32(array.view(np.uint8).data, checksum)
            arrays[name] = array.reshape(shape)
        if file.read() != _number(checksum):
            raise DamagedSnapshot("its checksum is not that of its content")
    return facts, arrays


def _parse(header: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    try:
        content = json.loads(header)
        facts, arrays = content["facts"], content["arrays"]
        shapes = {str(one["name"]): (str(one["dtype"]), tuple(_sizes(one["shape"]))) for one in arrays}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedSnapshot("its header cannot be read") from error
    if not isinstance(facts, dict) or any(dtype not in _DTYPES for dtype, _ in shapes.values()):
        raise DamagedSnapshot("its header is not one of ours")
    return facts, shapes


def _sizes(shape: Any) -> Iterator[int]:
    for size in shape:
        if not isinstance(size, int) or not 0 <= size < 2**48:
            raise ValueError("not a size")
        yield size


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def _put(file: BinaryIO, checksum: int, data: bytes | memoryview) -> int:
    file.write(data)
    return zlib.crc32(data, checksum)


def _number(value: int) -> bytes:
    return np.asarray(value, _NUMBER).tobytes()
