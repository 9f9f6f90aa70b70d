"""Sets that go by a name: MNIST as torchvision keeps it, and scikit-learn's digits. Never unpickles."""

import struct
from pathlib import Path

import numpy as np

from service import PixelArray
from service.errors import InvalidSource
from service.sources.source import Source, from_arrays

_IDX = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def open_digits(name: str) -> Source:
    """Open scikit-learn's digits: 1797 grey pictures of 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 0..16 → 0..255
    return from_arrays(name, pixels, [str(label) for label in digits.target], "digits")


def open_mnist(name: str, part: str, data_root: Path) -> Source:
    """Open a part of MNIST: "train" or "test", grey pictures of 28x28.

    Raises:
        InvalidSource: it is not under data_root, or not these files.
    """
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
