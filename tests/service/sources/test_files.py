"""Folders, zips and tars of pictures: real files, whole and damaged."""

import io
import os
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import InvalidSource, UndecodablePicture
from service.sources import open_source
from service.sources.source import Entry, Source, slice_source
from tests.service.sources.test_source import PICTURE, write

Files = list[tuple[str, bytes]]
MANY = 20_000


def zipped(path: Path, files: Files, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: Files, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read_all(source: Source) -> list[Entry]:
    return [source.entry(position) for position in range(len(source))]


def held_bytes(open_it: Callable[[], Source]) -> tuple[float, Source]:
    """The memory that a source holds, in bytes a picture."""
    tracemalloc.start()
    try:
        source = open_it()
        return tracemalloc.get_traced_memory()[0] / len(source), source
    finally:
        tracemalloc.stop()


# Folders


def test_a_folder_with_labels(tmp_path: Path) -> None:
    write(tmp_path, "cat/2.png", "cat/deep/er/1.JPEG", "dog/3.webp")
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "dog" / ".hidden.png").write_bytes(PICTURE)
    source = open_source(str(tmp_path))
    assert list(source.ids) == ["cat/2.png", "cat/deep/er/1.JPEG", "dog/3.webp"]
    assert source.labels == ["cat", "cat", "dog"]
    assert source.entry(2) == ("dog/3.webp", PICTURE, "dog")
    assert source.blocks is None


def test_the_order_is_that_of_sorted_paths(tmp_path: Path) -> None:
    paths = ["a/1.png", "a-b/1.png", "a.png", "B.png", "a/10.png", "a/2.png", "é.png"]
    assert list(open_source(str(write(tmp_path, *paths))).ids) == sorted(paths)


def test_the_first_level_is_the_label_even_when_there_is_one(tmp_path: Path) -> None:
    assert open_source(str(write(tmp_path, "all/cat/1.png", "all/dog/2.png"))).labels == ["all", "all"]


def test_no_labels_when_a_picture_lies_outside_the_folders(tmp_path: Path) -> None:
    assert open_source(str(write(tmp_path, "cat/1.png", "2.png"))).labels is None


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png")
    write(tmp_path / "pictures", "0.png")
    (tmp_path / "pictures" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "circle").symlink_to(tmp_path / "pictures")
    assert list(open_source(str(tmp_path / "pictures")).ids) == ["0.png", "linked/1.png"]


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(PICTURE)
    source = open_source(str(tmp_path))
    assert source.entry(0) == ("caf\udce9.png", PICTURE, None)


def test_folders_without_a_picture(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"holds no picture; looked for \.jpg .* then for \.tar and \.parquet"):
        open_source(str(tmp_path))
    (tmp_path / "a.tar").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(InvalidSource, match=r"expected files of one kind, found a\.tar and b\.parquet"):
        open_source(str(tmp_path))


def test_a_folder_of_many_pictures_holds_little(tmp_path: Path) -> None:
    for label in range(20):
        folder = tmp_path / f"a_class_of_pictures_{label:02}"
        folder.mkdir()
        for n in range(MANY // 20):
            # With its folder's, the name has 45 characters.
            (folder / f"picture_{n:012}.jpg").touch()
    held, source = held_bytes(lambda: open_source(str(tmp_path)))
    assert len(source) == MANY
    assert held <= 60
    part, _ = held_bytes(lambda: slice_source(source, "[10%:90%]"))
    assert part <= 1


# Zips


def test_a_zip_reads_like_its_folder(tmp_path: Path) -> None:
    zipped(tmp_path / "set.zip", [(name, PICTURE) for name in ("top/b/2.png", "top/a/1.png", "top/readme.txt")])
    source = open_source(str(tmp_path / "set.zip"))
    assert list(source.ids) == ["top/a/1.png", "top/b/2.png"]
    assert source.labels == ["a", "b"]
    assert source.entry(0).data == PICTURE


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["top/1.png", "top/2.png"], ["top", "top"]),
        (["top/a/1.png", "other/b/2.png"], ["other", "top"]),
        (["top/a/1.png", "top/2.png"], ["top", "top"]),
        (["top/a/1.png", "2.png"], None),
    ],
)
def test_labels_of_a_zip(tmp_path: Path, paths: list[str], labels: list[str] | None) -> None:
    source = open_source(str(zipped(tmp_path / "set.zip", [(path, PICTURE) for path in paths])))
    assert source.labels == labels if labels else source.labels is None


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


