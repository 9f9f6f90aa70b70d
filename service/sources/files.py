"""Pictures in a folder, a .zip or .tar shards.

A source holds offsets and opens the file at every read. So threads and processes may read at once, and no handle
stays open.
"""

import math
import os
import re
import struct
import sys
import tarfile
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from service import IntArray
from service.encoding.images import SUFFIXES
from service.errors import InvalidSource
from service.sources.compact import Labels, Names, smallest
from service.sources.source import Source

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 100_000
_MAX_LABEL_BYTES = 1000
_TAR_BLOCK_BYTES = 512


def find(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files under root with one of the suffixes, at any depth: sorted posix paths relative to root.

    Skips hidden files. Follows links, but enters no folder twice.
    """
    return sorted(_walk(root, suffixes))


def expand(pattern: str) -> list[Path]:
    """Return the files that a pattern names: ten for train-{000..009}.tar, none without an {A..B}.

    Raises:
        InvalidSource: one of the files does not exist.
    """
    # re.split alternates: text, first, last, text, first, last, text.
    texts = _RANGE.split(pattern)
    spans = [_span(first, last) for first, last in zip(texts[1::3], texts[2::3], strict=True)]
    if not spans:
        return []
    count = math.prod(len(numbers) for numbers, _ in spans)
    if not 1 <= count <= _MOST_FILES:
        raise InvalidSource(f"{pattern}: names {count} files; expected 1 to {_MOST_FILES}, as in {{000..009}}")
    paths = []
    for numbers in product(*(numbers for numbers, _ in spans)):
        filled = zip(numbers, spans, texts[3::3], strict=True)
        paths.append(Path(texts[0] + "".join(f"{number:0{width}d}{text}" for number, (_, width), text in filled)))
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == count:
        raise InvalidSource(f"{pattern}: none of its {count} files is there; looked for {paths[0]} to {paths[-1]}")
    if missing:
        others = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InvalidSource(f"{pattern}: {missing[0]} is not there{others}; the pattern names {count} files")
    return paths


def stems(paths: Sequence[Path]) -> list[str]:
    """Return paths relative to the common parent folder, without their suffixes: they tell the files apart."""
    shared = os.path.commonpath([path.parent for path in paths])
    return [Path(os.path.relpath(path, shared)).with_suffix("").as_posix() for path in paths]


def open_folder(name: str, root: Path, pictures: Sequence[str]) -> Source:
    """Open a folder. The first folder level is the label when every picture has one.

    Args:
        pictures: relative paths, as returned by `find`.
    """
    ids = Names(pictures)
    return Source(name, ids, lambda position: (root / ids[position]).read_bytes(), _first_levels(pictures))


def open_zip(name: str, path: Path) -> Source:
    """Open a .zip. The first folder level, below a top folder common to all pictures, is the label.

    Raises:
        InvalidSource: the file is not a zip, is encrypted, or holds no picture.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # The later of two members with one name counts, as when unpacking.
            members = {member.filename: member for member in archive.infolist() if _is_picture(member.filename)}
    # zipfile raises nearly any exception on a damaged directory.
    except Exception as error:
        raise InvalidSource(f"{name}: not a zip file that can be read: {error}") from error
    if not members:
        raise InvalidSource(f"{name}: holds no picture; looked for {' '.join(SUFFIXES)} at any depth")
    paths = sorted(members)
    if any(members[path].flag_bits & 1 for path in paths):
        raise InvalidSource(f"{name}: is encrypted; expected a zip without a password")
    ids = Names(paths)
    places = np.fromiter(
        (
            (member.header_offset, member.compress_size, member.file_size, member.CRC, member.compress_type)
            for member in map(members.__getitem__, paths)
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

    return Source(name, ids, read, _first_levels(paths, _shared_top(paths)))


class _Shard(NamedTuple):
    """The pictures of one .tar, in archive order.

    Attributes:
        paths: N member paths.
        places: (N, 2) offset and size in bytes.
        labels: the text of each picture's .cls member; None when a picture lacks one.
    """

    paths: list[str]
    places: IntArray
    labels: list[str] | None


def open_tars(name: str, paths: Sequence[Path]) -> Source:
    """Open .tar files, such as WebDataset shards. Pictures keep their archive order.

    The label is the text of the .cls member beside a picture (000123.cls beside 000123.jpg) when every picture
    has one, else the first folder level, as for a zip. The id is the member's path; with several shards the
    shard's name precedes it (train-000/000123.jpg). Symbolic links and devices are skipped; hard links count.

    Raises:
        InvalidSource: a file is compressed, damaged or truncated, or none holds a picture.
    """
    shards = [_scan(path) for path in paths]
    members = [member for shard in shards for member in shard.paths]
    if not members:
        raise InvalidSource(f"{name}: holds no picture; looked for {' '.join(SUFFIXES)} at any depth")
    counts = [len(shard.paths) for shard in shards]
    classes = [shard.labels for shard in shards if shard.labels is not None]
    if len(classes) == len(shards):
        labels: Labels | None = Labels.of(label for shard_labels in classes for label in shard_labels)
    else:
        labels = _first_levels(members, _shared_top(members))
    prefixes = [f"{stem}/" for stem in stems(paths)] if len(paths) > 1 else [""]
    ids = Names(prefix + member for prefix, shard in zip(prefixes, shards, strict=True) for member in shard.paths)
    numbers = smallest(np.repeat(np.arange(len(shards)), counts))
    offsets = smallest(np.concatenate([shard.places[:, 0] for shard in shards]))
    sizes = smallest(np.concatenate([shard.places[:, 1] for shard in shards]))

    def read(position: int) -> bytes:
        size = int(sizes[position])
        with paths[numbers[position]].open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(offsets[position]))
        if len(data) < size:
            raise OSError(f"the archive is cut short: expected {size} bytes, got {len(data)}")
        return data

    return Source(name, ids, read, labels)


def _scan(path: Path) -> _Shard:
    """Read every header of a .tar once.

    `kept` maps the path of a picture to its row in `places`, `classes` the stem of a WebDataset sample to its label.
    """
    kept: dict[str, int] = {}
    places = array("q")
    classes: dict[str, str] = {}
    with path.open("rb") as file:
        for member in _members(path, file):
            inside = _relative(member.name)
            row = len(places) // 2
            # A hard link names an earlier member by another path.
            if member.islnk():
                row = kept.get(_relative(member.linkname), -1)
            if row < 0 or not (member.isreg() or member.islnk()):
                continue
            if _is_picture(inside):
                if member.issparse():
                    raise InvalidSource(f"{path}: {inside} is stored as a sparse file; expected a .tar without any")
                # The later of two members with one name counts, as when unpacking.
                kept.pop(inside, None)
                kept[inside] = row
                if not member.islnk():
                    places.extend((member.offset_data, member.size))
            elif inside.endswith(".cls") and member.size <= _MAX_LABEL_BYTES:
                text = os.pread(file.fileno(), member.size, member.offset_data)
                # Interning keeps one string for each distinct label.
                classes[_sample(inside)] = sys.intern(text.decode(errors="replace").strip())
    labels = [classes.get(_sample(inside), "") for inside in kept]
    rows = np.fromiter(kept.values(), np.int64, len(kept))
    return _Shard(list(kept), np.array(places, np.int64).reshape(-1, 2)[rows], labels if all(labels) else None)


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a .tar.

    Raises:
        InvalidSource: the file is compressed, damaged or truncated.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            held = vars(tar)["members"]
            before = -1
            while (member := tar.next()) is not None:
                # tarfile would keep every member in memory.
                held.clear()
                if tar.offset <= before:
                    raise tarfile.ReadError(f"the size of {member.name} is negative")
                before = tar.offset
                yield member
            # tarfile stops silently at a header that it cannot read.
            end = os.pread(file.fileno(), _TAR_BLOCK_BYTES, tar.offset)
            if end != bytes(_TAR_BLOCK_BYTES):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}" if end else "cut short: no end mark")
    # tarfile raises nearly any exception on a damaged header.
    except Exception as error:
        raise InvalidSource(f"{path}: cannot be read as an uncompressed .tar: {error}") from error


def _relative(member: str) -> str:
    """Return a member's path without a leading ./ or /."""
    return member.removeprefix("./").lstrip("/")


def _sample(member: str) -> str:
    """Return the stem that groups a WebDataset sample: the path up to the first dot of the file's name."""
    folder, slash, file = member.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        relative = Path(folder).relative_to(root)
        above = "" if relative == Path() else f"{relative.as_posix()}/"
        for file in files:
            if file.lower().endswith(suffixes) and not file.startswith("."):
                yield above + file


def _is_picture(member: str) -> bool:
    return member.lower().endswith(SUFFIXES) and not member.rpartition("/")[2].startswith(".")


def _first_levels(paths: Sequence[str], above: int = 0) -> Labels | None:
    """Return the first folder level as labels, or None when a picture has none; skip `above` leading characters."""
    if not all("/" in path[above:] for path in paths):
        return None
    return Labels.of(path[above : path.index("/", above)] for path in paths)


def _shared_top(paths: Sequence[str]) -> int:
    """Return the length of a top folder common to all paths, each of which has a folder below it; else 0.

    Packing a folder puts its own name in front of every path.
    """
    top = paths[0].split("/", 1)[0] + "/"
    return len(top) if all(path.startswith(top) and path.count("/") > 1 for path in paths) else 0


def _span(first: str, last: str) -> tuple[range, int]:
    """Return the numbers of {first..last} and the width to pad them to: 0 unless a bound has a leading zero."""
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    return range(int(first), int(last) + 1), max(len(first), len(last)) if padded else 0
