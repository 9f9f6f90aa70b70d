"""Files with more or less than their picture needs: decoded as browsers do, with bounded work."""

import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.encoding.containers import needed_parts
from service.encoding.images import decode
from service.encoding.limits import Limits
from service.errors import LookalikeError, TooLarge, UndecodablePicture
from tests.conftest import encoded, scene
from tests.service.encoding.test_colours import chunk

LIMITS = Limits()
JPEGS = {
    "baseline": encoded(scene(200, 150), "JPEG"),
    "progressive": encoded(scene(200, 150), "JPEG", progressive=True),
    "restarts": encoded(scene(200, 150), "JPEG", restart_marker_blocks=3),
    "grey": encoded(scene(200, 150).convert("L"), "JPEG"),
}


def same(data: bytes, picture: Image.Image) -> bool:
    return decode(data, 28, LIMITS).tobytes() == picture.tobytes()


def test_png_parts_that_no_picture_needs() -> None:
    picture = scene()
    data = encoded(picture)
    head, rest, body = data[:33], data[33:], b"Author\0\0" + zlib.compress(bytes(5_000_000))
    wrong = bytearray(chunk(b"gAMA", struct.pack(">I", 45455)))
    wrong[-1] ^= 1
    hidden = bytearray(chunk(b"tRNS", bytes(6)))
    hidden[-1] ^= 1
    text = PngInfo()
    text.add_text("Comment", "x" * 3_000_000)
    for whole in (
        head + chunk(b"zTXt", body) + rest,
        encoded(picture, pnginfo=text),
        head + chunk(b"iCCP", b"large\0\0" + zlib.compress(bytes(3_000_000))) + rest,
        head + chunk(b"iCCP", b"broken\0\0 no zlib") + rest,
        head + bytes(wrong) + bytes(hidden) + rest,
        data + bytes(2_000_000),
        data + b"\xff\xd8 something else" + encoded(picture),
    ):
        assert same(whole, picture)


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_with_something_behind_its_end(kind: str) -> None:
    data = JPEGS[kind]
    picture = decode(data, 28, LIMITS)
    for more in (
        bytes(3_000_000),
        b"\xff" * 3_000_000,
        b"\xff\xda" * 500,
        b"\0\0\0\x18ftypmp42" + b"\xff\xda\0" * 999,
        data,
    ):
        assert same(data + more, picture)


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_that_lacks_only_its_end_mark(kind: str) -> None:
    data = JPEGS[kind]
    picture = decode(data, 28, LIMITS)
    assert same(data[:-2], picture)
    assert same(data[:-1], picture)
    for cut in range(4, len(data) - 700, 29):
        with pytest.raises(LookalikeError):
            decode(data[:-cut], 200, LIMITS)


def test_work_stays_bounded() -> None:
    data = JPEGS["progressive"]
    for stray in (b"\xff" * 600_000, bytes(600_000), b"\xff\0" * 300_000):
        with pytest.raises(TooLarge, match="500000 fill bytes"):
            decode(data[:20] + stray + data[20:], 28, LIMITS)
    for order, magic, counter in (("<", b"II*\0", "IH"), (">", b"MM\0*", "IH"), ("<", b"II+\0\x08\0\0\0", "QQ")):
        start = 16 if counter == "QQ" else 8
        tags = magic + struct.pack(order + counter, start, 1_001) + bytes(30_000)
        with pytest.raises(TooLarge, match="more than 1000 tags"):
            decode(tags, 28, LIMITS)
        # A TIFF is decoded in a child process, which a proof of the guard cannot reach.
        with pytest.raises(TooLarge, match="more than 1000 tags"):
            needed_parts(tags, "TIFF")
    with pytest.raises(UndecodablePicture):
        decode(encoded(scene())[:-40], 28, LIMITS)
