"""Pictures that a glob or a list names."""

import os
import zipfile
from pathlib import Path

import pytest

from service.errors import InvalidSource
from service.sources import open_source, origin_of
from service.sources.listed import open_list, read_list
from tests.conftest import encoded, scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a/1.jpg", "a/2.png", "b/deep/3.jpg", "b/.hidden/4.jpg", "5.jpg")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(scene(seed=number)))
    (tmp_path / "photos" / "a" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("*.jpg", ["5.jpg"]),
        ("a/*", ["1.jpg", "2.png"]),
        ("**/*.jpg", ["5.jpg", "a/1.jpg", "b/deep/3.jpg"]),
        ("*/*.jpg", ["a/1.jpg"]),
        ("?/*.[jp]*g", ["a/1.jpg", "a/2.png"]),
        ("**/*.jpg[1:]", ["a/1.jpg", "b/deep/3.jpg"]),
    ],
)
def test_a_glob(pattern: str, ids: list[str], folder: Path) -> None:
    source = open_source(f"{folder}/{pattern}")
    assert list(source.ids) == ids
    root = folder / "a" if pattern.startswith("a/") else folder
    assert [source.entry(at).data for at in range(len(ids))] == [(root / id).read_bytes() for id in ids]
    assert origin_of(f"{folder}/{pattern}") == os.path.realpath(root)


def test_what_a_glob_names_besides_is_left_out(folder: Path) -> None:
    left_out = {one.name: one.reason for one in open_source(f"{folder}/*/*").left_out}
    assert left_out == {"a/notes.txt": "not a picture: .txt", "b/deep": "a folder"}


def test_globs_of_nothing(folder: Path) -> None:
    with pytest.raises(InvalidSource, match=r"nothing has a name of this pattern"):
        open_source(f"{folder}/*.gif")
    with pytest.raises(InvalidSource, match=r"holds no picture; looked for .*; found 1 not a picture: .txt"):
        open_source(f"{folder}/**/*.txt")


def test_a_file_with_the_marks_of_a_glob_in_its_name(tmp_path: Path) -> None:
    for name in ("set*.zip", "set2.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{name[3]}.png", encoded(scene()))
    assert list(open_source(str(tmp_path / "set*.zip")).ids) == ["*.png"]
    (tmp_path / "what?").mkdir()
    (tmp_path / "what?" / "1.jpg").write_bytes(encoded(scene()))
    assert list(open_source(str(tmp_path / "what?")).ids) == ["1.jpg"]
    assert origin_of(str(tmp_path / "what?")) == os.path.realpath(tmp_path / "what?")


def test_a_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # Named on purpose, a hidden picture is taken.
    listed = ["./b/deep/3.jpg", "a/1.jpg", "a/1.jpg", "", str(folder / "5.jpg"), "b/.hidden/4.jpg", "a", "a/notes.txt"]
    Path(".6.jpg").write_bytes(encoded(scene(seed=6)))
    listed.append(".6.jpg")
    source = open_list("-", listed)
    assert list(source.ids) == sorted(["b/deep/3.jpg", "a/1.jpg", str(folder / "5.jpg"), "b/.hidden/4.jpg", ".6.jpg"])
    assert {one.name: one.reason for one in source.left_out} == {"a": "a folder", "a/notes.txt": "not a picture: .txt"}
    for at, id in enumerate(source.ids):
        assert source.entry(at).data == (folder / id).read_bytes()


def test_a_listed_file_that_is_not_there_is_one_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    source = open_list("-", ["a/1.jpg", "nowhere.jpg"])
    assert list(source.ids) == ["a/1.jpg", "nowhere.jpg"]
    with pytest.raises(Exception, match="No such file"):
        source.entry(1)
    with pytest.raises(InvalidSource, match="holds no picture"):
        open_list("-", [])


def test_lines_and_nul() -> None:
    assert read_list(b"a b.jpg\nc\r\n\n", nul=False) == ["a b.jpg", "c", "", ""]
    assert read_list(b"a\nb.jpg\0c\0", nul=True) == ["a\nb.jpg", "c", ""]
    assert read_list(b"caf\xe9", nul=False) == [os.fsdecode(b"caf\xe9")]
    with pytest.raises(InvalidSource, match="has NUL characters; expected a path a line, or the option -0"):
        read_list(b"a\0b\0", nul=False)
