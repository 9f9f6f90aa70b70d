"""Zips of pictures: real files, whole and damaged."""

import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.errors import InvalidSource, UndecodablePicture
from service.sources import open_source
from tests.service.sources.test_files import MANY, held_bytes, read_all, zipped
from tests.service.sources.test_source import PICTURE


def test_a_zip_reads_like_its_folder(tmp_path: Path) -> None:
    zipped(tmp_path / "set.zip", [(name, PICTURE) for name in ("top/b/2.png", "top/a/1.png", "top/readme.txt")])
    source = open_source(str(tmp_path / "set.zip"))
    assert list(source.ids) == ["top/a/1.png", "top/b/2.png"]
    assert source.labels == ["a", "b"]
    assert source.entry(0).data == PICTURE


def renamed(path: Path, change: Callable[[zipfile.ZipInfo], None], names: list[str]) -> Path:
    """A zip whose members' headers are changed before they are written."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            member = zipfile.ZipInfo(name)
            change(member)
            archive.writestr(member, PICTURE)
    return path


def test_names_in_utf8_without_the_flag_for_it(tmp_path: Path) -> None:
    names = [unicodedata.normalize("NFD", name) for name in ("Müller/Café.png", "__MACOSX/Müller/._Café.png")]
    path = zipped(tmp_path / "set.zip", [(name, PICTURE) for name in names])
    data = bytearray(path.read_bytes())
    # The flag lies at other places in a member's own header and in the directory.
    for mark, place in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            assert data[at + place] == 0x08
            data[at + place] = 0
    path.write_bytes(data)
    source = open_source(str(path))
    assert read_all(source) == [("Müller/Café.png", PICTURE, "Müller")]
    assert [(one.reason, one.lost) for one in source.left_out] == [("hidden", False)]


def test_names_in_another_code_stay_as_they_are_unpacked_by_others(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", [("caf_.png", PICTURE)])
    path.write_bytes(path.read_bytes().replace(b"caf_.png", b"caf\x82.png"))
    assert list(open_source(str(path)).ids) == ["café.png"]


@pytest.mark.parametrize(
    ("system", "names", "ids"),
    [
        (0, ["cat\\1.png", "dog\\2.png"], ["cat/1.png", "dog/2.png"]),
        (3, ["cat\\1.png", "dog\\2.png"], ["cat/1.png", "dog/2.png"]),
        (3, ["cat/1\\2.png"], ["cat/1\\2.png"]),
    ],
)
def test_backslashes_between_folders(tmp_path: Path, system: int, names: list[str], ids: list[str]) -> None:
    def pack_as(member: zipfile.ZipInfo) -> None:
        member.create_system = system

    assert list(open_source(str(renamed(tmp_path / "set.zip", pack_as, names))).ids) == ids


@pytest.mark.parametrize(("raw", "id"), [(b"caf_.png", "café.png"), (b"other.png", "caf_.png")])
def test_the_unicode_path_field_counts_for_its_own_name_alone(tmp_path: Path, raw: bytes, id: str) -> None:
    def add_field(member: zipfile.ZipInfo) -> None:
        text = struct.pack("<BL", 1, zlib.crc32(raw)) + "café.png".encode()
        member.extra = struct.pack("<HH", 0x7075, len(text)) + text

    assert list(open_source(str(renamed(tmp_path / "set.zip", add_field, ["caf_.png"]))).ids) == [id]


def test_what_a_zip_holds_beside_its_pictures_is_named(tmp_path: Path) -> None:
    files = [
        ("a/1.jfif", PICTURE),
        ("a/2", PICTURE),
        ("a/3.jxl", b""),
        ("x.txt", b""),
        ("in.zip", b""),
        ("4", b"x"),
    ]
    source = open_source(str(zipped(tmp_path / "set.zip", files, zipfile.ZIP_DEFLATED)))
    assert read_all(source) == [("a/1.jfif", PICTURE, "a"), ("a/2", PICTURE, "a")]
    assert list(source.left_out) == [
        ("a/3.jxl", "JPEG XL, which is not read: convert it to JPEG or PNG", True),
        ("x.txt", "not a picture: .txt", False),
        ("in.zip", "an archive inside (.zip): open it by itself", True),
        ("4", "not a picture: no ending", False),
    ]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_of_a_zip_is_read_by_many_threads_at_once(tmp_path: Path, method: int) -> None:
    files = [(f"{n:03}.png", PICTURE + bytes([n]) * n * 50) for n in range(200)]
    source = open_source(str(zipped(tmp_path / "set.zip", files, method)))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(source.read, range(200))) == [data for _, data in files]


def test_a_zip_behind_other_bytes_is_read(tmp_path: Path) -> None:
    zipped(tmp_path / "bare.zip", [("1.png", PICTURE)])
    (tmp_path / "unpacks_itself.zip").write_bytes(b"#!/bin/sh\n" + (tmp_path / "bare.zip").read_bytes())
    assert open_source(str(tmp_path / "unpacks_itself.zip")).entry(0).data == PICTURE


def test_a_damaged_member_of_a_zip_is_its_own_error(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", [("1.png", PICTURE), ("2.png", PICTURE), ("3.png", PICTURE)])
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    second = data.index(b"PK\3\4", 100)
    data[second : second + 2] = b"KP"
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(UndecodablePicture, match="cannot be read: Bad CRC-32"):
        source.entry(0)
    with pytest.raises(UndecodablePicture, match="cannot be read: its place in the archive holds something else"):
        source.entry(1)
    assert source.entry(2).data == PICTURE


def test_zips_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(InvalidSource, match=r"no\.zip: not a zip file"):
        open_source(str(tmp_path / "no.zip"))
    zipped(tmp_path / "empty.zip", [])
    with pytest.raises(InvalidSource, match="holds no picture"):
        open_source(str(tmp_path / "empty.zip"))
    locked = bytearray(zipped(tmp_path / "locked.zip", [("1.png", PICTURE)]).read_bytes())
    # This flag marks a member as encrypted.
    locked[locked.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(InvalidSource, match="is encrypted"):
        open_source(str(tmp_path / "locked.zip"))


@pytest.mark.slow("writes and lists an archive of many pictures")
def test_a_zip_of_many_pictures_holds_little(tmp_path: Path) -> None:
    zipped(tmp_path / "set.zip", [(f"class_{n % 300:016}/picture_{n:010}.jpg", b"") for n in range(MANY)])
    held, source = held_bytes(lambda: open_source(str(tmp_path / "set.zip")))
    assert len(source) == MANY
    assert held <= 100
