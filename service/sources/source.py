"""What a SOURCE is: pictures in a fixed order, with their ids and labels."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from service import PixelArray
from service.errors import InvalidSource, UndecodablePicture
from service.sources.compact import Labels, Names

_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")


class Entry(NamedTuple):
    """One picture of a source, not decoded yet; label is None where the source has none."""

    id: str
    data: bytes
    label: str | None


@dataclass(frozen=True)
class Source:
    """Pictures in a fixed order, read one at a time, by several threads at once if need be.

    Attributes:
        name: as the user wrote it.
        ids: of all pictures, in order; no two are the same.
        read: the bytes of the picture at a position; OSError says why there are none.
        labels: of all pictures, or None.
        blocks: where the blocks of pictures start that are cheap to read together (a Parquet row group is
            read whole), 0 first and ascending; None where every picture is as cheap by itself.
    """

    name: str
    ids: Sequence[str]
    read: Callable[[int], bytes]
    labels: Labels | None
    blocks: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, position: int) -> Entry:
        """Return the entry at a position.

        Raises:
            UndecodablePicture: its bytes cannot be read from the disk or the archive.
        """
        try:
            data = self.read(position)
        except OSError as error:
            raise UndecodablePicture(f"cannot be read: {error}") from error
        return Entry(self.ids[position], data, self.labels[position] if self.labels else None)


def slice_source(source: Source, text: str) -> Source:
    """Keep a slice of a source: "" all, "[:8000]", "[8000:]", "[10%:20%]", "[-100:]". Nothing is copied.

    Raises:
        InvalidSource: a slice that does not parse or leaves no picture.
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
    blocks = source.blocks
    return Source(
        source.name,
        source.ids[kept.start : kept.stop],
        lambda position: source.read(kept[position]),
        source.labels[kept.start : kept.stop] if source.labels else None,
        None if blocks is None else [0] + [block - kept.start for block in blocks if kept.start < block < kept.stop],
    )


def from_arrays(name: str, pixels: PixelArray, labels: Sequence[str], prefix: str) -> Source:
    """Make a source of pictures in memory, handed out as PNG files.

    Args:
        pixels: (N, H, W) grey or (N, H, W, 3), uint8.
        labels: N of them.
        prefix: ids are prefix/00000 and so on.
    """

    def read(position: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels[position]).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    ids = Names(f"{prefix}/{position:05d}" for position in range(len(pixels)))
    return Source(name, ids, read, Labels.of(labels))
