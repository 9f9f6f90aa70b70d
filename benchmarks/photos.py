"""The pictures for measuring servers: crops of two photographs, JPEGs of 500×375 pixels and about 108 KB."""

import io
from pathlib import Path

import sklearn.datasets
from PIL import Image

# scikit-learn's photographs are 640×427.
_FOLDER = Path(sklearn.datasets.__file__).parent / "images"
_SIZE = (500, 375)
_BYTES = 108_000


def photos(count: int = 8) -> list[bytes]:
    """Return JPEG files: crops of the two photographs in turn, spread from corner to corner.

    The quality of each, between 90 and 100, brings it as near as possible to 108,000 bytes.
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
