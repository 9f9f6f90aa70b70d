"""Source: pictures in a fixed order, with their ids and labels."""

import io
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from service import IntArray, PixelArray
from service.errors import InvalidSource, UndecodablePicture
from service.sources.compact import Labels, Names, smallest

_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")


class Entry(NamedTuple):
    """One undecoded picture of a source; label is None when it has none."""

    id: str
    data: bytes
    label: str | None


class LeftOut(NamedTuple):
    """Something that a source saw and did not take as a picture.

    Attributes:
        name: its path within the source.
        reason: a short text that all of its kind share, such as "hidden".
        lost: whether it is, or may be, a picture that the user wanted.
    """

    name: str
    reason: str
    lost: bool


class Omissions(Sequence[LeftOut]):
    """What a source left out, in a few bytes beside each name.

    Args:
        left_out: consumed one at a time.
    """

    def __init__(self, left_out: Iterable[LeftOut]) -> None:
        kinds, codes = dict[tuple[str, bool], int](), array("q")

        def names() -> Iterator[str]:
            for name, reason, lost in left_out:
                codes.append(kinds.setdefault((reason, lost), len(kinds)))
                yield name

        self._names = Names(names())
        self._kinds, self._codes = tuple(kinds), smallest(np.frombuffer(codes, np.int64))

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> LeftOut: ...
    @overload
    def __getitem__(self, index: slice) -> list[LeftOut]: ...
    def __getitem__(self, index: int | slice) -> LeftOut | list[LeftOut]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return LeftOut(self._names[index], *self._kinds[self._codes[index]])


def count_reasons(left_out: Iterable[LeftOut]) -> str:
    """Return how many things were left out by reason, as in "3 hidden; 1 not a picture: .txt"."""
    return "; ".join(f"{count} {reason}" for reason, count in Counter(one.reason for one in left_out).most_common())


class Columns(NamedTuple):
    """What a source tells of its pictures beside id and label. Only `lookalike embed` asks.

    Attributes:
        read: returns a pa.Table with a row for each of some ascending positions, and always the same columns. Raises
            InvalidSource if it cannot be read.
        left_out: columns that are not read, because they hold bytes or differ in kind from file to file.
    """

    read: Callable[[Sequence[int]], Any]
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """Pictures in a fixed order, read one at a time. Several threads may read at once.

    Attributes:
        name: the SOURCE argument as the user wrote it.
        ids: one distinct id for each picture, in order.
        read: returns the bytes of the picture at a position, or raises OSError with the reason.
        labels: one for each picture, None for a picture that has none; or None when no picture has a label.
        blocks: ascending start positions, from 0, of blocks that are cheap to read together: a Parquet row
            group is read whole. None when every picture costs the same alone.
        left_out: what the whole source holds beside the pictures, with reasons. A slice has all of it.
        notes: sentences about the whole source that its user should read, such as which column was no label.
        captions: reads the captions of the pictures from the source, one list of texts for each, empty for none; None
            when it holds none. Only training asks.
        in_files: whether each picture is a file of its own, at its id below the folder that the name names.
        place: returns the file that holds the picture at a position, which may be an archive of many; None where no
            file tells whether a picture has changed.
        columns: what else the source tells of the pictures; None if that is nothing.
    """

    name: str
    ids: Sequence[str]
    read: Callable[[int], bytes]
    labels: Labels | None
    blocks: Sequence[int] | None = None
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = ()
    in_files: bool = False
    captions: Callable[[], Sequence[Sequence[str]]] | None = None
    place: Callable[[int], Path] | None = None
    columns: Columns | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, position: int) -> Entry:
        """Return the entry at a position.

        Raises:
            UndecodablePicture: the bytes cannot be read from the disk or the archive.
        """
        try:
            data = self.read(position)
        except OSError as error:
            raise UndecodablePicture(f"cannot be read: {error}") from error
        return Entry(self.ids[position], data, self.labels[position] if self.labels else None)


def slice_source(source: Source, text: str) -> Source:
    """Return a slice of a source without copying: "[:8000]", "[8000:]", "[10%:20%]", "[-100:]", or "" for all.

    Raises:
        InvalidSource: the slice does not parse or is empty.
    """
    if not text:
        return source
    match = _SLICE.fullmatch(text)
    if not match:
        raise InvalidSource(f"{source.name}: cannot read the slice {text}; expected [FROM:TO], as in [:8000] or [90%:]")
    count = len(source)
    start, stop = (
        None if bound is None else round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
        for bound in match.groups()
    )
    kept = range(count)[start:stop]
    if not kept:
        raise InvalidSource(f"{source.name}: the slice {text} of {count} pictures holds none")
    blocks, captions, place, columns = source.blocks, source.captions, source.place, source.columns
    labels = source.labels[kept.start : kept.stop] if source.labels is not None else None
    return replace(
        source,
        ids=source.ids[kept.start : kept.stop],
        read=lambda position: source.read(kept[position]),
        labels=labels if labels is not None and labels.used() else None,
        blocks=None
        if blocks is None
        else [0] + [block - kept.start for block in blocks if kept.start < block < kept.stop],
        captions=None if captions is None else lambda: captions()[kept.start : kept.stop],
        place=None if place is None else lambda position: place(kept[position]),
        columns=None
        if columns is None
        else columns._replace(read=lambda positions: columns.read([kept[position] for position in positions])),
    )


def select(source: Source, positions: IntArray) -> Source:
    """Return a source of the pictures at some positions, in ascending order."""
    kept, captions, place = positions.tolist(), source.captions, source.place
    return replace(
        source,
        ids=Names(source.ids[position] for position in kept),
        read=lambda position: source.read(kept[position]),
        labels=None if source.labels is None else Labels(source.labels.codes[positions], source.labels.names),
        blocks=None,
        captions=None if captions is None else lambda: [captions()[position] for position in kept],
        place=None if place is None else lambda position: place(kept[position]),
        columns=None,
    )


def from_arrays(name: str, pixels: PixelArray, labels: Sequence[str], prefix: str) -> Source:
    """Return a source of pictures in memory that encodes each one as PNG when read.

    Args:
        pixels: (N, H, W) grey or (N, H, W, 3), uint8.
        labels: N labels.
        prefix: the start of each id, as in prefix/00000.
    """

    def read(position: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels[position]).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    ids = Names(f"{prefix}/{position:05d}" for position in range(len(pixels)))
    return Source(name, ids, read, Labels.of(labels))
