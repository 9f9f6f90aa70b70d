"""Tars of pictures and WebDataset shards: real files, whole and damaged."""

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.errors import InvalidSource, UndecodablePicture
from service.sources import open_source
from tests.service.sources.test_files import MANY, held_bytes, read_all, shards, tarred
from tests.service.sources.test_source import PICTURE


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
def test_a_sample_without_a_label_has_none_and_the_others_keep_theirs(tmp_path: Path, text: bytes | None) -> None:
    files = [("a/1.jpg", b"a"), ("a/1.cls", b"cat"), ("a/2.jpg", b"b")]
    source = open_source(str(tarred(tmp_path / "set.tar", files + ([] if text is None else [("a/2.cls", text)]))))
    assert source.labels == ["cat", None]
    whole = open_source(str(tarred(tmp_path / "whole.tar", [*files, ("a/2.cls", b"\xef\xbb\xbfMu\xcc\x88ller\r\n")])))
    assert whole.labels == ["cat", "Müller"]


def test_a_name_with_dots_has_the_label_of_its_own_class_file(tmp_path: Path) -> None:
    files = [
        (f"a.v/shot.2024.{n}.{ending}", data) for n in range(3) for ending, data in (("jpg", b"a"), ("cls", b"%d" % n))
    ]
    source = open_source(str(tarred(tmp_path / "set.tar", [*files, ("a.v/shot.2025.jpg", b"b")])))
    assert list(source.ids) == [*(f"a.v/shot.2024.{n}.jpg" for n in range(3)), "a.v/shot.2025.jpg"]
    assert source.labels == ["0", "1", "2", None]
    assert not source.left_out


def sampled(path: Path, *keys: str, beside: bool = True) -> Path:
    """A .tar of two samples with a picture under each key, and a class or nothing beside them."""
    files = [(f"{n}.{key}", f"{n}.{key}".encode()) for n in range(2) for key in (*keys, *(["cls"] if beside else []))]
    return tarred(path, files)


@pytest.mark.parametrize(
    ("keys", "beside", "image_key", "taken"),
    [
        (["input.jpg", "mask.png"], True, None, ["input.jpg"]),
        (["mask.png", "input.jpg"], False, None, ["input.jpg"]),
        (["mask.png", "view.jpg"], True, None, ["view.jpg"]),
        (["left.jpg", "right.jpg"], True, None, ["left.jpg"]),
        (["jpg", "seg.png"], True, None, ["jpg"]),
        (["input.jpg", "mask.png"], True, "mask.png", ["mask.png"]),
        (["input.jpg", "mask.png"], True, "Mask", ["mask.png"]),
        (["0.jpg", "1.jpg"], True, None, ["0.jpg", "1.jpg"]),
        (["0.jpg", "1.jpg"], True, "1.jpg", ["1.jpg"]),
        (["jpg", "png"], False, None, ["jpg", "png"]),
        (["jpg"], True, None, ["jpg"]),
    ],
)
def test_of_several_pictures_in_a_sample_one_is_taken_and_named(
    tmp_path: Path, keys: list[str], beside: bool, image_key: str | None, taken: list[str]
) -> None:
    path = sampled(tmp_path / "set.tar", *keys, beside=beside)
    source = open_source(str(path), image_key=image_key)
    assert list(source.ids) == [f"{n}.{key}" for n in range(2) for key in taken]
    assert source.labels == [f"{n}.cls" for n in range(2) for _ in taken] if beside else source.labels is None
    others = [key for key in keys if key not in taken]
    assert [one.name for one in source.left_out] == [f"{n}.{key}" for n in range(2) for key in others]
    assert not any(one.lost for one in source.left_out)
    said = f"of the pictures in each sample, {taken[0]} is taken, and {', '.join(others)} left out: --image-key chooses"
    assert list(source.notes) == ([said] if others else [])


def test_a_key_that_no_sample_has(tmp_path: Path) -> None:
    path = sampled(tmp_path / "set.tar", "input.jpg", "mask.png")
    with pytest.raises(InvalidSource, match=r"no picture under the key depth; found input\.jpg, mask\.png"):
        open_source(str(path), image_key="depth")


def test_joined_tars_are_read_to_their_end(tmp_path: Path) -> None:
    path = tarred(tmp_path / "set.tar", [("1.png", b"one")])
    second = tarred(tmp_path / "second.tar", [("2.png", b"two"), ("2.txt", b"")])
    path.write_bytes(path.read_bytes() + bytes(1 << 20) + second.read_bytes())
    source = open_source(str(path))
    assert read_all(source) == [("1.png", b"one", None), ("2.png", b"two", None)]
    assert list(source.left_out) == [("2.txt", "not a picture: .txt", False)]
    path.write_bytes(path.read_bytes() + b"something else")
    source = open_source(str(path))
    assert len(source) == 2
    assert "is no .tar" in source.notes[0]


def test_the_folder_that_img2dataset_writes_is_its_tars(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        tarred(
            tmp_path / f"{shard}.tar", [(f"{shard}1.jpg", b"a"), (f"{shard}1.json", b"{}"), (f"{shard}1.txt", b"words")]
        )
        pq.write_table(pa.table({"url": ["http://a"]}), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert list(source.ids) == ["00000/000001.jpg", "00001/000011.jpg"]
    assert source.labels is None
    assert [one.name for one in source.left_out] == [
        *(f"{shard}/{shard}1.{ending}" for shard in ("00000", "00001") for ending in ("json", "txt")),
        *(f"{shard}{ending}" for shard in ("00000", "00001") for ending in (".parquet", "_stats.json")),
    ]


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
    source = open_source(str(tmp_path / "set.tar"))
    assert read_all(source) == [("a.png", PICTURE, None), ("hard.png", PICTURE, None)]
    passed = "a link or device in a .tar"
    assert list(source.left_out) == [
        *((name, passed, False) for name in ("soft.png", "device.png", "pipe.png")),
        ("lost.png", "a link that leads nowhere", True),
    ]


def test_a_sparse_picture_is_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("1.png"), io.BytesIO())
        member = tarfile.TarInfo("holes.png")
        member.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(member)
    source = open_source(str(tmp_path / "set.tar"))
    assert list(source.ids) == ["1.png"]
    assert list(source.left_out) == [("holes.png", "stored as a sparse file, which is not read", True)]


@pytest.mark.parametrize(
    ("ending", "mode"), [("tar.gz", "w:gz"), ("TGZ", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")]
)
def test_compressed_tars_are_refused(tmp_path: Path, ending: str, mode: str) -> None:
    path = tarred(tmp_path / f"set.{ending}", [("1.png", PICTURE)], mode)
    with pytest.raises(InvalidSource, match=r"is a compressed tar \(\.t.+\); .* unpack it to \.tar"):
        open_source(str(path))
    path.rename(tmp_path / "set.tar")
    with pytest.raises(
        InvalidSource, match=r"set\.tar: is a compressed tar \((gzip|bzip2|xz)\); .* unpack it to \.tar"
    ):
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


@pytest.mark.slow("writes and lists an archive of many pictures")
def test_a_tar_of_many_pictures_holds_little(tmp_path: Path) -> None:
    tarred(tmp_path / "set.tar", [(f"class_{n % 300:016}/picture_{n:010}.jpg", b"a") for n in range(MANY)])
    held, source = held_bytes(lambda: open_source(str(tmp_path / "set.tar")))
    assert len(source) == MANY
    assert held <= 80
