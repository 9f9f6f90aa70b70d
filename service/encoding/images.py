"""Image bytes → picture (RGB) → pixels (S, S, 3) uint8: one way for HTTP, jobs, training and evaluation."""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from service import PixelArray
from service.encoding.card import Preprocessing
from service.errors import EmptyPicture, TooLarge, UndecodablePicture, UnsupportedFormat

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
THUMBNAIL_SIDE = 128

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves this many times the side that the encoder needs. The
# rule is the same on every route, so the same bytes give the same pixels, with or without a thumbnail.
_DRAFT_MARGIN = 2

# An ordinary progressive JPEG has 10 scans, and an ordinary PNG of 10 MB a thousand chunks. A restart marker for every
# block of 25 megapixels makes 390,000 markers.
_MOST_SCANS = 64
_MOST_CHUNKS = 50_000
_MOST_MARKS = 500_000
_RUN_LENGTHS = (1, 2)

# Our own limits refuse a large picture before it is decoded, with a better message than Pillow's.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Limits:
    """Limits of a picture: bytes of its file, pixels and sides in pixels when decoded, long side : short side."""

    max_image_bytes: int = 10_000_000
    max_pixels: int = 25_000_000
    max_side: int = 10_000
    max_aspect: int = 100


def decode(data: bytes, side: int, limits: Limits) -> Image.Image:
    """Decode image bytes to an upright RGB picture; transparent parts are laid on white.

    Args:
        data: a JPEG, PNG, WebP, GIF (first frame) or BMP file.
        side: the side in pixels that the caller needs. A JPEG may come back smaller than it is stored, but its short
            edge is at least twice that side unless the stored one is shorter.
        limits: checked on the header, before the pixels are decoded.

    Raises:
        EmptyPicture, UnsupportedFormat, TooLarge, UndecodablePicture.

    Cost: JPEG of 500×375, 108 KB: 0.8 ms for a side of 32, 1.8 ms at full size.
    """
    if not data:
        raise EmptyPicture("expected the bytes of a picture, got none")
    if len(data) > limits.max_image_bytes:
        raise TooLarge(f"the picture has {len(data)} bytes; the limit is {limits.max_image_bytes}")
    _check_parts(data)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(*picture.size, limits)
            _check_scans(data, picture)
            # Pillow unpacks run lengths in Python, pixel by pixel.
            if picture.format == "BMP" and picture.info.get("compression") in _RUN_LENGTHS:
                raise UnsupportedFormat("not a picture that we take: a BMP with run lengths; expected one without")
            least = _DRAFT_MARGIN * side
            # Only a JPEG has drafts; None accepts its mode as it is.
            picture.draft(None, (least, least))
            picture.load()
            return _to_rgb(_upright(picture))
    except (TooLarge, UnsupportedFormat):
        raise
    # A decoder may raise nearly anything on damaged bytes.
    except Exception as error:
        if isinstance(error, UnidentifiedImageError) and not _begins_like_a_picture(data):
            raise UnsupportedFormat(
                f"not a picture that we take: expected the bytes of one of {', '.join(FORMATS)}"
            ) from error
        raise UndecodablePicture(f"the picture is damaged or cut short: {_reason(error)}") from error


def to_pixels(picture: Image.Image, preprocessing: Preprocessing) -> PixelArray:
    """Resize and crop a picture as the encoder's preprocessing says.

    Returns:
        (S, S, 3) uint8.

    Raises:
        TooLarge: the crop is larger than the picture, whose preprocessing does not resize.

    Cost: only the part of the picture that survives the crop is resampled.
    """
    side = preprocessing.side
    width, height = picture.size
    resize = preprocessing.resize
    if resize is None:
        resized = (width, height)
    elif isinstance(resize, tuple):
        resized = resize
    elif width <= height:
        resized = (resize, max(resize, int(resize * height / width)))
    else:
        resized = (max(resize, int(resize * width / height)), resize)
    # The crop's offsets are those of torchvision and transformers, converted to source coordinates: the resampling
    # reads the same places as resizing first and cropping then.
    left, top = round((resized[0] - side) / 2), round((resized[1] - side) / 2)
    across, down = width / resized[0], height / resized[1]
    if left < 0 or top < 0:
        raise TooLarge(f"the picture is {width}x{height}, smaller than the {side} pixels the encoder needs")
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    return np.asarray(picture.resize((side, side), Image.Resampling(preprocessing.resample), box=box))


def decode_pixels(data: bytes, preprocessing: Preprocessing, limits: Limits) -> PixelArray:
    """Return the pixels (S, S, 3) of image bytes. Raises as `decode` and `to_pixels`."""
    return to_pixels(decode(data, preprocessing.side, limits), preprocessing)


