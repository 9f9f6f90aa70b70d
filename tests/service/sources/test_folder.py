"""Folders of pictures: names, labels, links and what is passed over."""

import os
import unicodedata
from pathlib import Path

import pytest

from service.errors import InvalidSource
from service.sources import open_source
from service.sources.source import slice_source
from tests.service.sources.test_files import MANY, held_bytes, read_all, tarred, zipped
from tests.service.sources.test_source import PICTURE, write


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


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["cat/1.png", "2.png"], [None, "cat"]),
        (["1.png", "2.png"], None),
        (["cat/1.png", "cat/2.png"], ["cat", "cat"]),
        (["all/cat/1.png", "all/dog/2.png"], ["cat", "dog"]),
        (["a/b/cat/1.png", "a/b/dog/deep/2.png", "a/b/3.png"], [None, "cat", "dog"]),
        (["a/b/cat/1.png", "a/b/cat/2.png"], ["cat", "cat"]),
        (["cat/train/1.png", "dog/test/2.png"], ["cat", "dog"]),
        (["train/cat/1.png", "val/dog/2.png", "Test/cat/3.png"], ["cat", "cat", "dog"]),
        (["set/valid/cat/1.png", "set/dev/dog/2.png", "set/dev/3.png"], [None, "dog", "cat"]),
        (["train/1.png", "val/2.png"], None),
        (["train/1.png", "train/2.png"], None),
        (["train/cat/1.png", "other/dog/2.png"], ["other", "train"]),
    ],
)
@pytest.mark.parametrize("pack", [None, "zip", "zip of the folder", "tar"])
def test_labels_of_a_folder_and_of_its_archives(
    tmp_path: Path, paths: list[str], labels: list[str | None] | None, pack: str | None
) -> None:
    if pack is None:
        source = open_source(str(write(tmp_path / "set", *paths)))
    else:
        above = "set/" if pack == "zip of the folder" else ""
        files = [(above + path, PICTURE) for path in sorted(paths)]
        name = "set.tar" if pack == "tar" else "set.zip"
        source = open_source(str((tarred if pack == "tar" else zipped)(tmp_path / name, files)))
    assert (source.labels and sorted(source.labels, key=str)) == (labels and sorted(labels, key=str))
    for id, label in zip(source.ids, source.labels or [], strict=False):
        assert label is None or f"{label}/" in id


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png")
    write(tmp_path / "pictures", "0.png", "real/2.png")
    for name, target in [
        ("linked", "../elsewhere"),
        ("circle", "../pictures"),
        ("above", ".."),
        ("alias", "real"),
        ("real/up", "../.."),
        ("nowhere.png", "gone.png"),
        ("words", "gone"),
        ("again.png", "0.png"),
        ("a.png", "../elsewhere/1.png"),
        ("self.png", "self.png"),
    ]:
        (tmp_path / "pictures" / name).symlink_to(target)
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    source = open_source(str(tmp_path / "pictures"))
    assert list(source.ids) == ["0.png", "linked/1.png", "real/2.png"]
    assert sorted(source.left_out) == [
        ("a.png", "a link to a file that is read already", False),
        ("above", "a link to a folder that holds this source", False),
        ("again.png", "a link to a file that is read already", False),
        ("alias/", "a link to a folder that is read already", False),
        ("circle/", "a link to a folder that is read already", False),
        ("nowhere.png", "a link that leads nowhere: No such file or directory", True),
        ("pipe.png", "not an ordinary file", False),
        ("real/up", "a link to a folder that holds this source", False),
        ("self.png", "a link that leads nowhere: Too many levels of symbolic links", True),
        ("words", "a link that leads nowhere: No such file or directory", False),
    ]


@pytest.mark.parametrize("order", [("b", "a"), ("a", "b")])
def test_the_real_folder_wins_over_its_link_whatever_the_order_on_disk(tmp_path: Path, order: tuple[str, str]) -> None:
    for real in order:
        write(tmp_path / real, f"{real}/1.png")
        other = next(name for name in order if name != real)
        (tmp_path / real / other).symlink_to(real)
        source = open_source(str(tmp_path / real))
        assert list(source.ids) == [f"{real}/1.png"]
        assert list(source.left_out) == [(f"{other}/", "a link to a folder that is read already", False)]


def test_pictures_of_git_annex_are_read_through_their_links(tmp_path: Path) -> None:
    write(tmp_path, ".git/annex/objects/S1.jpg/S1.jpg")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").symlink_to("../.git/annex/objects/S1.jpg/S1.jpg")
    (tmp_path / "cat" / "2.jpg").symlink_to("../.git/annex/objects/S1.jpg/S1.jpg")
    source = open_source(str(tmp_path))
    assert list(source.ids) == ["cat/1.jpg", "cat/2.jpg"]
    assert source.entry(1).data == PICTURE
    assert list(source.left_out) == [(".git/", "hidden", False)]


def test_folders_that_systems_keep_for_themselves_are_passed_over_and_counted(tmp_path: Path) -> None:
    kept = [".Trash-1000", ".thumbnails", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX"]
    write(tmp_path, "1.png", "._1.png", "Thumbs.db", *(f"{folder}/deep/2.png" for folder in kept))
    source = open_source(str(tmp_path))
    assert list(source.ids) == ["1.png"]
    hidden = ["._1.png", "Thumbs.db", *(f"{folder}/" for folder in kept)]
    assert sorted(source.left_out) == [(name, "hidden", False) for name in sorted(hidden)]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "1.png")
    at = os.open(tmp_path, os.O_RDONLY)
    # A path longer than the system takes cannot be read, even by root.
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=at)
        at, above = os.open("d" * 250, os.O_RDONLY, dir_fd=at), at
        os.close(above)
    os.close(at)
    source = open_source(str(tmp_path))
    assert list(source.ids) == ["1.png"]
    (left_out,) = source.left_out
    assert (left_out.reason, left_out.lost) == ("unreadable: File name too long", True)


def test_ids_and_labels_are_composed_and_twins_are_named(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "Müller/Café.png")
    write(tmp_path, apart, "Schmidt/é.png", unicodedata.normalize("NFD", "Schmidt/é.png"))
    (tmp_path / apart).write_bytes(b"apart")
    same = "the same picture under a name that differs only in how its characters are composed"
    assert [one[1:] for one in open_source(str(tmp_path)).left_out] == [(same, False)]
    (tmp_path / unicodedata.normalize("NFD", "Schmidt/é.png")).write_bytes(b"other")
    source = open_source(str(tmp_path))
    assert read_all(source) == [("Müller/Café.png", b"apart", "Müller"), ("Schmidt/é.png", PICTURE, "Schmidt")]
    (twin,) = source.left_out
    assert twin.name == unicodedata.normalize("NFD", "Schmidt/é.png")
    assert twin.reason.startswith("another path differs from this one only in how its characters are composed")
    assert twin.lost


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(PICTURE)
    source = open_source(str(tmp_path))
    assert source.entry(0) == ("caf\udce9.png", PICTURE, None)
    write(tmp_path, os.fsdecode(b"m\xfcll/1.png"), "dog/2.png")
    assert open_source(str(tmp_path)).labels == [None, "dog", "m\\xfcll"]


def test_folders_without_a_picture(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"holds no picture; looked for \.jpg .* then for \.tar and \.parquet"):
        open_source(str(tmp_path))
    (tmp_path / "x.NEF").write_bytes(b"")
    with pytest.raises(InvalidSource, match=r"found 1 camera RAW, which is not read: convert it to JPEG or PNG"):
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