def test_of_two_members_of_one_name_the_later_counts(tmp_path: Path) -> None:
    files = [("1.png", b"old"), ("2.png", b"other"), ("1.png", b"new")]
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(tmp_path / "set.zip", files)
    assert read_all(open_source(str(tmp_path / "set.zip"))) == [("1.png", b"new", None), ("2.png", b"other", None)]
    tarred(tmp_path / "set.tar", files)
    assert read_all(open_source(str(tmp_path / "set.tar"))) == [("2.png", b"other", None), ("1.png", b"new", None)]


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


def test_a_zip_of_many_pictures_holds_little(tmp_path: Path) -> None:
    zipped(tmp_path / "set.zip", [(f"class_{n % 300:016}/picture_{n:010}.jpg", b"") for n in range(MANY)])
    held, source = held_bytes(lambda: open_source(str(tmp_path / "set.zip")))
    assert len(source) == MANY
    assert held <= 100


# Tars


def test_a_tar_reads_in_its_own_order_with_labels_as_a_zip(tmp_path: Path) -> None:
    files = [("./top/b/2.png", PICTURE), ("./top/a/1.png", PICTURE[:-1]), ("./top/._1.png", b"mac"), ("./x.txt", b"")]
    source = open_source(str(tarred(tmp_path / "set.tar", files)))
    assert read_all(source) == [("top/b/2.png", PICTURE, "b"), ("top/a/1.png", PICTURE[:-1], "a")]
    assert source.blocks is None


