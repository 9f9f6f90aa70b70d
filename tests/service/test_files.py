"""One writer for all files: a file at its path is whole, before and after a power cut."""

import ast
import os
from pathlib import Path

import pyarrow as pa
import pytest

from service.errors import InvalidOutput
from service.files import replace_file, write_file, write_folder
from service.jobs.parquet_parts import write_parquet
from tests.conftest import ROOT

# The map of vectors is written in place, so it syncs the file that it holds open, whatever name that has.
_OWN = ("service/files.py", "service/store/vector_map.py")
# These calls rename files but write none: a benchmark moves a snapshot away and back, and a run's folder is set aside.
_MOVES = ("benchmarks/search.py", "training/checkpoint.py")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Names of the synced files, in order, and whether the path `new` exists at that time."""
    seen: list[tuple[str, bool]] = []
    really = os.fsync

    def fsync(number: int) -> None:
        really(number)
        path = Path(f"/proc/self/fd/{number}").readlink()
        seen.append((path.name, path.with_name("new").exists() or (path / "new").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def test_a_file_is_synced_renamed_and_its_folder_synced(tmp_path: Path, forced: list[tuple[str, bool]]) -> None:
    write_file(tmp_path / "new", b"content")
    assert forced == [("new.tmp", False), (tmp_path.name, True)]
    assert (tmp_path / "new").read_bytes() == b"content"


def test_parquet_reaches_the_disk_before_its_name(tmp_path: Path, forced: list[tuple[str, bool]]) -> None:
    write_parquet(pa.table({"id": ["a"]}), tmp_path / "new")
    assert forced == [("new.tmp", False), (tmp_path.name, True)]


def test_a_folder_is_synced_file_by_file(tmp_path: Path, forced: list[tuple[str, bool]]) -> None:
    write_folder({"a": b"1", "b": b"2"}, tmp_path / "new")
    assert [name for name, _ in forced] == ["a", "b", "new", tmp_path.name]
    write_folder({"c": b"3"}, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_block_that_raises_leaves_the_earlier_file(tmp_path: Path) -> None:
    write_file(tmp_path / "new", b"earlier")
    with pytest.raises(KeyboardInterrupt), replace_file(tmp_path / "new") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "new").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_cannot_take_its_place_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder({"a": b"1"}, tmp_path / "new")
    really = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "new" and target == tmp_path / "new":
            raise OSError(28, "No space left on device")
        return really(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InvalidOutput, match="new: cannot be written: No space left on device"):
        write_folder({"b": b"2"}, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_nobody_else_renames_or_syncs() -> None:
    """A second implementation would show as a rename or an fsync elsewhere."""
    found = []
    for path in (path for room in ("service", "training", "benchmarks") for path in (ROOT / room).rglob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        called = {(call.func.attr, len(call.args)) for call in calls if isinstance(call.func, ast.Attribute)}
        if called & {("rename", 1), ("replace", 1), ("fsync", 1), ("fdatasync", 1)}:
            found.append(str(path.relative_to(ROOT)))
    assert sorted(found) == sorted(_OWN + _MOVES)
