"""Limits of a picture. Imports no decoder, so settings can be read without one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a picture: the defaults are for strangers over HTTP, OWN_FILES for one's own files.

    Attributes:
        max_image_bytes: bytes of its file.
        max_pixels, max_side: pixels, and pixels a side, as it is stored.
        max_aspect: long side : short side.
        max_decode_s: processor time of decoding a TIFF, AVIF or HEIF.
    """

    max_image_bytes: int = 10_000_000
    max_pixels: int = 25_000_000
    max_side: int = 10_000
    max_aspect: int = 100
    max_decode_s: float = 1.5


OWN_FILES = Limits(1_000_000_000, 250_000_000, 65_535, 100, 60)
