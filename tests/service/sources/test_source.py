"""SOURCE → a stream of (id, bytes, label)."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidSource, UndecodablePicture
from service.sources import open_source
from service.sources.compact import Labels, Names
from service.sources.source import LeftOut, Source, from_arrays, select, slice_source
from tests.conftest import encoded, scene

PICTURE = encoded(scene())


def write(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PICTURE)
    return root


def test_a_picture_that_cannot_be_read_is_its_own_error(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path, "1.png", "2.png")))
    (tmp_path / "1.png").unlink()
    with pytest.raises(UndecodablePicture, match="cannot be read"):
        source.entry(0)
    assert source.entry(1).data == PICTURE


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no such source; expected a folder of pictures, a .zip of one, .tar or .parquet files"),
        ("mnist/valid", "no such source"),
        ("digits[3]", "cannot read the slice"),
        ("digits[a:b]", "cannot read the slice"),
        ("digits[5:5]", "holds none"),
        ("digits[2000:]", "holds none"),
        ("mnist/test", r"MNIST is not there: expected .*t10k-images-idx3-ubyte .*--data-root"),
    ],
)
def test_sources_that_are_not_there(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=says):
        open_source(name, tmp_path)


def test_a_slice_of_a_path(tmp_path: Path) -> None:
    write(tmp_path / "photos", *(f"{label}/{n}.png" for label in "ab" for n in range(5)))
    whole = open_source(str(tmp_path / "photos"))
    part = open_source(f"{tmp_path}/photos[40%:7]")
    assert part.name == f"{tmp_path}/photos[40%:7]"
    assert [part.entry(n) for n in range(3)] == [whole.entry(n) for n in (4, 5, 6)]
    with pytest.raises(InvalidSource, match=r"photos\[3\]: cannot read the slice \[3\]"):
        open_source(f"{tmp_path}/photos[3]")
    with pytest.raises(InvalidSource, match=r"no photos\[:3\]: no such source"):
        open_source(f"{tmp_path}/no photos[:3]")


def test_a_path_that_looks_like_a_slice_is_a_path(tmp_path: Path) -> None:
    write(tmp_path / "photos", "1.png", "2.png")
    write(tmp_path / "photos[:1]", "3.png", "4.png")
    assert list(open_source(f"{tmp_path}/photos[:1]").ids) == ["3.png", "4.png"]
    assert list(open_source(f"{tmp_path}/photos[:1][1:]").ids) == ["4.png"]


def test_what_is_there_and_no_source_is_named(tmp_path: Path) -> None:
    write(tmp_path, "one.png")
    with pytest.raises(
        InvalidSource, match=r"one\.png: not a kind of file that we read; expected a folder of pictures"
    ):
        open_source(str(tmp_path / "one.png"))
    with pytest.raises(InvalidSource, match="cannot be read: File name too long"):
        open_source(str(tmp_path / ("n" * 300)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", range(100)),
        ("[:80]", range(80)),
        ("[80:]", range(80, 100)),
        ("[-10:]", range(90, 100)),
        ("[25%:50%]", range(25, 50)),
        ("[10:-10]", range(10, 90)),
    ],
)
def test_slices(text: str, expected: range) -> None:
    pixels = np.arange(100, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    whole = from_arrays("numbers", pixels, [str(n) for n in range(100)], "n")
    part = slice_source(whole, text)
    assert len(part) == len(expected)
    for position in (0, len(part) - 1):
        id, data, label = part.entry(position)
        value = expected[position]
        assert (id, label) == (f"n/{value:05d}", str(value))
        assert np.asarray(Image.open(io.BytesIO(data)))[0, 0] == value


@pytest.mark.parametrize(
    ("text", "expected"), [("[:4]", [0, 3]), ("[1:9]", [0, 2, 5]), ("[3:6]", [0]), ("[4:5]", [0]), ("[9:]", [0])]
)
def test_a_slice_keeps_the_blocks_right(text: str, expected: list[int]) -> None:
    whole = Source("ten", Names("abcdefghij"), lambda position: bytes([position]), None, blocks=[0, 3, 6, 9])
    assert slice_source(whole, text).blocks == expected


def test_a_slice_keeps_missing_labels_missing() -> None:
    out = [LeftOut("x.txt", "not a picture: .txt", False)]
    whole = Source("five", Names("abcde"), lambda _: b"", Labels.of(["x", None, None, None, "y"]), None, out, ["note"])
    part = slice_source(whole, "[:3]")
    assert part.labels == ["x", None, None]
    assert (part.left_out, part.notes) == (out, ["note"])
    assert slice_source(whole, "[1:4]").labels is None
    some = select(whole, np.array([1, 3, 4]))
    assert (list(some.ids), list(some.labels or []), some.left_out) == (["b", "d", "e"], [None, None, "y"], out)


def test_slices_of_slices(tmp_path: Path) -> None:
    whole = open_source("digits")
    part = slice_source(slice_source(whole, "[100:200]"), "[10:20]")
    assert [part.entry(n) for n in range(10)] == [whole.entry(n) for n in range(110, 120)]


def test_digits_are_scikit_learns() -> None:
    source = open_source("digits")
    assert len(source) == 1797
    assert source.labels is not None
    assert list(source.labels[:4]) == ["0", "1", "2", "3"]
    assert np.asarray(Image.open(io.BytesIO(source.entry(0).data))).tolist()[0] == [0, 0, 80, 207, 143, 16, 0, 0]


@pytest.mark.slow("reads seventy thousand digits")
def test_mnist_is_read_to_the_byte(data_root: Path) -> None:
    source = open_source("mnist/train[:10]", data_root)
    assert source.labels == ["5", "0", "4", "1", "9", "2", "1", "3", "1", "4"]
    train = open_source("mnist/train", data_root)
    means = [np.asarray(Image.open(io.BytesIO(train.entry(n).data))).mean() for n in range(60_000)]
    assert abs(np.mean(means) - 33.3184) < 1e-4
    assert len(open_source("mnist/test[8000:]", data_root)) == 2000


def test_an_idx_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 10) + bytes(10))
    with pytest.raises(InvalidSource, match="not the IDX file of MNIST: expected 10000x28x28"):
        open_source("mnist/test", tmp_path)
