"""Pictures in files: a folder, a .zip, .tar shards. What is held is where they lie; every read opens the file anew.

So any number of threads and processes may read at once, and no handle is left open.
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
_LONGEST_LABEL = 1000  # bytes of a .cls member
_BLOCK = 512  # of a tar


def find(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files under root whose names end so, at any depth: sorted posix paths relative to root.

    Hidden files are passed over; links are followed, a folder seen before is not entered.
    """
    return sorted(_walk(root, suffixes))


def expand(pattern: str) -> list[Path]:
    """Return the files that a pattern names: train-{000..009}.tar is ten of them. No {A..B} in it: none.

    Raises:
        InvalidSource: one of them is not there.
    """
    texts = _RANGE.split(pattern)  # text, first, last, text, first, last, text
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
    """Return what tells files apart: their paths below the folder they share, without the suffix."""
    shared = os.path.commonpath([path.parent for path in paths])
    return [Path(os.path.relpath(path, shared)).with_suffix("").as_posix() for path in paths]


def open_folder(name: str, root: Path, pictures: Sequence[str]) -> Source:
    """Open a folder.

    Args:
        pictures: as `find` found them; the first folder level is the label when every picture is in one.
    """
    ids = Names(pictures)
    return Source(name, ids, lambda position: (root / ids[position]).read_bytes(), _first_levels(pictures))


def open_zip(name: str, path: Path) -> Source:
    """Open a .zip. The first folder level is the label, below a top folder that all pictures share.

    Raises:
        InvalidSource: not a zip, encrypted, or without a picture.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # Of two members of one name the later counts, as when unpacking.
            members = {member.filename: member for member in archive.infolist() if _is_picture(member.filename)}
    except Exception as error:  # a directory of damaged bytes may raise nearly anything
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
        # As ZipFile.read does, which would hold half a kilobyte for every member and lock one handle for all.
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
            except Exception as error:  # every kind of compression has its own
                raise OSError(str(error) or "the archive is cut short") from error

    return Source(name, ids, read, _first_levels(paths, _shared_top(paths)))


class _Shard(NamedTuple):
    """The pictures of one .tar, in the order in which they lie there."""

    paths: list[str]
    places: IntArray  # (N, 2) offset and size of their bytes
    labels: list[str] | None  # from the .cls beside each; None where one has none


def open_tars(name: str, paths: Sequence[Path]) -> Source:
    """Open .tar files, WebDataset's shards among them: the pictures in the order in which they lie there.

    A label is the text of the .cls member beside a picture (000123.cls beside 000123.jpg) when every picture
    has one, else the first folder level, as for a zip. An id is the member's path, after its shard's name
    (train-000/000123.jpg) where there are several shards. Links to pictures other than hard links, devices and
    the like are passed over.

    Raises:
        InvalidSource: compressed, damaged, cut short, or without a picture.
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
    """Go through a .tar once, from header to header."""
    kept: dict[str, int] = {}  # path of a picture → its row in places
    places = array("q")
    classes: dict[str, str] = {}  # what the files of a sample share → its label
    with path.open("rb") as file:
        for member in _members(path, file):
            inside = _relative(member.name)
            row = len(places) // 2
            if member.islnk():  # a file that was packed before, under another name
                row = kept.get(_relative(member.linkname), -1)
            if row < 0 or not (member.isreg() or member.islnk()):
                continue
            if _is_picture(inside):
                if member.issparse():
                    raise InvalidSource(f"{path}: {inside} is stored as a sparse file; expected a .tar without any")
                # Of two members of one name the later counts, as when unpacking.
                kept.pop(inside, None)
                kept[inside] = row
                if not member.islnk():
                    places.extend((member.offset_data, member.size))
            elif inside.endswith(".cls") and member.size <= _LONGEST_LABEL:
                text = os.pread(file.fileno(), member.size, member.offset_data)
                # Interned: a million labels of a few kinds are a few strings.
                classes[_sample(inside)] = sys.intern(text.decode(errors="replace").strip())
    labels = [classes.get(_sample(inside), "") for inside in kept]
    rows = np.fromiter(kept.values(), np.int64, len(kept))
    return _Shard(list(kept), np.array(places, np.int64).reshape(-1, 2)[rows], labels if all(labels) else None)


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield what a .tar holds, up to its end.

    Raises:
        InvalidSource: compressed, damaged or cut short.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            held = vars(tar)["members"]
            before = -1
            while (member := tar.next()) is not None:
                held.clear()  # tarfile would hold every one
                if tar.offset <= before:
                    raise tarfile.ReadError(f"the size of {member.name} is negative")
                before = tar.offset
                yield member
            # tarfile ends quietly at a header that it cannot read.
            end = os.pread(file.fileno(), _BLOCK, tar.offset)
            if end != bytes(_BLOCK):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}" if end else "cut short: no end mark")
    except Exception as error:  # headers of damaged bytes may raise nearly anything
        raise InvalidSource(f"{path}: cannot be read as an uncompressed .tar: {error}") from error


def _relative(member: str) -> str:
    """A member's path as `tar -C folder .` would have it without its ./ in front."""
    return member.removeprefix("./").lstrip("/")


def _sample(member: str) -> str:
    """What the files of one WebDataset sample share: the path up to the first dot of the file's name."""
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
    """The first folder level as label, when every picture is in one; `above` characters in front do not count."""
    if not all("/" in path[above:] for path in paths):
        return None
    return Labels.of(path[above : path.index("/", above)] for path in paths)


def _shared_top(paths: Sequence[str]) -> int:
    """The length of a top folder that all paths share and have a folder under, or 0.

    Who packs a folder packs its name too.
    """
    top = paths[0].split("/", 1)[0] + "/"
    return len(top) if all(path.startswith(top) and path.count("/") > 1 for path in paths) else 0


def _span(first: str, last: str) -> tuple[range, int]:
    """The numbers of {first..last}, and their width where one of the two begins with a zero."""
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    return range(int(first), int(last) + 1), max(len(first), len(last)) if padded else 0