def thumbnail(data: bytes, picture: Image.Image, limits: Limits) -> bytes:
    """Return the picture as a WebP file whose long side is at most THUMBNAIL_SIDE.

    Args:
        data: the picture's file.
        picture: the decoded picture; if its draft is too small for a thumbnail, the file is decoded once more.
        limits: as for `decode`.

    Raises:
        As `decode`.
    """
    if min(picture.size) < _DRAFT_MARGIN * THUMBNAIL_SIDE and data.startswith(b"\xff\xd8"):
        picture = decode(data, THUMBNAIL_SIDE, limits)
    scale = min(1, THUMBNAIL_SIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1.5)
    buffer = io.BytesIO()
    # Lossy compression would blur glyphs that are a few pixels wide.
    small.save(buffer, "WEBP", quality=85, method=2, lossless=max(small.size) <= 64)
    return buffer.getvalue()


def media_type(data: bytes) -> str:
    """Return the media type of a file that was decoded before, by its first bytes."""
    for start, kind in ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")):
        if data.startswith(start):
            return f"image/{kind}"
    return "image/webp"


def tones(pixels: PixelArray) -> list[float]:
    """Return the tone histogram of pictures: the share of their pixels in each of 16 bins.

    Args:
        pixels: (..., 3) uint8.

    Returns:
        16 shares that sum to 1: eight bins of luminance for grey pixels, then eight for coloured ones.
    """
    flat = pixels.reshape(-1, 3).astype(np.int32)
    luminance = (flat @ np.array([299, 587, 114], np.int32)) // 1000
    coloured = (flat.max(1) - flat.min(1)) > 24
    shares = np.bincount(luminance // 32 + 8 * coloured, minlength=16) / max(1, len(flat))
    return [round(float(share), 4) for share in shares]


def _check_size(width: int, height: int, limits: Limits) -> None:
    if max(width, height) > limits.max_side:
        raise TooLarge(f"the picture is {width}x{height}; the limit is {limits.max_side} pixels a side")
    if width * height > limits.max_pixels:
        raise TooLarge(f"the picture is {width}x{height}; the limit is {limits.max_pixels} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise TooLarge(f"the picture is {width}x{height}; the limit is {limits.max_aspect}:1 from side to side")


def _check_parts(data: bytes) -> None:
    """Refuse a small file that costs much work. Raises TooLarge.

    Pillow reads the segments and fill bytes of a JPEG and the chunks of a PNG one by one in Python, and holds the
    interpreter meanwhile. A JPEG's markers begin with ff; in the data of a scan, ff is written as ff 00.
    """
    if data.startswith(b"\x89PNG"):
        place = 8
        for _ in range(_MOST_CHUNKS):
            place += 12 + int.from_bytes(data[place : place + 4])
            if place >= len(data):
                return
        raise TooLarge(f"the picture has more than {_MOST_CHUNKS} chunks")
    if not data.startswith(b"\xff\xd8"):
        return
    if len(data) > _MOST_MARKS and data.count(b"\xff") - data.count(b"\xff\x00") > _MOST_MARKS:
        raise TooLarge(f"the picture has more than {_MOST_MARKS} segments and fill bytes")


def _check_scans(data: bytes, picture: Image.Image) -> None:
    """Refuse a JPEG with too many scans, each of which decodes the whole picture again. Raises TooLarge.

    Counting scan markers in a whole file costs a twentieth of its decoding, so the common case is recognised first: a
    baseline JPEG whose first scan holds all components. libjpeg refuses a second scan there. Pillow has stopped reading
    right after the header of the first scan.
    """
    if not isinstance(picture, JpegImageFile):
        return
    header = data[picture.fp.tell() - 8 - 2 * picture.layers :]  # type: ignore[union-attr]
    alone = header[:2] == b"\xff\xda" and header[4] == picture.layers and "progressive" not in picture.info
    if not alone and data.count(b"\xff\xda") > _MOST_SCANS:
        raise TooLarge(f"the picture has more than {_MOST_SCANS} scans")


def _to_rgb(picture: Image.Image) -> Image.Image:
    # 16-bit grey is scaled to 8 bits; convert() would clip it.
    if picture.mode.startswith("I"):
        grey = np.clip(np.rint(np.asarray(picture, dtype=np.float64) / 257), 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        visible = picture.convert("RGBA")
        white = Image.new("RGBA", visible.size, "white")
        return Image.alpha_composite(white, visible).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    # A picture with unreadable metadata is taken to be upright.
    with suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _begins_like_a_picture(data: bytes) -> bool:
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM")) or (
        data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its header cannot be read"
    # Pillow's messages contain neither paths nor bytes of the client; of other exceptions only the class is shown.
    return str(error) if isinstance(error, OSError) and str(error) else type(error).__name__
