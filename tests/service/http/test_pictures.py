"""Pictures that are cut short, and odd ones that are accepted."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.conftest import encoded, scene
from tests.service.http.rows import PICTURE, assert_refused, embedding


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def gif_of_many_frames(first: bytes, more: int) -> bytes:
    """A GIF with the first frame of this one and more frames whose codes cannot be decoded."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 64, 48, 0) + b"\x02\x04\xff\xff\xff\xff\x00"
    assert first.endswith(b"\x3b")
    return first[:-1] + frame * more + b"\x3b"


class Cut(NamedTuple):
    """A file with trailing bytes behind its picture, and the offsets of its parts."""

    data: bytes
    # The format is recognised from this many bytes on.
    begins: int
    # The picture is complete from this many bytes on.
    ends: int


def cuts() -> dict[str, Cut]:
    """One file of each format.

    A JPEG and a BMP have any bytes behind the picture, a PNG and a GIF a comment. A WebP declares its length at its
    beginning, so no shorter part of it is whole.
    """
    picture = scene(96, 96)
    jpeg, bmp, webp = encoded(picture, "JPEG"), encoded(picture, "BMP"), encoded(picture, "WEBP")
    png, gif = encoded(picture), encoded(picture, "GIF")
    comment = b"\x21\xfe" + b"\xc8" + b"c" * 200 + b"\0"
    return {
        "JPEG": Cut(jpeg + b"j" * 300, 3, len(jpeg)),
        "PNG": Cut(png[:-12] + png_chunk(b"tEXt", b"Comment\0" + b"c" * 1000) + png[-12:], 6, len(png) - 12),
        "WEBP": Cut(webp, 12, len(webp)),
        "GIF": Cut(gif[:-1] + comment * 5 + gif[-1:], 4, len(gif) - 1),
        "BMP": Cut(bmp + b"b" * 4000, 2, len(bmp)),
    }


@pytest.mark.parametrize("point", range(20))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_cut_short(client: TestClient, format: str, point: int) -> None:
    data, begins, ends = cuts()[format]
    last = len(data) - 1
    lengths = [0, 1, begins, *(begins + (last - begins) * step // 17 for step in range(1, 18))]
    length = lengths[point]
    answer = client.post("/embed", content=data[:length])
    if not length:
        assert_refused(answer, 400, "empty_picture")
    elif length < begins:
        assert_refused(answer, 415, "unsupported_format", data[:length])
    elif length < ends or (format == "PNG" and answer.status_code == 422):
        assert_refused(answer, 422, "undecodable_picture", data[:length])
    else:
        assert np.array_equal(embedding(answer), embedding(client.post("/embed", content=data)))


def with_exif(picture: Image.Image, exif: Image.Exif | bytes) -> bytes:
    return encoded(picture, "JPEG", exif=exif, quality=95)


def transparent_palette() -> bytes:
    picture = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    return encoded(picture, transparency=3)


def textual_bomb(kind: bytes = b"zTXt", head: bytes = b"Comment\0\0") -> bytes:
    """A PNG with a text that unpacks to 50 MB."""
    return PICTURE[:33] + png_chunk(kind, head + zlib.compress(b"\0" * 50_000_000, 9)) + PICTURE[33:]


TIFF_HEAD = b"Exif\0\0MM\0*\0\0\0\x08"
TAKEN = {
    "JPEG said to be a PNG": (encoded(scene(), "JPEG"), "image/png"),
    "PNG said to be a JPEG": (PICTURE, "image/jpeg"),
    "PNG said to be image/jpg": (PICTURE, "image/jpg"),
    "PNG said to be a form of curl": (PICTURE, "application/x-www-form-urlencoded"),
    "type with parameters in capitals": (PICTURE, "IMAGE/PNG; charset=utf-8"),
    "1 x 1": (encoded(scene(1, 1)), ""),
    "2 x 200": (encoded(scene(2, 200)), ""),
    "16-bit grey": (encoded(Image.fromarray(np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16))), ""),
    "1-bit": (encoded(scene().convert("1")), ""),
    "CMYK JPEG": (encoded(scene().convert("CMYK"), "JPEG"), ""),
    "YCbCr JPEG": (encoded(scene().convert("YCbCr"), "JPEG"), ""),
    "progressive JPEG": (encoded(scene(), "JPEG", progressive=True), ""),
    "LA PNG": (encoded(scene().convert("LA")), ""),
    "P PNG with transparency": (transparent_palette(), ""),
    "EXIF of no sense": (with_exif(scene(), b"Exif\0\0 this is no sense"), ""),
    "EXIF with an orientation of 42": (
        with_exif(scene(), TIFF_HEAD + b"\0\x01\x01\x12\0\x03\0\0\0\x01\0*" + b"\0" * 6),
        "",
    ),
    "EXIF with an endless loop": (
        with_exif(scene(), TIFF_HEAD + b"\0\x01\x87\x69\0\x04\0\0\0\x01" + b"\0\0\0\x08" * 2),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_taken(client: TestClient, name: str) -> None:
    data, kind = TAKEN[name]
    embedding(client.post("/embed", content=data, headers={"content-type": kind} if kind else {}))


def test_of_ten_thousand_frames_only_the_first_is_decoded(client: TestClient) -> None:
    """The other frames cannot be decoded, so decoding them would answer 422."""
    single = encoded(scene(), "GIF")
    many = gif_of_many_frames(single, 9_999)
    # Any exception of Pillow's will do.
    with Image.open(io.BytesIO(many)) as opened, pytest.raises(Exception):  # noqa: B017
        opened.seek(1)
        opened.load()
    expected, got = (embedding(client.post("/embed", content=data)) for data in (single, many))
    assert np.array_equal(got, expected)


def test_eight_orientations_of_one_picture_are_one_picture(client: TestClient) -> None:
    upright = scene(64, 64)
    # Each transposition is the inverse of the one that EXIF prescribes.
    stored_by = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    expected = embedding(client.post("/embed", content=with_exif(upright, b"")))
    for orientation, transposition in stored_by.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if transposition is None else upright.transpose(Image.Transpose(transposition))
        turned = embedding(client.post("/embed", content=with_exif(stored, exif)))
        assert np.abs(turned - expected).max() < 2e-3, orientation
        if transposition is not None:
            as_it_lies = embedding(client.post("/embed", content=with_exif(stored, b"")))
            assert np.abs(as_it_lies - expected).max() > 1e-2, orientation


@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"Name\0\0")]
)
def test_a_text_that_unpacks_to_much_is_not_unpacked(client: TestClient, kind: bytes, head: bytes) -> None:
    data = textual_bomb(kind, head)
    answer = client.post("/embed", content=data)
    if answer.status_code != 200:
        assert_refused(answer, 422, "undecodable_picture", data)
