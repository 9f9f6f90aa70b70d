"""SOURCE → a stream of (id, bytes, label): a folder, .zip, .tar, .parquet, MNIST or digits. Never unpickles.

files.py reads folders and archives, parquet.py tables, named.py the sets that go by a name; compact.py is
how all of them hold a million ids and labels.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from service import PixelArray
from service.errors import InvalidSource, UndecodablePicture
from service.images import SUFFIXES
from service.sources.compact import Labels, Names

DEFAULT_DATA_ROOT = Path("data")
_NAMED = re.compile(r"(mnist/train|mnist/test|digits)(\[.*\])?")
_SLICED = re.compile(r"(.+)(\[[^\[\]]*\])")
_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")
_PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_EXPECTED = (
    "expected a folder of pictures, a .zip of one, .tar or .parquet files (one, a folder of them, or several as "
    "in train-{000..009}.tar), mnist/train, mnist/test or digits"
)


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


def open_source(name: str, data_root: Path = DEFAULT_DATA_ROOT) -> Source:
    """Open what a user names as SOURCE.

    Args:
        name: a folder of pictures, a .zip of one, a .tar or .parquet file, a folder of these, several of them
            as shards/train-{000..009}.tar, or mnist/train, mnist/test, digits; then perhaps a slice such as
            [:8000] or [90%:]. A path that has brackets or braces in its own name is that path.
        data_root: where named sets lie, in torchvision's layout (data_root/MNIST/raw).

    Raises:
        InvalidSource: nothing there, no picture in it, damaged, or a slice that leaves none.

    Cost: a .tar is gone through once from header to header (a million pictures: a minute), of a .parquet ids and
    labels are read. Held for a picture: its id and 5 (folder) to 40 (.zip) bytes.
    """
    try:
        named = _NAMED.fullmatch(name)
        if named:
            return slice_source(_open_named(name, named[1], data_root), named[2] or "")
        sliced = _SLICED.fullmatch(name)
        if sliced and not Path(name).exists():
            return slice_source(_open_path(name, sliced[1]), sliced[2])
        return _open_path(name, name)
    except OSError as error:
        raise InvalidSource(f"{name}: cannot be read: {error.strerror or error}") from error


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


# The rooms behind are entered only when needed: they import Source from here, and pyarrow takes a while to load.


def _open_named(name: str, set_name: str, data_root: Path) -> Source:
    from service.sources.named import open_digits, open_mnist

    return open_digits(name) if set_name == "digits" else open_mnist(name, set_name.split("/")[1], data_root)


def _open_path(name: str, text: str) -> Source:
    """Open a folder, a file or a pattern of files; name is for messages, text is the path."""
    from service.sources.files import expand, find, open_folder, open_tars, open_zip

    path = Path(text)
    if path.is_dir():
        pictures = find(path, SUFFIXES)
        if pictures:
            return open_folder(name, path, pictures)
        tars, tables = find(path, (".tar",)), find(path, (".parquet",))
        tables = [table for table in tables if not Path(table).name.startswith("_")]  # these are about the others
        if tars and tables:
            raise InvalidSource(
                f"{name}: expected files of one kind, found {tars[0]} and {tables[0]}; name one of them"
            )
        if not tars and not tables:
            raise InvalidSource(
                f"{name}: holds no picture; looked for {' '.join(SUFFIXES)} at any depth, then for .tar and .parquet"
            )
        paths = [path / file for file in tars or tables]
    else:
        paths = [path] if path.exists() else expand(text)
    match paths[0].suffix.lower() if paths else "":
        case ".zip" if len(paths) == 1:
            return open_zip(name, path)
        case ".tar":
            return open_tars(name, paths)
        case ".parquet":
            from service.sources.parquet import open_parquet

            return open_parquet(name, paths)
    if paths and text.lower().endswith(_PACKED):
        raise InvalidSource(f"{name}: is a compressed tar; pictures are read from their place in it: unpack it to .tar")
    raise InvalidSource(f"{name}: {'not a kind of file that we read' if paths else 'no such source'}; {_EXPECTED}")