def test_a_tar_of_long_and_foreign_names(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = ["d" * 90 + "/" + "f" * 90 + ".png", "é/ü.png", os.fsdecode(b"caf\xe9/1.png")]
        with tarfile.open(tmp_path / "set.tar", "w", format=form) as archive:
            for n, name in enumerate(names):
                member = tarfile.TarInfo(name)
                member.size = n + 1
                archive.addfile(member, io.BytesIO(bytes([n]) * (n + 1)))
        source = open_source(str(tmp_path / "set.tar"))
        assert [(id, data) for id, data, _ in read_all(source)] == [
            (name, bytes([n]) * (n + 1)) for n, name in enumerate(names)
        ]


def shards(root: Path, count: int = 3) -> Path:
    """WebDataset shards of two samples each: a picture, its class and a description."""
    for shard in range(count):
        tarred(
            root / f"train-{shard:03}.tar",
            [
                (f"{sample:06}.{ending}", data)
                for sample in (2 * shard, 2 * shard + 1)
                for ending, data in (("cls", b"%d\n" % (sample % 3)), ("json", b"{}"), ("jpg", b"picture %d" % sample))
            ],
        )
    return root


def test_webdataset_shards_by_pattern_and_by_folder(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    source = open_source(f"{tmp_path}/shards/train-{{000..002}}.tar")
    expected = [(f"train-{n // 2:03}/{n:06}.jpg", b"picture %d" % n, str(n % 3)) for n in range(6)]
    assert read_all(source) == expected
    assert read_all(open_source(f"{tmp_path}/shards")) == expected
    assert read_all(open_source(f"{tmp_path}/shards/train-{{001..002}}.tar[1:3]")) == expected[3:5]
    assert read_all(open_source(f"{tmp_path}/shards/train-001.tar")) == [
        (id.removeprefix("train-001/"), data, label) for id, data, label in expected[2:4]
    ]


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for part in (0, 1):
        tarred(tmp_path / f"part{part}" / "a.v1.tar", [("1.png", b"%d" % part)])
    expected = [("part0/a.v1/1.png", b"0", None), ("part1/a.v1/1.png", b"1", None)]
    assert read_all(open_source(str(tmp_path))) == expected
    assert read_all(open_source(f"{tmp_path}/part{{0..1}}/a.v1.tar")) == expected


@pytest.mark.parametrize("text", [None, b"", b" \n", b"x" * 1001])
def test_no_label_when_a_sample_has_none(tmp_path: Path, text: bytes | None) -> None:
    files = [("1.jpg", b"a"), ("1.cls", b"cat"), ("2.jpg", b"b")]
    source = open_source(str(tarred(tmp_path / "set.tar", files + ([] if text is None else [("2.cls", text)]))))
    assert source.labels is None
    whole = open_source(str(tarred(tmp_path / "whole.tar", [*files, ("2.cls", b"dog")])))
    assert whole.labels == ["cat", "dog"]


def test_a_label_may_stand_before_its_picture_and_serve_two(tmp_path: Path) -> None:
    files = [("a.v/1.cls", b"\xff"), ("a.v/1.left.jpg", b"a"), ("a.v/1.right.jpg", b"b")]
    source = open_source(str(tarred(tmp_path / "set.tar", files)))
    assert source.labels == ["\N{REPLACEMENT CHARACTER}"] * 2


def test_members_that_are_no_files_are_passed_over_and_hard_links_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, kind, target in [
            ("./a.png", tarfile.REGTYPE, ""),
            ("soft.png", tarfile.SYMTYPE, "a.png"),
            ("device.png", tarfile.CHRTYPE, ""),
            ("pipe.png", tarfile.FIFOTYPE, ""),
            ("folder.png", tarfile.DIRTYPE, ""),
            ("hard.png", tarfile.LNKTYPE, "./a.png"),
            ("lost.png", tarfile.LNKTYPE, "gone.png"),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = len(PICTURE) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(PICTURE))
    assert read_all(open_source(str(tmp_path / "set.tar"))) == [("a.png", PICTURE, None), ("hard.png", PICTURE, None)]


def test_a_sparse_picture_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        member = tarfile.TarInfo("holes.png")
        member.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(member)
    with pytest.raises(InvalidSource, match=r"set\.tar: holes\.png is stored as a sparse file"):
        open_source(str(tmp_path / "set.tar"))


@pytest.mark.parametrize(
    ("ending", "mode"), [("tar.gz", "w:gz"), ("TGZ", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")]
)
def test_compressed_tars_are_refused(tmp_path: Path, ending: str, mode: str) -> None:
    path = tarred(tmp_path / f"set.{ending}", [("1.png", PICTURE)], mode)
    with pytest.raises(InvalidSource, match=r"is a compressed tar; .* unpack it to \.tar"):
        open_source(str(path))
    path.rename(tmp_path / "set.tar")
    with pytest.raises(InvalidSource, match=r"set\.tar: cannot be read as an uncompressed \.tar"):
        open_source(str(tmp_path / "set.tar"))


def test_a_tar_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tarred(tmp_path / "set.tar", [(f"{n}.png", bytes(700)) for n in range(3)])
    data = path.read_bytes()
    # The empty blocks begin here.
    end = 3 * (512 + 1024)
    for length in [*range(0, end, 256), end + 511]:
        path.write_bytes(data[:length])
        with pytest.raises(InvalidSource, match=r"set\.tar: cannot be read as an uncompressed \.tar: ."):
            open_source(str(path))
    path.write_bytes(data[: end + 512])
    assert len(open_source(str(path))) == 3


def test_a_damaged_header_in_the_middle_of_a_tar_is_not_its_end(tmp_path: Path) -> None:
    path = tarred(tmp_path / "set.tar", [(f"{n}.png", bytes(700)) for n in range(3)])
    data = bytearray(path.read_bytes())
    data[1536 + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(InvalidSource, match="damaged at byte 1536"):
        open_source(str(path))


def test_a_negative_size_in_a_tar_is_no_endless_loop(tmp_path: Path) -> None:
    path = tarred(tmp_path / "set.tar", [("1.png", b""), ("2.png", b"")])
    data = bytearray(path.read_bytes())
    header = data[512:1024]
    # This size leads back to the first header.
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * ord(" ") + sum(header[156:]))
    data[512:1024] = header
    path.write_bytes(data)
    with pytest.raises(InvalidSource, match="cannot be read as an uncompressed"):
        open_source(str(path))


def test_a_tar_that_shrinks_later_is_an_error_of_its_picture(tmp_path: Path) -> None:
    path = tarred(tmp_path / "set.tar", [("1.png", PICTURE), ("2.png", PICTURE)])
    source = open_source(str(path))
    os.truncate(path, 512 + len(PICTURE))
    assert source.entry(0).data == PICTURE
    with pytest.raises(UndecodablePicture, match=f"cut short: expected {len(PICTURE)} bytes, got 0"):
        source.entry(1)
    path.unlink()
    with pytest.raises(UndecodablePicture, match="cannot be read"):
        source.entry(0)


def test_a_tar_without_a_picture(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"set\.tar: holds no picture; looked for \.jpg"):
        open_source(str(tarred(tmp_path / "set.tar", [("1.txt", b"")])))


def test_many_threads_read_a_tar_at_once(tmp_path: Path) -> None:
    files = [(f"{n:03}.png", bytes([n]) * (n * 50 + 1)) for n in range(200)]
    source = open_source(str(tarred(tmp_path / "set.tar", files)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(200))) == [data for _, data in files]


def test_a_tar_of_many_pictures_holds_little(tmp_path: Path) -> None:
    tarred(tmp_path / "set.tar", [(f"class_{n % 300:016}/picture_{n:010}.jpg", b"a") for n in range(MANY)])
    held, source = held_bytes(lambda: open_source(str(tmp_path / "set.tar")))
    assert len(source) == MANY
    assert held <= 80


# Patterns


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("train-{000..005}.tar", r"train-003\.tar is not there, nor are 2 others; the pattern names 6 files"),
        ("train-{002..003}.tar", r"train-003\.tar is not there; the pattern names 2 files"),
        ("valid-{000..009}.tar", r"none of its 10 files is there; looked for .*valid-000\.tar to .*valid-009\.tar"),
        ("train-{0..2}.tar", r"none of its 3 files is there; looked for .*train-0\.tar"),
        ("train-{002..000}.tar", r"names 0 files; expected 1 to 100000"),
        ("train-{0..99999999999}.tar", r"names 100000000000 files; expected 1 to 100000"),
        ("train-{a,b}.tar", r"no such source; expected .* several as in train-\{000\.\.009\}\.tar"),
    ],
)
def test_patterns_that_name_what_is_not_there(tmp_path: Path, pattern: str, says: str) -> None:
    shards(tmp_path)
    with pytest.raises(InvalidSource, match=says):
        open_source(f"{tmp_path}/{pattern}")


def test_the_numbers_of_a_pattern(tmp_path: Path) -> None:
    for n in (8, 9, 10):
        tarred(tmp_path / f"{n}.tar", [("1.png", b"a")])
        tarred(tmp_path / f"{n:02}.tar", [("1.png", b"a")])
    assert list(open_source(f"{tmp_path}/{{8..10}}.tar").ids) == ["8/1.png", "9/1.png", "10/1.png"]
    assert list(open_source(f"{tmp_path}/{{08..10}}.tar").ids) == ["08/1.png", "09/1.png", "10/1.png"]
    tarred(tmp_path / "{0..3}.tar", [("mine.png", b"a")])
    assert list(open_source(f"{tmp_path}/{{0..3}}.tar").ids) == ["mine.png"]


@pytest.mark.parametrize("pack", [zipped, tarred])
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), cut=st.floats(0.5, 1))
def test_damage_is_named_and_never_a_traceback(
    tmp_path: Path, pack: Callable[[Path, Files], Path], damage: list[tuple[float, int]], cut: float
) -> None:
    suffix = ".zip" if pack is zipped else ".tar"
    path = pack(tmp_path / f"set{suffix}", [(f"a/{n}.png", bytes(range(100))) for n in range(3)])
    data = bytearray(path.read_bytes())
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    path.write_bytes(data[: int(cut * len(data))])
    try:
        source = open_source(str(path))
    except InvalidSource:
        return
    for position in range(len(source)):
        try:
            source.entry(position)
        except UndecodablePicture as error:
            assert str(error).startswith("cannot be read: ")
