"""What a file is, by its name and its first bytes."""

import io
from pathlib import Path

import pytest

from service.encoding.images import SUFFIXES
from service.sources import open_source
from service.sources.kinds import content_format, judge
from tests.conftest import scene
from tests.service.sources.test_source import PICTURE


def start(format: str) -> bytes:
    """The first bytes of a picture in a format."""
    buffer = io.BytesIO()
    scene().convert("RGB").save(buffer, format)
    return buffer.getvalue()[:64]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_the_content_of_a_picture_tells_its_format(format: str) -> None:
    assert content_format(start(format)) == format


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp41mp42", None),
        (b"BM is how this letter begins", None),
        (b"GIF is a format", None),
        (b"", None),
    ],
)
def test_boxes_and_texts(data: bytes, format: str | None) -> None:
    assert content_format(data) == format


@pytest.mark.parametrize(
    "name", ["A.JPG", "b.jfif", "c.jpe", "d.JPEG", "e.dib", "f", "g.jpg_large", "h.jpg~", "i.1", "Mr. and Mrs. Smith"]
)
def test_pictures_of_odd_endings_and_of_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PICTURE)
    source = open_source(str(tmp_path))
    assert source.entry(0) == (name, PICTURE, None)
    assert not source.left_out


@pytest.mark.parametrize("name", ["a.jp2", "b.psd", "c.jxl"])
def test_a_wrong_ending_does_not_hide_a_picture(name: str) -> None:
    assert judge(name, lambda: start("JPEG")) is None


@pytest.mark.parametrize(
    ("name", "data", "reason", "lost"),
    [
        ("a.jxl", b"", "JPEG XL, which is not read: convert it to JPEG or PNG", True),
        ("a", b"8BPS", "PSD, which is not read: convert it to JPEG or PNG", True),
        ("a.CR2", start("TIFF"), "camera RAW, which is not read: convert it to JPEG or PNG", True),
        ("in/a.zip", b"PK", "an archive inside (.zip): open it by itself", True),
        ("a.txt", PICTURE, "not a picture: .txt", False),
        ("a.mp4", b"", "not a picture: .mp4", False),
        ("README", b"words", "not a picture: no ending", False),
        ("a.an ending of many words", b"", "not a picture: no ending", False),
        (".a.jpg", PICTURE, "hidden", False),
        ("in/.b/a.jpg", PICTURE, "hidden", False),
    ],
)
def test_what_is_left_out(name: str, data: bytes, reason: str, lost: bool) -> None:
    assert judge(name, lambda: data) == (name, reason, lost)


def test_an_odd_file_that_cannot_be_read_may_have_been_a_picture() -> None:
    def refuse() -> bytes:
        raise PermissionError(13, "Permission denied")

    assert judge("a", refuse) == ("a", "unreadable: Permission denied", True)


def test_every_ending_of_the_decoder_is_one_of_a_picture() -> None:
    for ending in SUFFIXES:
        assert judge(f"a{ending}", lambda: b"") is None
