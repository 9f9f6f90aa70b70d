"""Colour profiles: pixels as a viewer shows them, and nothing changed where there is nothing to change."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from service.encoding.images import decode
from service.encoding.limits import Limits
from tests.conftest import encoded, scene
from tests.service.encoding.test_colours import chunk

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Red, green and blue as ICC profiles give them: XYZ under the light D50.
PRIMARIES = {
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
    "ProPhoto": ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03135, 0.00009, 0.82491)),
    "sRGB": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)),
}
GAMMAS = {"Adobe RGB": 563 / 256, "Display P3": 2.2, "ProPhoto": 1.8, "sRGB": 2.2}


def profile(name: str, kind: bytes = b"RGB ") -> bytes:
    """Return a small ICC profile of primaries and a gamma, written here byte by byte."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(GAMMAS[name] * 256)) + bytes(2)
    tags = [(b"desc", b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79))]
    tags += [(b"wtpt", b"XYZ " + bytes(4) + b"".join(map(number, (0.9642, 1.0, 0.8249))))]
    if kind == b"GRAY":
        tags.append((b"kTRC", curve))
    else:
        for letter, column in zip(b"rgb", PRIMARIES[name], strict=True):
            tags.append((bytes([letter]) + b"XYZ", b"XYZ " + bytes(4) + b"".join(map(number, column))))
            tags.append((bytes([letter]) + b"TRC", curve))
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags:
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    light = b"".join(map(number, (0.9642, 1.0, 0.8249)))
    head = bytes(4) + b"lcms" + struct.pack(">I", 0x02400000) + b"mntr" + kind + b"XYZ " + bytes(12) + b"acsp"
    whole = head.ljust(68, b"\0") + light + bytes(48) + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def shown(pixels: np.ndarray, name: str) -> np.ndarray:
    """Return the sRGB of pixels of a profile, by its definition."""
    linear = (pixels / 255) ** GAMMAS[name] @ np.array(PRIMARIES[name]) @ np.linalg.inv(PRIMARIES["sRGB"])
    linear = linear.clip(0, 1)
    curved: np.ndarray = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curved


@pytest.mark.parametrize("name", ["Adobe RGB", "Display P3", "ProPhoto"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pixels_are_those_of_a_viewer(format: str, name: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format in ("JPEG", "AVIF") else {}
    plain = np.asarray(decode(encoded(scene(), format, **options), 28, Limits()), float)
    managed = np.asarray(decode(encoded(scene(), format, icc_profile=profile(name), **options), 28, Limits()), float)
    assert np.abs(managed - shown(plain, name)).mean() < 1
    assert np.abs(managed - plain).mean() > 3


def test_transparency_grey_and_16_bits() -> None:
    see_through = scene().convert("RGBA")
    see_through.putalpha(128)
    data = encoded(see_through, icc_profile=profile("ProPhoto"))
    expected = shown(np.asarray(scene(), float), "ProPhoto") * 128 / 255 + 127
    assert np.abs(np.asarray(decode(data, 28, Limits()), float) - expected).mean() < 1
    grey = np.full((8, 8), 100, np.uint8)
    wide = encoded(Image.fromarray(grey.astype(np.uint16) * 257), icc_profile=profile("ProPhoto", b"GRAY"))
    for data in (wide, encoded(Image.fromarray(grey), icc_profile=profile("ProPhoto", b"GRAY"))):
        pixel = np.asarray(decode(data, 28, Limits()), float)[0, 0]
        assert np.abs(pixel - shown(np.full(3, 100.0), "ProPhoto")).max() <= 2


@pytest.mark.parametrize(
    "unused",
    [SRGB, profile("Adobe RGB", b"GRAY"), b"no profile", profile("ProPhoto")[:200], profile("ProPhoto") + b"mpet"],
)
def test_what_changes_nothing(unused: bytes) -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        plain, tagged = (
            decode(encoded(scene(), format, **more), 28, Limits()) for more in ({}, {"icc_profile": unused})
        )
        assert plain.tobytes() == tagged.tobytes(), format


def test_a_png_profile_may_be_wrapped_by_hand() -> None:
    data = encoded(scene())
    wrapped = chunk(b"iCCP", b"wide\0\0" + zlib.compress(profile("ProPhoto")))
    named = decode(encoded(scene(), icc_profile=profile("ProPhoto")), 28, Limits())
    assert decode(data[:33] + wrapped + data[33:], 28, Limits()).tobytes() == named.tobytes()
    assert Image.open(io.BytesIO(data)).size == named.size
