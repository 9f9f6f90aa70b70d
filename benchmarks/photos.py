"""The pictures that servers are measured with: crops of two photographs, JPEGs of 500×375 pixels and some 108 KB."""

import io
from pathlib import Path

import sklearn.datasets
from PIL import Image

_FOLDER = Path(sklearn.datasets.__file__).parent / "images"  # 640×427 each
_SIZE = (500, 375)
_BYTES = 108_000


def photos(count: int = 8) -> list[bytes]:
    """Return JPEG files: crops of either photograph in turn, at places that spread from corner to corner.

    Each has the quality, from 90 to 100, that brings it nearest to 108,000 bytes.
    """
    return [min(_files(number, count), key=lambda file: abs(len(file) - _BYTES)) for number in range(count)]


def _files(number: int, count: int) -> list[bytes]:
    files = []
    with Image.open(_FOLDER / ("china.jpg", "flower.jpg")[number % 2]) as photo:
        step = number / max(1, count - 1)
        left, top = (int(step * (have - want)) for have, want in zip(photo.size, _SIZE, strict=True))
        crop = photo.crop((left, top, left + _SIZE[0], top + _SIZE[1]))
    for quality in range(90, 101):
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return files
