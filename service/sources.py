"""SOURCE → a stream of (id, bytes, label): a folder, a .zip, MNIST or scikit-learn's digits. Never unpickles."""

import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from service import PixelArray
from service.errors import InvalidSource, UndecodablePicture
from service.images import SUFFIXES

DEFAULT_DATA_ROOT = Path("data")
_NAMED = re.compile(r"(mnist/train|mnist/test|digits)(\[.*\])?")
_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")
_IDX = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


class Entry(NamedTuple):
    """One picture of a source, not decoded yet; label is None where the source has none."""

    id: str
    data: bytes
    label: str | None


@dataclass(frozen=True)
class Source:
    """Pictures in a fixed order, read one at a time.

    Attributes:
        name: as the user wrote it.
        ids: of all pictures, in order.
        read: the bytes of the picture at a position.
        labels: of all pictures, or None.
    """

    name: str
    ids: Sequence[str]
    read: Callable[[int], bytes]
    labels: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, position: int) -> Entry:
        """Return the entry at a position.

        Raises:
            UndecodablePicture: its bytes cannot be read from the disk or the archive.
        """
        try:
            data = self.read(position)
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            raise UndecodablePicture(f"cannot be read: {error}") from error
        return Entry(self.ids[position], data, self.labels[position] if self.labels else None)


def open_source(name: str, data_root: Path = DEFAULT_DATA_ROOT) -> Source:
    """Open what a user names as SOURCE.

    Args:
        name: a folder, a .zip file, or mnist/train, mnist/test, digits with an optional slice
            such as [:8000] or [90%:].
        data_root: where named sets lie, in torchvision's layout (data_root/MNIST/raw).

    Raises:
        InvalidSource: nothing there, no picture in it, or a slice that leaves none.
    """
    named = _NAMED.fullmatch(name)
    if named:
        source = _digits(name) if named[1] == "digits" else _mnist(name, named[1].split("/")[1], data_root)
        return slice_source(source, named[2] or "")
    path = Path(name)
    if path.is_dir():
        return _folder(name, path)
    if path.suffix.lower() == ".zip" and path.is_file():
        return _zip(name, path)
    raise InvalidSource(
        f"{name}: no such source; expected a folder of pictures, a .zip of one, mnist/train, mnist/test or digits"
    )


def slice_source(source: Source, text: str) -> Source:
    """Keep a slice of a source: "" all, "[:8000]", "[8000:]", "[10%:20%]", "[-100:]".

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
    return Source(
        source.name,
        source.ids[kept.start : kept.stop],
        lambda position: source.read(kept[position]),
        source.labels[kept.start : kept.stop] if source.labels else None,
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

    return Source(name, [f"{prefix}/{position:05d}" for position in range(len(pixels))], read, labels)


def _folder(name: str, root: Path) -> Source:
    paths = sorted(_walk(root))
    if not paths:
        raise InvalidSource(f"{name}: holds no picture; looked for {' '.join(SUFFIXES)} at any depth")
    return Source(name, paths, lambda position: (root / paths[position]).read_bytes(), _first_levels(paths))


def _walk(root: Path) -> Iterator[str]:
    """Yield the pictures' paths relative to root; links are followed, a folder seen before is not entered."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            if _is_picture(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _zip(name: str, path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InvalidSource(f"{name}: not a zip file that can be read: {error}") from error
    members = sorted(
        member.filename for member in archive.infolist() if not member.is_dir() and _is_picture(member.filename)
    )
    if not members:
        raise InvalidSource(f"{name}: holds no picture; looked for {' '.join(SUFFIXES)} at any depth")
    labels = _first_levels(_without_shared_top(members))
    return Source(name, members, lambda position: archive.read(members[position]), labels)


def _is_picture(path: str) -> bool:
    file = path.rsplit("/", 1)[-1]
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")


def _first_levels(paths: list[str]) -> list[str] | None:
    """The first folder level as label, when every picture is in one."""
    split = [path.split("/") for path in paths]
    return [parts[0] for parts in split] if all(len(parts) > 1 for parts in split) else None


def _without_shared_top(paths: list[str]) -> list[str]:
    """Leave out a top folder that all paths share and have a folder under: who zips a folder zips its name too."""
    split = [path.split("/") for path in paths]
    shared = len({parts[0] for parts in split}) == 1 and all(len(parts) > 2 for parts in split)
    return ["/".join(parts[1:]) for parts in split] if shared else paths


def _digits(name: str) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 0..16 → 0..255
    return from_arrays(name, pixels, [str(label) for label in digits.target], "digits")


def _mnist(name: str, part: str, data_root: Path) -> Source:
    stem, count = _IDX[part]
    folder = data_root / "MNIST" / "raw"
    pixels = _read_idx(folder / f"{stem}-images-idx3-ubyte", (count, 28, 28))
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte", (count,))
    return from_arrays(name, pixels, [str(label) for label in labels], f"mnist/{part}")


def _read_idx(path: Path, shape: tuple[int, ...]) -> PixelArray:
    if not path.is_file():
        raise InvalidSource(
            f"MNIST is not there: expected {path} (uncompressed, as torchvision keeps it); "
            "name the folder above with --data-root"
        )
    header = struct.pack(">BBBB", 0, 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
    data = path.read_bytes()
    if not data.startswith(header) or len(data) != len(header) + int(np.prod(shape)):
        raise InvalidSource(
            f"{path}: not the IDX file of MNIST: expected {'x'.join(map(str, shape))} bytes after its header"
        )
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
