"""Pictures in .tar files, such as WebDataset shards, read from their place in them."""

import os
import re
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from service.errors import InvalidSource
from service.sources.compact import Labels, Names, smallest
from service.sources.files import stems
from service.sources.kinds import FIRST_BYTES, HIDDEN, holds_none, judge
from service.sources.paths import Gathered, compose, path_labels
from service.sources.source import Columns, LeftOut, Omissions, Source

_MAX_LABEL_BYTES = 1000
_TAR_BLOCK_BYTES = 512
# Two members are compared so many bytes at a time.
_COMPARED_BYTES = 1 << 20
_CLASS, _CAPTION, _FACTS = ".cls", ".txt", ".json"
_MAX_TEXT_BYTES = 100_000
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
# The key of a picture within its WebDataset sample begins with a word, as in input.jpg; 2024.0.jpg is part of a name.
_WORD_KEY = re.compile(r"[a-z_][a-z0-9_-]*(\.[a-z_][a-z0-9_-]*)?")
# Words in the keys of what is to be seen, and of what belongs to it.
_SHOWN = re.compile(r"(image|img|input|rgb|photo|picture|original|orig|jpg|jpeg|png|webp)\b")
_BESIDE = re.compile(r"(mask|seg|segmentation|label|target|depth|normal|edge|alpha|thumb|thumbnail|cond|control)")


@dataclass
class _Shard:
    """What a scan of one .tar found.

    Attributes:
        path: of the file.
        places: offset and size in bytes, two numbers a row.
        pictures: by id, with the row in `places`; in archive order.
        classes: the text of each .cls member by its path without that ending.
        beside: paths without ending of members that are no pictures.
        notes: what its user should know.
    """

    path: Path
    places: "array[int]"
    pictures: Gathered[int]
    classes: dict[str, str] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def open_tars(name: str, paths: Sequence[Path], image_key: str | None = None) -> Source:
    """Open .tar files, such as WebDataset shards. Pictures keep their archive order.

    A picture's label is the text of the .cls member beside it: 000123.cls beside 000123.jpg, or, if that is missing,
    of the shorter names that end before a dot: 000123.cls beside 000123.left.jpg. If there is no .cls member at all,
    labels come from folders as path_labels says. Of several pictures in a sample, one is taken. The id is the member's
    path; with several shards the shard's name precedes it (train-000/000123.jpg). Symbolic links and devices are left
    out; hard links count.

    Args:
        name: for messages.
        paths: of the files, which may be several tars in one, as `cat` joins them.
        image_key: of the picture to take of each sample, such as input.jpg, or input for any format.

    Raises:
        InvalidSource: a file is compressed, damaged or truncated, none holds a picture, or none under the key.
    """
    shards = [_scan(path) for path in paths]
    notes = [note for shard in shards for note in shard.notes]
    prefixes = [f"{compose(stem)}/" for stem in stems(paths)] if len(paths) > 1 else [""]
    if not any(shard.pictures.found for shard in shards):
        raise holds_none(name, _left_out(prefixes, shards))
    notes += _choose(name, shards, image_key)
    members = [id for shard in shards for id in shard.pictures.found]
    if any(shard.classes for shard in shards):
        labels: Labels | None = Labels.of(_label(shard, id) for shard in shards for id in shard.pictures.found)
    else:
        labels = path_labels(members, paths[0].stem if len(paths) == 1 else None)
    counts = [len(shard.pictures.found) for shard in shards]
    left_out = Omissions(_left_out(prefixes, shards))
    ids = Names(prefix + id for prefix, shard in zip(prefixes, shards, strict=True) for id in shard.pictures.found)
    numbers = smallest(np.repeat(np.arange(len(shards)), counts))
    places = np.concatenate([_places(shard) for shard in shards])
    offsets, sizes = smallest(places[:, 0]), smallest(places[:, 1])

    def read(position: int) -> bytes:
        size = int(sizes[position])
        with paths[numbers[position]].open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(offsets[position]))
        if len(data) < size:
            raise OSError(f"the archive is cut short: expected {size} bytes, got {len(data)}")
        return data

    # The rows of one part lie in few shards, and those of the next part in the last of them again.
    read_texts = lru_cache(maxsize=4)(_texts)

    def texts(ending: str, number: int, positions: Sequence[int]) -> list[str | None]:
        """Return the text with this ending of the samples at some positions, all of the shard with this number."""
        found = read_texts(paths[number], ending)
        own = (ids[position].removeprefix(prefixes[number]) for position in positions)
        return [next((found[stem] for stem in _stems(id) if stem in found), None) for id in own]

    def captions() -> list[list[str]]:
        ends = np.cumsum([0, *counts]).tolist()
        return [
            [] if text is None else [text]
            for number in range(len(paths))
            for text in texts(_CAPTION, number, range(ends[number], ends[number + 1]))
        ]

    return Source(
        name,
        ids,
        read,
        labels,
        left_out=left_out,
        notes=notes,
        captions=captions,
        place=lambda position: paths[numbers[position]],
        columns=_columns(left_out, ids, numbers, texts) if _is_webdataset(shards, left_out) else None,
    )


