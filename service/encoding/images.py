"""Image bytes → picture (RGB) → pixels (S, S, 3) uint8: one way for HTTP, jobs, training and evaluation."""

import io
import threading
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile

from service import PixelArray
from service.encoding.apart import STORED_SIZE, Budget, decode_apart
from service.encoding.card import Preprocessing
from service.encoding.colours import LARGE_PIXELS, raw_mode, to_rgb
from service.encoding.containers import Parts, needed_parts
from service.encoding.decode_memory import decode_memory
from service.encoding.limits import Limits
from service.errors import EmptyPicture, TooLarge, UndecodablePicture, UnsupportedFormat

# The formats that we decode, with the endings of their files.
SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".heics", ".heifs", ".hif"),
}
FORMATS = tuple(SUFFIXES_OF)
SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)
THUMBNAIL_SIDE = 128

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves this many times the side that the encoder needs. The
# rule is the same on every route, so the same bytes give the same pixels, with or without a thumbnail.
_DRAFT_MARGIN = 2

# A picture of one of these formats is decoded in a process of its own, with a limit on its work.
_APART = ("TIFF", "AVIF", "HEIF")
# A JPEG without an end mark is decoded twice to see that nothing else is missing; not where that takes seconds.
_MOST_UNENDED_PIXELS = 150_000_000
_RUN_LENGTHS = (1, 2)
_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# More than one picture of LARGE_PIXELS at a time would not fit into 2 GB.
_one_large = threading.Lock()

_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    # Little and big endian, with offsets of four and of eight bytes.
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}

# Our own limits refuse a large picture before it is decoded, with a better message than Pillow's.
Image.MAX_IMAGE_PIXELS = None


def format_of(data: bytes) -> str | None:
    """Return the format that a file's first bytes announce, one of FORMATS, or None. 64 bytes are enough."""
    for start, format in _STARTS:
        if data.startswith(start):
            return format
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] != b"ftyp":
        return None
    # A file of the HEIF family names its brand, and then the brands that it is compatible with.
    end = min(int.from_bytes(data[:4]), 64)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else None


def decode(data: bytes, side: int, limits: Limits) -> Image.Image:
    """Decode image bytes to an upright RGB picture; transparent parts are laid on white.

    Args:
        data: a JPEG, PNG, WebP, GIF (first frame), BMP, TIFF (first page), AVIF or HEIF (primary picture) file.
        side: the side in pixels that the caller needs. A JPEG may come back smaller than it is stored, but its short
            edge is at least twice that side unless the stored one is shorter. A picture of more than 50 megapixels
            comes back at half its size. Its info has the size of the file under STORED_SIZE.
        limits: checked on the header, before the pixels are decoded.

    Raises:
        EmptyPicture, UnsupportedFormat, TooLarge, UndecodablePicture.

    Cost: JPEG of 500×375, 108 KB: 0.8 ms for a side of 32, 1.8 ms at full size. One picture of more than 50
    megapixels is decoded at a time.
    """
    if not data:
        raise EmptyPicture("expected the bytes of a picture, got none")
    if len(data) > limits.max_image_bytes:
        raise TooLarge(
            f"the picture has {len(data)} bytes; the limit is {limits.max_image_bytes} (LOOKALIKE_MAX_IMAGE_BYTES)"
        )
    if format_of(data) not in _APART:
        return _decode_here(data, side, limits)
    # A child tells by its refusal that a picture is large.
    most = min(limits.max_pixels, LARGE_PIXELS)
    try:
        with decode_memory.take(most):
            return _decode_apart(data, side, replace(limits, max_pixels=most))
    except TooLarge:
        if most == limits.max_pixels:
            raise
        with _one_large, decode_memory.take(limits.max_pixels):
            return _decode_apart(data, side, limits)


def decode_here(data: bytes, side: int, limits: dict[str, Any]) -> Image.Image:
    """Decode in this process what `decode` gives to a child process, which calls this; limits are those of Limits."""
    return _decode_here(data, side, Limits(**limits))


def _decode_here(data: bytes, side: int, limits: Limits) -> Image.Image:
    format = format_of(data)
    if format is None:
        raise UnsupportedFormat(f"not a picture that we take: expected the bytes of one of {', '.join(FORMATS)}")
    parts = needed_parts(data, format)
    try:
        with warnings.catch_warnings(action="ignore"):
            return _load(parts.data, format, side, limits)
    except (TooLarge, UnsupportedFormat):
        raise
    # A decoder may raise nearly anything on damaged bytes.
    except Exception as error:
        if format == "JPEG" and str(error).startswith("image file is truncated"):
            picture = _load_without_end(parts, side, limits)
            if picture is not None:
                return picture
        raise UndecodablePicture(f"the picture is damaged or cut short: {_reason(error)}") from error


def _decode_apart(data: bytes, side: int, limits: Limits) -> Image.Image:
    budget = Budget.of(limits.max_decode_s, limits.max_pixels)
    return decode_apart(data, budget, side=side, limits=asdict(limits))


def _load(data: bytes, format: str, side: int, limits: Limits) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=(format,)) as picture:
        _check_size(*picture.size, limits)
        # Pillow unpacks run lengths in Python, pixel by pixel.
        if format == "BMP" and picture.info.get("compression") in _RUN_LENGTHS:
            raise UnsupportedFormat("not a picture that we take: a BMP with run lengths; expected one without")
        raw, size = raw_mode(picture), picture.size
        # Pillow turns a TIFF while it loads it, and reads XMP for it.
        picture.info.pop("xmp", None)
        least = _DRAFT_MARGIN * side
        # Only a JPEG has drafts; None accepts its mode as it is.
        picture.draft(None, (least, least))
        # The decoder of a progressive JPEG holds all of it, whatever the draft.
        width, height = size if picture.info.get("progressive") else picture.size
        alone = _one_large if picture.width * picture.height > LARGE_PIXELS else nullcontext()
        with alone, decode_memory.take(width * height):
            picture.load()
            upright = _upright(_on_canvas(to_rgb(picture, raw, data), picture), picture)
    upright.info[STORED_SIZE] = size
    return upright


