"""SOURCE → a stream of (id, bytes, label)."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidSource, UndecodablePicture
from service.sources import from_arrays, open_source, slice_source
from tests.conftest import encoded, scene

PICTURE = encoded(scene())


def write(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PICTURE)
    return root


def test_a_folder_with_labels(tmp_path: Path) -> None:
    write(tmp_path, "cat/2.png", "cat/deep/er/1.JPEG", "dog/3.webp")
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "dog" / ".hidden.png").write_bytes(PICTURE)
    source = open_source(str(tmp_path))
    assert list(source.ids) == ["cat/2.png", "cat/deep/er/1.JPEG", "dog/3.webp"]
    assert source.labels == ["cat", "cat", "dog"]
    assert source.entry(2) == ("dog/3.webp", PICTURE, "dog")


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


def test_a_zip_reads_like_its_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("top/b/2.png", "top/a/1.png", "top/readme.txt"):
            archive.writestr(name, PICTURE)
    source = open_source(str(tmp_path / "set.zip"))
    assert list(source.ids) == ["top/a/1.png", "top/b/2.png"]
    assert source.labels == ["a", "b"]
    assert source.entry(0).data == PICTURE


def test_a_picture_that_cannot_be_read_is_its_own_error(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path, "1.png", "2.png")))
    (tmp_path / "1.png").unlink()
    with pytest.raises(UndecodablePicture, match="cannot be read"):
        source.entry(0)
    assert source.entry(1).data == PICTURE


def test_a_damaged_member_of_a_zip_is_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", PICTURE)
        archive.writestr("2.png", PICTURE)
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(UndecodablePicture, match="cannot be read"):
        source.entry(0)
    assert source.entry(1).data == PICTURE


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no such source; expected a folder of pictures, a .zip of one"),
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


def test_sources_without_a_picture(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"holds no picture; looked for \.jpg"):
        open_source(str(tmp_path))
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(InvalidSource, match="not a zip file"):
        open_source(str(tmp_path / "no.zip"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(InvalidSource, match="holds no picture"):
        open_source(str(tmp_path / "empty.zip"))


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


def test_digits_are_scikit_learns() -> None:
    source = open_source("digits")
    assert len(source) == 1797
    assert source.labels is not None
    assert list(source.labels[:4]) == ["0", "1", "2", "3"]
    assert np.asarray(Image.open(io.BytesIO(source.entry(0).data))).tolist()[0] == [0, 0, 80, 207, 143, 16, 0, 0]


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