def _is_webdataset(shards: Sequence[_Shard], left_out: Sequence[LeftOut]) -> bool:
    beside = (one.name.lower() for one in left_out)
    return any(shard.classes for shard in shards) or any(name.endswith((_CAPTION, _FACTS)) for name in beside)


def _columns(
    left_out: Sequence[LeftOut],
    ids: Sequence[str],
    numbers: Any,
    texts: Callable[[str, int, Sequence[int]], list[str | None]],
) -> Columns:
    """Return the samples' keys and, where there are any, captions (.txt) and facts (.json, as text).

    Args:
        left_out: the members that are no pictures.
        ids: of the pictures.
        numbers: (N,) of their shards.
        texts: the texts of some samples of a shard, by ending.
    """
    beside = {ending for one in left_out for ending in (_CAPTION, _FACTS) if one.name.lower().endswith(ending)}

    def read(positions: Sequence[int]) -> Any:
        # Imported late because pyarrow loads slowly.
        import pyarrow as pa

        keys = (_sample(ids[position])[0].rpartition("/")[2] for position in positions)
        columns = {"key": pa.array(keys, pa.string())}
        for column, ending in (("caption", _CAPTION), ("json", _FACTS)):
            if ending in beside:
                places = np.asarray(positions, np.int64)
                shards = numbers[places]
                found: list[str | None] = []
                for shard in np.unique(shards).tolist():
                    found += texts(ending, shard, places[shards == shard].tolist())
                columns[column] = pa.array(found, pa.string())
        return pa.table(columns)

    return Columns(read)


def _texts(path: Path, ending: str) -> dict[str, str]:
    """Return the text of each member of a .tar with this ending, by its path without it: a .txt is a caption.

    Raises:
        InvalidSource: a caption is too long. Facts that are too long are passed over.
    """
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for member in _members(_Shard(path, array("q"), Gathered(lambda one, other: one is other)), file):
            inside = _relative(member.name)
            if not inside.lower().endswith(ending) or not member.isreg():
                continue
            if member.size > _MAX_TEXT_BYTES:
                if ending != _CAPTION:
                    continue
                raise InvalidSource(
                    f"{path}: {inside}: a caption of {member.size} bytes; expected at most {_MAX_TEXT_BYTES}"
                )
            text = os.pread(file.fileno(), member.size, member.offset_data).decode("utf-8-sig", "replace").strip()
            if text:
                found[compose(inside[: -len(ending)])] = compose(text)
    return found


def _left_out(prefixes: Sequence[str], shards: Sequence[_Shard]) -> Iterator[LeftOut]:
    for prefix, shard in zip(prefixes, shards, strict=True):
        yield from (one._replace(name=prefix + one.name) for one in shard.pictures.left_out)


