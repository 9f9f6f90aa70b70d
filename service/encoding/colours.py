"""A decoded picture of any mode → RGB as a person sees it: 8 bits, with white behind what is transparent."""

import io

import numpy as np
from PIL import Image

from service.errors import UnsupportedFormat

# A picture of more pixels comes back at half its size, as a JPEG's draft does, so that no step needs much more memory
# than the decoded picture.
LARGE_PIXELS = 50_000_000

# Pictures are converted in bands of so many pixels.
_BAND_PIXELS = 8_000_000
_MODES = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"))
# The TIFF tag that says whether 0 is black or white. Pillow heeds it for up to 8 bits.
_PHOTOMETRIC = 262


def raw_mode(picture: Image.Image) -> str:
    """Return how a picture that is not loaded yet is stored, in Pillow's terms: "L;4" is grey of 4 bits.

    Raises:
        UnsupportedFormat: viewers do not agree on how to show it: floating point, 32 bits, Lab.
    """
    raw = picture.tile[0].args if picture.tile else picture.mode  # type: ignore[attr-defined]
    raw = str(raw[0] if isinstance(raw, tuple) else raw)
    if picture.mode not in _MODES and not raw.startswith("I;16"):
        raise UnsupportedFormat(
            f"not a picture that we take: a {picture.format} whose pixels are stored as {raw}; "
            "expected grey, RGB or CMYK of at most 16 bits"
        )
    return raw


def to_rgb(picture: Image.Image, raw: str, data: bytes) -> Image.Image:
    """Return a loaded picture as RGB.

    Args:
        picture: of any mode that `raw_mode` accepts.
        raw: what `raw_mode` returned.
        data: the picture's file.

    Returns:
        The picture itself if it is plain RGB. One of more than LARGE_PIXELS has half its size.
    """
    width, height = picture.size
    half = 2 if width * height > LARGE_PIXELS else 1
    key = _transparent_colour(picture, raw)
    if picture.mode == "RGB" and key is None and half == 1:
        return picture
    # In many BMPs the fourth byte is unused and 0 everywhere.
    opaque = picture.format == "BMP" and picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (0, 0)
    low = _low_bytes(data) if raw == "RGB;16B" and key is not None else None
    white_is_zero = raw.startswith("I;16") and getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    rows = max(2, _BAND_PIXELS // width // 2 * 2)
    whole = None if rows >= height and half == 1 else Image.new("RGB", (-(-width // half), -(-height // half)))
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        band = picture if whole is None else picture.crop(box)
        if raw.startswith("I;16"):
            band = _eight_bits(band, key, white_is_zero)
        elif low is not None:
            band = _white_where(band, low.crop(box), key)
        elif band.has_transparency_data and not opaque:
            visible = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible)
        band = band if band.mode == "RGB" else band.convert("RGB")
        if whole is None:
            return band
        whole.paste(band.reduce(half) if half > 1 else band, (0, top // half))
    assert whole is not None
    return whole


def _transparent_colour(picture: Image.Image, raw: str) -> object:
    """Return the transparent colour that a picture names, if any, and correct it for Pillow.

    A PNG names it with as many bits as its pixels are stored with; bits above them do not count.
    """
    key = picture.info.get("transparency")
    if picture.format != "PNG" or key is None:
        return key
    if picture.mode == "L":
        most = {"L;2": 3, "L;4": 15}.get(raw, 255)
        key = picture.info["transparency"] = (key & most) * (255 // most)
    elif picture.mode == "RGB" and raw != "RGB;16B":
        key = picture.info["transparency"] = tuple(value & 255 for value in key)
    return key


def _eight_bits(grey: Image.Image, key: object, white_is_zero: bool) -> Image.Image:
    """Scale 16-bit grey to 8 bits; convert() would clip it."""
    values = np.asarray(grey)
    scaled = np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8)
    if white_is_zero:
        scaled = 255 - scaled
    if isinstance(key, int):
        scaled[values == key] = 255
    return Image.fromarray(scaled)


def _low_bytes(data: bytes) -> Image.Image:
    """Return the lower bytes of a 16-bit RGB PNG, of which Pillow returns the upper ones."""
    low = Image.open(io.BytesIO(data), formats=("PNG",))
    # Read as if the lower byte came first, the bytes that Pillow takes for the upper ones are the lower ones.
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
    low.load()
    return low


def _white_where(high: Image.Image, low: Image.Image, key: object) -> Image.Image:
    """Return the upper bytes of 16-bit RGB with white where the 16 bits are those of the transparent colour."""
    pixels = np.array(high)
    colour = np.array(key)
    pixels[((pixels == colour >> 8) & (np.asarray(low) == colour & 255)).all(-1)] = 255
    return Image.fromarray(pixels)
