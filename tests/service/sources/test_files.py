"""Patterns of files, and what folders, zips and tars have in common: real files, whole and damaged."""

import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import InvalidSource, UndecodablePicture
from service.sources import open_source
from service.sources.source import Entry, Source

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


def test_of_two_members_of_one_name_the_later_counts(tmp_path: Path) -> None:
    files = [("1.png", b"old"), ("2.png", b"other"), ("1.png", b"new")]
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(tmp_path / "set.zip", files)
    assert read_all(open_source(str(tmp_path / "set.zip"))) == [("1.png", b"new", None), ("2.png", b"other", None)]
    tarred(tmp_path / "set.tar", files)
    assert read_all(open_source(str(tmp_path / "set.tar"))) == [("2.png", b"other", None), ("1.png", b"new", None)]
    for name in ("set.zip", "set.tar"):
        replaced = ("1.png", "replaced by a later one of the same path", False)
        assert list(open_source(str(tmp_path / name)).left_out) == [replaced]


@pytest.mark.parametrize("size", [3, 1_500_000])
def test_a_second_copy_in_an_archive_is_no_loss(size: int, tmp_path: Path) -> None:
    same, other = b"a" * size, b"a" * (size - 1) + b"b"
    twin = "cafe\u0301.png"
    files = [("1.png", same), ("1.png", same), ("caf\u00e9.png", same), (twin, same), ("2.png", same), ("2.png", other)]
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(tmp_path / "set.zip", files)
    tarred(tmp_path / "set.tar", files)
    for name in ("set.zip", "set.tar"):
        source = open_source(str(tmp_path / name))
        assert sorted(source.ids) == ["1.png", "2.png", "caf\u00e9.png"]
        assert list(source.left_out) == [
            ("1.png", "there already: the same picture under the same path", False),
            (twin, "the same picture under a name that differs only in how its characters are composed", False),
            ("2.png", "replaced by a later one of the same path", False),
        ]
    tarred(tmp_path / "set.tar", [("caf\u00e9.png", same), (twin, other)])
    ((_, reason, lost),) = open_source(str(tmp_path / "set.tar")).left_out
    assert lost
    assert "rename one of them" in reason


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
