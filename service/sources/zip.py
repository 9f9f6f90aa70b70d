"""Pictures in a .zip, read from their place in it. POST /images uses the names of members, too."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from service.errors import InvalidSource
from service.sources.captions import is_metadata, metadata_captions
from service.sources.compact import Names
from service.sources.kinds import FIRST_BYTES, holds_none, judge
from service.sources.paths import Gathered, path_labels
from service.sources.source import LeftOut, Omissions, Source

_UTF8, _ENCRYPTED = 0x800, 1
_UNICODE_PATH = 0x7075
_FROM_DOS = 0


def open_zip(name: str, path: Path) -> Source:
    """Open a .zip. Ids are sorted paths in composed Unicode; labels come from folders as path_labels says.

    Raises:
        InvalidSource: the file is not a zip, is encrypted, or holds no picture.
    """
    gathered: Gathered[zipfile.ZipInfo] = Gathered(
        lambda one, other: (one[1].CRC, one[1].file_size) == (other[1].CRC, other[1].file_size)
    )
    metadata: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for path_inside, member, left_out in judged(archive):
                if left_out is None:
                    gathered.add(path_inside, member)
                    continue
                gathered.left_out.append(left_out)
                if is_metadata(path_inside):
                    metadata[path_inside] = member.filename
    # zipfile raises nearly any exception on a damaged directory.
    except Exception as error:
        raise InvalidSource(f"{name}: not a zip file that can be read: {error}") from error
    if not gathered.found:
        raise holds_none(name, gathered.left_out)
    paths = sorted(gathered.found)
    members = [gathered.found[id][1] for id in paths]
    if any(member.flag_bits & _ENCRYPTED for member in members):
        raise InvalidSource(f"{name}: is encrypted; expected a zip without a password")
    ids = Names(paths)
    places = np.fromiter(
        (
            (member.header_offset, member.compress_size, member.file_size, member.CRC, member.compress_type)
            for member in members
        ),
        "i8, i8, i8, u4, u2",
        len(paths),
    )

    def read(position: int) -> bytes:
        # ZipFile.read would hold half a kilobyte for each member and share one locked handle between all threads.
        member = zipfile.ZipInfo(ids[position])
        start, member.compress_size, member.file_size, member.CRC, member.compress_type = places[position].item()
        with path.open("rb") as file:
            try:
                file.seek(start)
                signature, name_length, extra_length = struct.unpack("<4s22x2H", file.read(30).ljust(30))
                if signature != b"PK\3\4":
                    raise OSError("its place in the archive holds something else")
                file.seek(name_length + extra_length, os.SEEK_CUR)
                return zipfile.ZipExtFile(file, "r", member).read()
            except OSError:
                raise
            # Every compression method has exceptions of its own.
            except Exception as error:
                raise OSError(str(error) or "the archive is cut short") from error

    def read_metadata(inside: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            try:
                return archive.read(metadata[inside])
            # Every compression method has exceptions of its own.
            except Exception as error:
                raise OSError(str(error) or "the archive is cut short") from error

    captions = (lambda: metadata_captions(name, [*metadata], read_metadata, ids)) if metadata else None
    labels = path_labels(paths, path.stem)
    omitted = Omissions(gathered.left_out)
    return Source(name, ids, read, labels, left_out=omitted, captions=captions, place=lambda _: path)


def judged(archive: zipfile.ZipFile, aside: str | None = None) -> Iterator[tuple[str, zipfile.ZipInfo, LeftOut | None]]:
    """Yield path and member of each file in a zip, with the reason if it is left out; pass over the path `aside`."""
    for path, member in member_paths(archive.infolist()):
        if not path.endswith("/") and path != aside:
            left_out = judge(path, lambda member=member: _start(archive, member))  # type: ignore[misc]
            yield path, member, left_out


def member_paths(members: list[zipfile.ZipInfo]) -> list[tuple[str, zipfile.ZipInfo]]:
    """Return the path of each member with slashes, decoded as the program that packed it meant.

    macOS writes UTF-8 without the flag for it. Others add the Unicode path field. PowerShell 5 and other programs on
    Windows separate folders by backslashes, which are ordinary characters in a zip from Unix that has slashes as well.
    """
    names = [_member_name(member) for member in members]
    slashes = any("/" in name for name in names)
    return [
        (name.replace("\\", "/") if member.create_system == _FROM_DOS or not slashes else name, member)
        for name, member in zip(names, members, strict=True)
    ]


def _member_name(member: zipfile.ZipInfo) -> str:
    name = member.orig_filename.partition("\0")[0]
    raw = name.encode("utf-8" if member.flag_bits & _UTF8 else "cp437")
    extra = member.extra
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        # The field counts only for the name that it was made for.
        if kind == _UNICODE_PATH and field[:5] == struct.pack("<BL", 1, zlib.crc32(raw)):
            raw = field[5:]
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return name


def _start(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    # Other methods are unpacked without a bound on memory, and encrypted members not at all.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & _ENCRYPTED:
        return b""
    try:
        with archive.open(member) as file:
            return file.read(FIRST_BYTES)
    # Every compression method has exceptions of its own.
    except Exception as error:
        raise OSError(f"damaged: {error or type(error).__name__}") from error