def _on_canvas(rgb: Image.Image, picture: Image.Image) -> Image.Image:
    """Leave white what the first frame of a GIF does not cover; Pillow fills it with a colour of the palette."""
    box = picture.dispose_extent if isinstance(picture, GifImageFile) else None
    if box is None or box == (0, 0, *rgb.size):
        return rgb
    canvas = Image.new("RGB", rgb.size, "white")
    canvas.paste(rgb.crop(box), box[:2])
    return canvas


def _load_without_end(parts: Parts, side: int, limits: Limits) -> Image.Image | None:
    """Return the picture of a JPEG that lacks nothing but its end mark, else None.

    What stands behind the data of a whole picture does not change it. A decoder asks for a few bytes more than it
    needs, and for the end mark after several scans, of which each may be the last.
    """
    if not parts.whole:
        return None
    data, end = parts.data.rstrip(b"\xff"), b"\xff\xd9" if parts.scans > 1 else b""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            if parts.scans * header.width * header.height > _MOST_UNENDED_PIXELS:
                return None
        one, other = (_load(data + filling * 8 + end, "JPEG", side, limits) for filling in (b"\0", b"\x55"))
    # The decoder needs more than it was given.
    except Exception:
        return None
    return one if one.tobytes() == other.tobytes() else None


def to_pixels(picture: Image.Image, preprocessing: Preprocessing) -> PixelArray:
    """Resize and crop a picture as the encoder's preprocessing says.

    Returns:
        (height, width, 3) uint8.

    Raises:
        TooLarge: the crop is larger than the picture, whose preprocessing does not resize.

    Cost: only the part of the picture that survives the crop is resampled.
    """
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
    # The crop's offsets are those of torchvision or of transformers, converted to source coordinates: the resampling
    # reads the same places as resizing first and cropping then.
    target = (preprocessing.width, preprocessing.height)
    left, top = (_offset(edge - side, preprocessing.floors) for edge, side in zip(resized, target, strict=True))
    across, down = width / resized[0], height / resized[1]
    if left < 0 or top < 0:
        needed = f"{target[0]}x{target[1]}" if target[0] != target[1] else target[0]
        raise TooLarge(f"the picture is {width}x{height}, smaller than the {needed} pixels the encoder needs")
    box = (left * across, top * down, (left + target[0]) * across, (top + target[1]) * down)
    pixels = np.asarray(picture.resize(target, Image.Resampling(preprocessing.resample), box=box))
    # In memory each channel is a plane, as graphs take it: here on many threads, there on the one that runs batches.
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)


def _offset(margin: int, floors: bool) -> int:
    return margin // 2 if floors else round(margin / 2)


def decode_pixels(data: bytes, preprocessing: Preprocessing, limits: Limits) -> PixelArray:
    """Return the pixels (height, width, 3) of image bytes. Raises as `decode` and `to_pixels`."""
    return to_pixels(decode(data, preprocessing.decoded_side, limits), preprocessing)


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
    return _webp(picture, THUMBNAIL_SIDE)


def preview(data: bytes, side: int, limits: Limits) -> bytes:
    """Return a picture's file as a WebP file whose long side is at most `side`. Raises as `decode`."""
    return _webp(decode(data, side // _DRAFT_MARGIN, limits), side)


def _webp(picture: Image.Image, side: int) -> bytes:
    """Return a picture as a WebP file whose long side is at most `side`; a smaller picture keeps its size."""
    scale = min(1, side / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1.5)
    buffer = io.BytesIO()
    # Lossy compression would blur glyphs that are a few pixels wide.
    small.save(buffer, "WEBP", quality=85, method=2, lossless=max(small.size) <= 64)
    return buffer.getvalue()


def media_type(data: bytes) -> str:
    """Return the media type of a file that was decoded before, by its first bytes."""
    return f"image/{(format_of(data) or 'webp').lower()}"


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
        raise TooLarge(
            f"the picture is {width}x{height}; the limit is {limits.max_side} pixels a side (LOOKALIKE_MAX_SIDE)"
        )
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"the picture is {width}x{height}; the limit is {limits.max_pixels} pixels (LOOKALIKE_MAX_PIXELS)"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise TooLarge(
            f"the picture is {width}x{height}; the limit is {limits.max_aspect}:1 from side to side "
            "(LOOKALIKE_MAX_ASPECT)"
        )


def _upright(picture: Image.Image, stored: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF says, and nothing else: browsers do not read XMP for it.

    Pillow and libheif have turned a TIFF and a HEIF.
    """
    if stored.format not in ("TIFF", "HEIF") and "exif" in stored.info:
        exif = Image.Exif()
        # A picture with unreadable metadata is taken to be upright.
        with suppress(Exception):
            exif.load(stored.info["exif"])
            how = _TRANSPOSITIONS.get(exif.get(_ORIENTATION, 1))
            return picture if how is None else picture.transpose(how)
    return picture


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its header cannot be read"
    # Pillow's messages contain neither paths nor bytes of the client; of other exceptions only the class is shown.
    return str(error) if isinstance(error, OSError) and str(error) else type(error).__name__
