"""Every colour type, depth and kind of transparency → what a person sees, against a plain reference."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from service.encoding.colours import LARGE_PIXELS
from service.encoding.images import decode
from service.encoding.limits import OWN_FILES, Limits
from service.errors import UnsupportedFormat
from tests.conftest import encoded, scene

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
_DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
_CASES = [(kind, depth, hides) for kind, depths in _DEPTHS.items() for depth in depths for hides in (False, True)]


def png(values: np.ndarray, kind: int, depth: int, *chunks: bytes) -> bytes:
    """Return a PNG of values (H, W, C), with chunks before its pixels."""
    height, width, _ = values.shape
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(height, -1, 2), axis=-1)[..., -depth:]
    rows = np.packbits(bits.reshape(height, -1), axis=-1)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join((chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize(("kind", "depth", "hides"), _CASES)
def test_png_of_every_colour_type_depth_and_transparency(kind: int, depth: int, hides: bool) -> None:
    generator = np.random.default_rng(depth)
    most = 2**depth - 1
    values = generator.integers(0, most + 1, (24, 31, _CHANNELS[kind]))
    # Neighbours of the transparent colour, which differ in the last bit, stay visible.
    values[:8] = values[0, 0]
    values[4:8] ^= 1
    chunks = []
    if kind == PALETTE:
        colours = generator.integers(0, 256, (most + 1, 3))
        alphas = generator.integers(0, 256, most + 1) if hides else np.full(most + 1, 255)
        chunks.append(chunk(b"PLTE", colours.astype(np.uint8).tobytes()))
        chunks += [chunk(b"tRNS", alphas.astype(np.uint8).tobytes())] if hides else []
        colour, alpha = colours[values[..., 0]] / 255, alphas[values[..., 0]] / 255
    elif kind in (GREY_ALPHA, RGB_ALPHA):
        colour, alpha = values[..., :-1] / most, values[..., -1] / most if hides else np.ones(values.shape[:2])
        values[..., -1] = np.rint(alpha * most)
    else:
        colour, alpha = values / most, np.ones(values.shape[:2])
        if hides:
            # Bits above the picture's depth do not count.
            key = values[0, 0] | (0x100 if depth == 8 else 0)
            chunks.append(chunk(b"tRNS", key.astype(">u2").tobytes()))
            alpha = (values != values[0, 0]).any(-1).astype(float)
    expected = 255 * (colour * alpha[..., None] + 1 - alpha[..., None]) * np.ones(3)
    picture = np.asarray(decode(png(values, kind, depth, *chunks), 28, Limits()), float)
    assert np.abs(picture - expected).max() <= 2
    assert np.abs(picture - expected).mean() <= 0.6


def test_a_bmp_whose_alpha_is_0_everywhere_is_opaque() -> None:
    picture = scene()
    pixels = np.dstack([np.asarray(picture), np.zeros((48, 64), np.uint8)])
    assert decode(bmp(pixels), 28, Limits()).tobytes() == picture.tobytes()
    pixels[0, 0, 3] = 255
    assert decode(bmp(pixels), 28, Limits()).getpixel((9, 9)) == (255, 255, 255)
    pixels[..., 3] = 255
    assert decode(bmp(pixels), 28, Limits()).tobytes() == picture.tobytes()


def bmp(pixels: np.ndarray) -> bytes:
    """Return a 32-bit BMP of pixels (H, W, 4) whose header says that the fourth byte is alpha."""
    height, width, _ = pixels.shape
    masks = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII4I", 108, width, -height, 1, 32, 3, 0, 0, 0, 0, 0, *masks) + bytes(52)
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + len(header)) + header + pixels.tobytes()


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_tiff_of_every_mode_and_compression(mode: str, compression: str | None) -> None:
    picture = scene()
    stored = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    stored = stored if mode == "I;16" else picture.convert(mode)
    if compression == "jpeg" and mode not in ("L", "RGB"):
        pytest.skip("JPEG has no such mode")
    decoded = decode(encoded(stored, "TIFF", compression=compression), 28, Limits())
    wanted = picture.convert("L") if mode == "I;16" else stored
    assert np.abs(np.asarray(decoded, int) - np.asarray(wanted.convert("RGB"), int)).mean() < 4


def test_tiff_transparency_white_is_zero_and_what_is_refused() -> None:
    hidden = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "TIFF")
    assert decode(hidden, 28, Limits()).getpixel((0, 0)) == (255, 255, 255)
    for values in (np.full((8, 8), 20, np.uint8), np.full((8, 8), 20 * 257, np.uint16)):
        # Photometric interpretation 0: white is zero.
        data = bytearray(encoded(Image.fromarray(values), "TIFF"))
        place = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
        data[place : place + 2] = b"\0\0"
        assert decode(bytes(data), 28, Limits()).getpixel((0, 0)) == (235, 235, 235)
    for numbers in (np.zeros((8, 8), np.float32), np.zeros((8, 8), np.int32)):
        with pytest.raises(UnsupportedFormat, match="at most 16 bits"):
            decode(encoded(Image.fromarray(numbers), "TIFF"), 28, Limits())


@pytest.mark.slow("a picture of 60 megapixels is compressed and decoded three times")
def test_a_large_picture_comes_back_at_half_its_size() -> None:
    small = scene(100, 75)
    for mode in ("RGB", "RGBA", "L"):
        large = small.convert(mode).resize((9001, 6751), Image.Resampling.BICUBIC)
        assert large.width * large.height > LARGE_PIXELS
        picture = decode(encoded(large, compress_level=1), 28, OWN_FILES)
        assert picture.size == (4501, 3376)
        shown = np.asarray(picture.resize((100, 75), Image.Resampling.BOX), int)
        assert np.abs(shown - np.asarray(small.convert(mode).convert("RGB"), int)).mean() < 2