def _scan(path: Path) -> _Shard:
    """Read every header of a .tar once."""
    places, rows = array("q"), dict[str, int]()
    with path.open("rb") as file:
        pictures: Gathered[int] = Gathered(lambda one, other: _same(file, places, one[1], other[1]))
        shard = _Shard(path, places, pictures)
        for member in _members(shard, file):
            inside = _relative(member.name)
            # A hard link names an earlier member by another path.
            row = rows.get(_relative(member.linkname), -1) if member.islnk() else len(places) // 2
            left_out = None if member.isdir() else _judge(inside, member, row, file, shard)
            if left_out is not None:
                pictures.left_out.append(left_out)
                if left_out.reason != HIDDEN:
                    shard.beside.add(compose(inside.rpartition(".")[0]))
            elif inside.lower().endswith(_CLASS):
                _read_class(inside, member, file, shard)
            elif not member.isdir():
                if member.isreg():
                    places.extend((member.offset_data, member.size))
                pictures.add(inside, row)
                rows[inside] = row
    return shard


def _same(file: BinaryIO, places: "array[int]", one: int, other: int) -> bool:
    """Return whether two rows of `places` hold the same bytes."""
    (start, size), (other_start, other_size) = places[2 * one : 2 * one + 2], places[2 * other : 2 * other + 2]
    return size == other_size and all(
        os.pread(file.fileno(), min(_COMPARED_BYTES, size - at), start + at)
        == os.pread(file.fileno(), min(_COMPARED_BYTES, size - at), other_start + at)
        for at in range(0, size, _COMPARED_BYTES)
    )


def _judge(inside: str, member: tarfile.TarInfo, row: int, file: BinaryIO, shard: _Shard) -> LeftOut | None:
    """Return why a member is left out; None for a picture or a class. `row` is its place, or −1 if it has none."""
    if member.islnk() and row >= 0:
        offset, size = shard.places[2 * row : 2 * row + 2]
    else:
        offset, size = member.offset_data, member.size
    left_out = judge(inside, lambda: os.pread(file.fileno(), min(FIRST_BYTES, size), offset))
    if left_out is not None and left_out.reason == HIDDEN:
        return left_out
    if not (member.isreg() or member.islnk()):
        return LeftOut(inside, "a link or device in a .tar", False)
    if row < 0:
        return LeftOut(inside, "a link that leads nowhere", left_out is None)
    if inside.lower().endswith(_CLASS):
        return None
    if left_out is None and member.issparse():
        return LeftOut(inside, "stored as a sparse file, which is not read", True)
    return left_out


def _read_class(inside: str, member: tarfile.TarInfo, file: BinaryIO, shard: _Shard) -> None:
    stem = compose(inside[: -len(_CLASS)])
    shard.beside.add(stem)
    if member.isreg() and member.size <= _MAX_LABEL_BYTES:
        text = os.pread(file.fileno(), member.size, member.offset_data).decode("utf-8-sig", "replace").strip()
        if text:
            # Interning keeps one string for each distinct label.
            shard.classes[stem] = sys.intern(compose(text))


def _places(shard: _Shard) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    rows = np.fromiter((row for _, row in shard.pictures.found.values()), np.int64, len(shard.pictures.found))
    return np.array(shard.places, np.int64).reshape(-1, 2)[rows]


