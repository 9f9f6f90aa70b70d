"""What the start of a picture's file says of it: size, format, date. Nothing is decoded."""

import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from service.encoding.images import format_of

# So much of a file is read: enough for the EXIF and the colour profile that stand before a JPEG's size.
HEAD_BYTES = 262_144
# Pillow reads the headers of these in bounded time. For the others it would start a decoder.
_READ = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
_EXIF, _TAKEN, _CHANGED = 0x8769, 0x9003, 0x0132
# Tags of a TIFF, and the types of numbers in them, as `struct` names them.
_WIDTH, _HEIGHT = 256, 257
_NUMBERS = {3: "H", 4: "I", 16: "Q"}
_MOST_TAGS = 1000
_DATE = re.compile(r"(\d{4}):(\d\d):(\d\d) (\d\d):(\d\d):(\d\d)")


# Bytes from a place of a file on, as many as are asked for or there.
Read = Callable[[int, int], bytes]


class FileFacts(NamedTuple):
    """Facts about a picture's file; None for what is unknown.

    Attributes:
        width, height: pixels as stored.
        size_bytes: of the file.
        format: such as JPEG.
        date: when it was taken by its EXIF (a camera's own time), else when the file was changed last, in UTC; as
            2026-11-27T10:00:00.
    """

    width: int | None = None
    height: int | None = None
    size_bytes: int | None = None
    format: str | None = None
    date: str | None = None

    @classmethod
    def of(cls, head: bytes, size: int, mtime_ns: int | None = None, read: Read | None = None) -> "FileFacts":
        """Return the facts of a file.

        Args:
            head: its first bytes.
            size: bytes of the file.
            mtime_ns: the time of its last change, if known.
            read: reads more of it: a number of bytes from a place on. Some TIFFs have their size at their end.
        """
        format, date = format_of(head), None if mtime_ns is None else _utc(mtime_ns)
        if format not in _READ:
            if format == "TIFF":
                sides = _sides_of_tiff(read or (lambda at, count: head[at : at + count]))
            else:
                sides = _sides_of_boxes(head)
            width, height = sides or (None, None)
            return cls(width, height, size, format, date)
        try:
            with Image.open(io.BytesIO(head), formats=[format]) as picture:
                exif = picture.getexif()
                taken = exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED)
                return cls(picture.width, picture.height, size, format, _date(taken) or date)
        # Pillow raises errors of many kinds for files that are damaged or cut short.
        except Exception:
            return cls(None, None, size, format, date)

    @classmethod
    def of_data(cls, data: bytes, mtime_ns: int | None = None) -> "FileFacts":
        """Return the facts of a file from all its bytes, and the time of its last change if known."""
        return cls.of(data[:HEAD_BYTES], len(data), mtime_ns, lambda at, count: data[at : at + count])

    @classmethod
    def of_source(cls, source: str | None) -> "FileFacts":
        """Return the facts of a file by its path; none if it is not there."""
        if source is None:
            return cls()
        try:
            # A pipe in place of the file would block the thread that opens it.
            with os.fdopen(os.open(Path(source), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return cls()
                head = file.read(HEAD_BYTES)
                read = partial(read_at, file.fileno())
                return cls.of(head, status.st_size, status.st_mtime_ns, read)
        except (OSError, ValueError):
            return cls()


class Move(NamedTuple):
    """What became of the file of an item.

    Attributes:
        id: of the item.
        digest: of the item; one that has another picture by now is left alone.
        to: its id from now on, often the same; None removes it.
        source, facts, mtime_ns: as Item has them, from now on.
    """

    id: str
    digest: str
    to: str | None
    source: str | None = None
    facts: FileFacts = FileFacts()
    mtime_ns: int | None = None


def read_at(file: int, at: int, count: int) -> bytes:
    """Return bytes of an open file, by its descriptor, from a place on."""
    return os.pread(file, count, at)


def _sides_of_tiff(read: Read) -> tuple[int, int] | None:
    """Return width and height of a TIFF's first page, as its directory says. Source: the specification, TIFF 6.0."""
    try:
        order = "<" if read(0, 2) == b"II" else ">"
        # BigTIFF has places of eight bytes.
        is_big = struct.unpack(f"{order}H", read(2, 2))[0] == 43
        counts, entries, place = ("Q", "HHQ", "Q") if is_big else ("H", "HHI", "I")
        (at,) = struct.unpack(order + place, read(8 if is_big else 4, struct.calcsize(place)))
        width = struct.calcsize(f"{order}{entries}{place}")
        (count,) = struct.unpack(order + counts, read(at, struct.calcsize(counts)))
        table = read(at + struct.calcsize(counts), width * min(count, _MOST_TAGS))
        sides: dict[int, int] = {}
        for start in range(0, len(table) - width + 1, width):
            tag, type, _ = struct.unpack_from(order + entries, table, start)
            if tag in (_WIDTH, _HEIGHT):
                value = start + struct.calcsize(order + entries)
                (sides[tag],) = struct.unpack_from(order + _NUMBERS[type], table, value)
        return sides[_WIDTH], sides[_HEIGHT]
    # The file is cut short, or no such file.
    except (struct.error, KeyError, OverflowError, OSError):
        return None


def _sides_of_boxes(head: bytes) -> tuple[int, int] | None:
    """Return width and height of an AVIF or HEIF file: those of its largest picture.

    The others are tiles of that one, or smaller pictures of it. Source: ISO/IEC 23008-12, 6.5.3.
    """
    sides = [
        struct.unpack(">II", head[at + 4 : at + 12])
        for meta in _boxes(head, b"meta", 0, len(head))
        # A box of the type "meta" begins with its version.
        for properties in _boxes(head, b"iprp", meta.start + 4, meta.stop)
        for container in _boxes(head, b"ipco", properties.start, properties.stop)
        for at in (box.start for box in _boxes(head, b"ispe", container.start, container.stop) if len(box) >= 12)
    ]
    return max(sides, key=lambda one: one[0] * one[1], default=None)


def _boxes(data: bytes, kind: bytes, at: int, end: int) -> Iterator[range]:
    """Yield where the contents of the boxes of a kind lie, of those that are whole."""
    while at + 8 <= end:
        size, begin = int.from_bytes(data[at : at + 4]), at + 8
        if size == 1:
            size, begin = int.from_bytes(data[at + 8 : at + 16]), at + 16
        stop = at + size if size else end
        if stop < begin or stop > end:
            return
        if data[at + 4 : at + 8] == kind:
            yield range(begin, stop)
        at = stop


def _utc(mtime_ns: int) -> str | None:
    try:
        return datetime.fromtimestamp(mtime_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    # A damaged file system may name any time, and a client, too.
    except (OverflowError, ValueError, OSError):
        return None


def _date(text: object) -> str | None:
    match = _DATE.match(text) if isinstance(text, str) else None
    return "{}-{}-{}T{}:{}:{}".format(*match.groups()) if match else None
