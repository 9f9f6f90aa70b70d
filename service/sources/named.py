"""Data sets opened by name: MNIST in torchvision's layout and scikit-learn's digits. Never unpickles."""

import struct
from pathlib import Path

import numpy as np

from service import PixelArray
from service.errors import InvalidSource
from service.sources.source import Source, from_arrays

_IDX = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def open_digits(name: str) -> Source:
    """Open scikit-learn's digits: 1,797 grey pictures of 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The digits range from 0 to 16, pixels from 0 to 255.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return from_arrays(name, pixels, [str(label) for label in digits.target], "digits")


def open_mnist(name: str, part: str, data_root: Path) -> Source:
    """Open the "train" or "test" part of MNIST: grey pictures of 28x28.

    Raises:
        InvalidSource: the IDX files are missing under data_root, or are not those of MNIST.
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