def _members(shard: _Shard, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a .tar, or of several that were joined.

    Raises:
        InvalidSource: the file is compressed, damaged or truncated.
    """
    start = 0
    try:
        while True:
            file.seek(start)
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
            start = _behind_zeros(file, tar.offset)
            if start < 0:
                return
            if not _is_header(os.pread(file.fileno(), _TAR_BLOCK_BYTES, start)):
                shard.notes.append(f"{shard.path}: what stands behind its end, from byte {start} on, is no .tar")
                return
    # tarfile raises nearly any exception on a damaged header.
    except Exception as error:
        begins = os.pread(file.fileno(), 8, 0)
        for signature, kind in _COMPRESSED.items():
            if begins.startswith(signature):
                raise compressed(str(shard.path), kind) from error
        raise InvalidSource(f"{shard.path}: cannot be read as an uncompressed .tar: {error}") from error


def compressed(name: str, kind: str) -> InvalidSource:
    """Return the error of a tar that is compressed."""
    return InvalidSource(
        f"{name}: is a compressed tar ({kind}); pictures are read from their place in it: unpack it to .tar"
    )


def _behind_zeros(file: BinaryIO, start: int) -> int:
    """Return where the first block after `start` begins that is not all zeros; −1 if there is none."""
    while chunk := os.pread(file.fileno(), 1 << 20, start):
        rest = chunk.lstrip(b"\0")
        if rest:
            return start + (len(chunk) - len(rest)) // _TAR_BLOCK_BYTES * _TAR_BLOCK_BYTES
        start += len(chunk)
    return -1


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _relative(member: str) -> str:
    """Return a member's path without a leading ./ or /."""
    return member.removeprefix("./").lstrip("/")


def _stems(path: str) -> Iterator[str]:
    """Yield a path without its ending, then cut at each dot of the file's name that is further left."""
    first = path.rfind("/") + 1
    while (dot := path.rfind(".", first + 1)) > 0:
        path = path[:dot]
        yield path


def _label(shard: _Shard, id: str) -> str | None:
    return next((shard.classes[stem] for stem in _stems(id) if stem in shard.classes), None)


def _sample(path: str) -> tuple[str, str]:
    """Return a WebDataset sample, the path up to the first dot of the file's name, and the key within it."""
    first = path.rfind("/") + 1
    dot = path.find(".", first + 1)
    return (path, "") if dot < 0 else (path[:dot], path[dot + 1 :].lower())


def _choose(name: str, shards: Sequence[_Shard], image_key: str | None) -> list[str]:
    """Keep one picture of each WebDataset sample; return notes on which was taken.

    Pictures are of one sample if their names are equal up to the first dot and go on with words (input.jpg, mask.png),
    and if the sample has another member under its own name (000123.json), or its keys recur in other samples. Pictures
    that have members of their own (shot.2024.0.cls beside shot.2024.0.jpg) are samples by themselves.
    """
    samples = [_samples(shard, image_key is not None) for shard in shards]
    recurring = Counter(key for found in samples for keys in found.values() if len(keys) > 1 for key in keys)
    taken: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for shard, found in zip(shards, samples, strict=True):
        for sample, keys in found.items():
            if image_key is not None:
                wanted = image_key.lower()
                chosen = next((key for key in keys if key == wanted or key.startswith(f"{wanted}.")), None)
            elif len(keys) == 1 or not (sample in shard.beside or all("." in k and recurring[k] > 1 for k in keys)):
                continue
            else:
                chosen = min(keys, key=lambda key: (_BESIDE.match(key) is not None, _SHOWN.match(key) is None))
            taken.update([chosen] if chosen else [])
            for key, id in keys.items():
                if key != chosen:
                    passed[key] += 1
                    del shard.pictures.found[id]
                    shard.pictures.left_out.append(LeftOut(id, f"another picture of its sample: {key}", False))
    if image_key is not None and not taken:
        raise InvalidSource(f"{name}: holds no picture under the key {image_key}; found {', '.join(sorted(passed))}")
    if not passed:
        return []
    return [
        f"of the pictures in each sample, {', '.join(taken)} is taken, and {', '.join(passed)} left out: "
        "--image-key chooses"
    ]


def _samples(shard: _Shard, every: bool) -> dict[str, dict[str, str]]:
    """Return the ids of the pictures that may be one of several in a sample, or of all, by sample and key."""
    found: dict[str, dict[str, str]] = {}
    for id in shard.pictures.found:
        sample, key = _sample(id)
        own = next(_stems(id), id)
        if every or (_WORD_KEY.fullmatch(key) and (own == sample or own not in shard.beside)):
            found.setdefault(sample, {})[key] = id
    return found
