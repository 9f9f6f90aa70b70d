"""Hard copies of pictures, and measures of how well an encoder finds their originals."""

import io
from typing import NamedTuple

import numpy as np
from PIL import ImageOps

from service import FloatArray
from service.encoding.images import decode
from service.encoding.limits import Limits


class Found(NamedTuple):
    """Measures of a search for originals by their copies.

    Attributes:
        recall: share of copies whose nearest original is their own.
        margin: 5th percentile of the cosines of copy and original, less the 99.9th of copy and stranger.
        strangers: median cosine of two originals.
    """

    recall: float
    margin: float
    strangers: float


def hard_copy(data: bytes, kept: float) -> bytes:
    """Return the middle of a picture, mirrored, as a JPEG of quality 20.

    Args:
        data: the picture's file.
        kept: the share of its width and height to keep.
    """
    picture = decode(data, 4096, Limits())
    width, height = (max(1, round(side * kept)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    buffer = io.BytesIO()
    ImageOps.mirror(picture.crop((left, top, left + width, top + height))).save(buffer, "JPEG", quality=20)
    return buffer.getvalue()


def find_copies(originals: FloatArray, copies: FloatArray) -> Found:
    """Compare embeddings (N, D) of originals with those of their copies, in the same order."""
    scores = copies @ originals.T  # (N, N)
    strangers = ~np.eye(len(scores), dtype=bool)
    true = np.diag(scores)
    return Found(
        recall=float((scores.argmax(1) == np.arange(len(scores))).mean()),
        margin=float(np.percentile(true, 5) - np.percentile(scores[strangers], 99.9)),
        strangers=float(np.median((originals @ originals.T)[strangers])),
    )
