"""What the start of a picture's file says of it: size, format, date. Nothing is decoded."""

import io
import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from service.encoding.images import format_of

# So much of a file is read: enough for the EXIF and the colour profile that stand before a JPEG's size.
HEAD_BYTES = 262_144
# Pillow reads the headers of these in bounded time; those of other formats need a decoder.
_READ = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
_EXIF, _TAKEN, _CHANGED = 0x8769, 0x9003, 0x0132
_DATE = re.compile(r"(\d{4}):(\d\d):(\d\d) (\d\d):(\d\d):(\d\d)")


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
    def of(cls, head: bytes, size: int, mtime_ns: int | None = None) -> "FileFacts":
        """Return the facts of a file from its first bytes, its size, and the time of its last change if known."""
        format, date = format_of(head), None if mtime_ns is None else _utc(mtime_ns)
        if format not in _READ:
            return cls(None, None, size, format, date)
        try:
            with Image.open(io.BytesIO(head), formats=[format]) as picture:
                exif = picture.getexif()
                taken = exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED)
                return cls(picture.width, picture.height, size, format, _date(taken) or date)
        # Pillow raises errors of many kinds for files that are damaged or cut short.
        except Exception:
            return cls(None, None, size, format, date)

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
                return cls.of(file.read(HEAD_BYTES), status.st_size, status.st_mtime_ns)
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


def _utc(mtime_ns: int) -> str | None:
    try:
        return datetime.fromtimestamp(mtime_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    # A damaged file system may name any time, and a client, too.
    except (OverflowError, ValueError, OSError):
        return None


def _date(text: object) -> str | None:
    match = _DATE.match(text) if isinstance(text, str) else None
    return "{}-{}-{}T{}:{}:{}".format(*match.groups()) if match else None
