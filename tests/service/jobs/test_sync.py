"""`lookalike index --sync`: a store follows a folder."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidRequest, InvalidSource
from service.file_facts import Move
from service.jobs.sync import Synced, Target, in_steps
from service.settings import Settings, read_own_settings
from service.store.catalog_reader import CatalogReader
from tests.conftest import MODEL, encoded, scene
from tests.serving import LOOKALIKE


class Shelf:
    """A folder of pictures, and the store that follows it."""

    def __init__(self, folder: Path) -> None:
        self.pictures, self.store = folder / "pictures", folder / "store"
        self.pictures.mkdir()
        self.settings: Settings = read_own_settings(store=self.store, model=MODEL, variant="fp32")

    def write(self, name: str, seed: int, size: tuple[int, int] = (64, 48)) -> Path:
        path = self.pictures / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(scene(*size, seed=seed)))
        return path

    def command(self, *options: str) -> list[str | Path]:
        """Return the command that indexes the pictures into the store."""
        return [LOOKALIKE, "index", self.pictures, "--store", self.store, "--model", MODEL, *options]

    def sync(self, source: Path | None = None, **options: Any) -> Synced:
        return Target(self.settings).sync(str(source or self.pictures), **options)

    def counts(self, source: Path | None = None, **options: Any) -> tuple[int, int, int, int, int]:
        """Added, replaced, renamed, removed and unchanged."""
        facts = self.sync(source, **options).facts()
        added, replaced, renamed, removed, unchanged = (
            facts[name] for name in ("added", "replaced", "renamed", "removed", "unchanged")
        )
        return added, replaced, renamed, removed, unchanged

    def items(self) -> dict[str, dict[str, object]]:
        """Metadata by id."""
        with closing(CatalogReader(self.store)) as reader:
            return {item.id: item.metadata for _, item in reader.scan(1000, 0)}

    def describe(self, **metadata: str) -> None:
        """Give items metadata, by the stems of their ids."""
        from service.gallery import open_gallery

        with closing(open_gallery(self.settings)) as gallery:
            for stem, text in metadata.items():
                gallery.change_metadata(f"{stem}.png", {"told": text})


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Return an empty folder and no store yet."""
    return Shelf(tmp_path)


def test_five_of_seventeen_files_that_are_gone_are_found_no_more(shelf: Shelf) -> None:
    for n in range(17):
        shelf.write(f"{n:02}.png", n)
    assert shelf.counts() == (17, 0, 0, 0, 0)
    for n in range(5):
        (shelf.pictures / f"{n:02}.png").unlink()
    would = shelf.sync(dry_run=True)
    assert sorted(would.changes.removed) == [f"{n:02}.png" for n in range(5)]
    assert next(would.lines()) == "remove   00.png"
    assert len(shelf.items()) == 17
    assert shelf.counts() == (0, 0, 0, 5, 12)
    assert sorted(shelf.items()) == [f"{n:02}.png" for n in range(5, 17)]
    assert shelf.counts() == (0, 0, 0, 0, 12)


def test_a_changed_file_and_a_renamed_one_keep_their_metadata(shelf: Shelf) -> None:
    for n, name in enumerate("abcdef"):
        shelf.write(f"{name}.png", n)
    shelf.sync()
    shelf.describe(a="of a", b="of b", c="of c")
    shelf.write("a.png", 10)
    (shelf.pictures / "b.png").rename(shelf.pictures / "new.png")
    done = shelf.sync()
    assert done.facts()["changes"] == {
        "added": [],
        "replaced": ["a.png"],
        "renamed": [{"id": "b.png", "to": "new.png"}],
        "removed": [],
    }
    kept = {id: metadata.get("told") for id, metadata in shelf.items().items()}
    assert kept == {"a.png": "of a", "new.png": "of b", "c.png": "of c", "d.png": None, "e.png": None, "f.png": None}
    with closing(CatalogReader(shelf.store)) as reader:
        item = reader.get("new.png")
        assert item is not None
        assert item.source == str(shelf.pictures / "new.png")


def test_files_that_exchange_or_pass_on_their_names_keep_their_metadata(shelf: Shelf) -> None:
    for n, name in enumerate("abcde"):
        shelf.write(f"{name}.png", n)
    shelf.sync()
    shelf.describe(a="of a", b="of b", c="of c", d="of d", e="of e")

    def move(name: str, to: str) -> None:
        (shelf.pictures / f"{name}.png").rename(shelf.pictures / f"{to}.png")

    # a and b exchange their names; c becomes d, and d becomes f; a copy of e is another picture.
    for name, to in (("a", "x"), ("b", "a"), ("x", "b"), ("d", "f"), ("c", "d")):
        move(name, to)
    shutil.copy(shelf.pictures / "e.png", shelf.pictures / "copy.png")
    assert shelf.counts() == (1, 0, 4, 0, 1)
    told = {id: metadata.get("told") for id, metadata in shelf.items().items()}
    assert told == {
        "a.png": "of b",
        "b.png": "of a",
        "d.png": "of c",
        "f.png": "of d",
        "e.png": "of e",
        "copy.png": None,
    }
    # What `mv b a` does: the picture of a is gone, and that of b keeps what is known of it.
    move("b", "a")
    assert shelf.counts() == (0, 0, 1, 1, 4)
    assert shelf.items()["a.png"]["told"] == "of a"
    assert "b.png" not in shelf.items()


def test_a_file_that_was_only_touched_is_read_once_more_and_not_opened_after_that(shelf: Shelf) -> None:
    path = shelf.write("a.png", 1)
    shelf.sync()
    os.utime(path, ns=(10**18, 10**18))
    done = shelf.sync()
    assert (done.changes.unchanged, done.any) == (1, False)
    with closing(CatalogReader(shelf.store)) as reader:
        item = reader.get("a.png")
        assert item is not None
        assert (item.mtime_ns, item.facts.date) == (10**18, "2001-09-09T01:46:40")
        before = reader.sequence()
        # Other bytes of the same length and time are what no stat shows: the file was not opened.
        data = path.read_bytes()
        path.write_bytes(bytes(len(data)))
        os.utime(path, ns=(10**18, 10**18))
        assert shelf.counts() == (0, 0, 0, 0, 1)
        assert reader.sequence() == before
    # The same beside a file that is new.
    shelf.write("b.png", 2)
    assert shelf.counts() == (1, 0, 0, 0, 1)


def test_a_folder_that_is_not_there_needs_yes(shelf: Shelf) -> None:
    for n in range(4):
        shelf.write(f"{n}.png", n)
    shelf.sync()
    away = shelf.pictures.with_name("away")
    shelf.pictures.rename(away)
    for there in (False, True):
        if there:
            # The place of a disk that is not mounted.
            shelf.pictures.mkdir()
        with pytest.raises(InvalidRequest, match=r"the store has 4 items of it; is it mounted\?.*--yes removes them"):
            shelf.sync()
        would = shelf.sync(dry_run=True)
        assert len(would.changes.removed) == 4
        assert "--yes removes them" in would.changes.account.notes[0]
        assert len(shelf.items()) == 4
    assert shelf.counts(yes=True) == (0, 0, 0, 4, 0)
    assert shelf.items() == {}
    with pytest.raises(InvalidSource, match="holds no picture"):
        shelf.sync()
    with pytest.raises(InvalidSource, match="no such folder, and the store has no picture of it"):
        shelf.sync(shelf.pictures / "none")


def test_most_of_the_files_gone_need_yes(shelf: Shelf) -> None:
    for n in range(4):
        shelf.write(f"{n}.png", n)
    shelf.sync()
    for n in range(3):
        (shelf.pictures / f"{n}.png").unlink()
    with pytest.raises(InvalidRequest, match="the files of 3 of 4 items are gone"):
        shelf.sync()
    shelf.write("0.png", 0)
    # Half of them is not most of them.
    assert shelf.counts() == (0, 0, 0, 2, 2)


def test_only_the_items_of_the_source_are_touched(shelf: Shelf, tmp_path: Path) -> None:
    for n in range(3):
        shelf.write(f"{n}.png", n)
    (tmp_path / "other").mkdir()
    other = Shelf(tmp_path / "other")
    for n in range(3):
        other.write(f"{n}.png", n + 10)
    beside = tmp_path / "pictures-2"
    beside.mkdir()
    (beside / "own.png").write_bytes(encoded(scene(seed=30)))
    for source in (None, other.pictures, beside):
        shelf.sync(source)
    from service.gallery import open_gallery

    with closing(open_gallery(shelf.settings)) as gallery:
        gallery.add("http.png", encoded(scene(seed=20)), {"mine": 1})
    (shelf.pictures / "2.png").unlink()
    (other.pictures / "1.png").rename(other.pictures / "one.png")
    assert shelf.counts() == (0, 0, 0, 1, 2)
    assert shelf.counts(other.pictures) == (0, 0, 1, 0, 2)
    (other.pictures / "new.png").write_bytes(encoded(scene(seed=40)))
    assert shelf.counts(other.pictures) == (1, 0, 0, 0, 3)
    assert {id for id in shelf.items() if not id.startswith("pictures")} == {"0.png", "1.png", "http.png", "own.png"}
    later = {id for id in shelf.items() if id.startswith("pictures")}
    assert {id.rpartition("/")[2] for id in later} == {"0.png", "one.png", "2.png", "new.png"}
    assert len({id.rpartition("/")[0] for id in later}) == 1


def test_a_new_file_whose_id_another_source_has_gets_a_prefix(shelf: Shelf, tmp_path: Path) -> None:
    shelf.write("a.png", 1)
    shelf.sync()
    other = tmp_path / "more"
    other.mkdir()
    (other / "own.png").write_bytes(encoded(scene(seed=2)))
    shelf.sync(other)
    (other / "a.png").write_bytes(encoded(scene(seed=3)))
    done = shelf.sync(other)
    assert done.facts()["changes"]["added"] == ["more/a.png"]
    assert "begin with more/" in done.changes.account.notes[0]
    assert set(shelf.items()) == {"a.png", "own.png", "more/a.png"}
    (other / "a.png").write_bytes(encoded(scene(seed=4)))
    assert shelf.sync(other).facts()["changes"]["replaced"] == ["more/a.png"]


def test_a_folder_that_has_moved_is_the_same_folder(shelf: Shelf) -> None:
    for n in range(4):
        shelf.write(f"{n}.png", n)
    shelf.sync()
    moved = shelf.pictures.with_name("moved")
    shelf.pictures.rename(moved)
    done = shelf.sync(moved)
    assert (done.changes.unchanged, done.any) == (4, False)
    assert "taken as moved" in done.changes.account.notes[0]
    (moved / "0.png").unlink()
    assert shelf.counts(moved) == (0, 0, 0, 1, 3)


def test_odd_names_are_named_and_never_confused(shelf: Shelf) -> None:
    shelf.write("plain.png", 1)
    odd = [b"new\nline.png", b"caf\xe9.png", b"-rf.png", b"$(x).png", "e\u0301.png".encode(), b"a b/c'd.png"]
    for n, name in enumerate(odd):
        shelf.write(os.fsdecode(name), n + 5)
    for added in (5, 0):
        done = shelf.sync()
        assert len(done.changes.added) == added
        failures = done.facts()["failures"]
        assert [one["id"] for one in failures] == ["caf\\xe9.png", "new\\nline.png"]
        assert "another name" in failures[0]["error"]
    assert set(shelf.items()) == {"plain.png", "-rf.png", "$(x).png", "é.png", "a b/c'd.png"}
    (shelf.pictures / "-rf.png").rename(shelf.pictures / "ü\u0308.png")
    assert shelf.counts() == (0, 0, 1, 0, 4)


def test_what_cannot_be_read_any_more_stays_and_is_named(shelf: Shelf, tmp_path: Path) -> None:
    for n in range(6):
        shelf.write(f"{n}.png", n)
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "far.png").write_bytes(encoded(scene(seed=9)))
    (shelf.pictures / "linked").symlink_to(disk)
    assert shelf.counts() == (7, 0, 0, 0, 0)
    disk.rename(tmp_path / "unplugged")
    shelf.write("1.png", 11)
    (shelf.pictures / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    done = shelf.sync()
    assert not done.changes.removed
    assert [one.id for one in done.changes.account.failures] == ["1.png"]
    assert done.changes.account.lost == 1
    assert "1 items stay" in done.changes.account.notes[0]
    assert len(shelf.items()) == 7


def test_a_folder_of_archives_and_a_file_are_nothing_to_follow(shelf: Shelf) -> None:
    (shelf.pictures / "a.tar").write_bytes(b"")
    with pytest.raises(InvalidRequest, match="found archives or tables"):
        shelf.sync()
    with pytest.raises(InvalidRequest, match="index this without --sync"):
        shelf.sync(shelf.pictures / "a.tar")


def test_moves_that_exchange_ids_are_one_commit() -> None:
    moves = [Move(f"{n}", "d", f"{n}") for n in range(2500)]
    moves += [Move("a", "d", "b"), Move("b", "d", "a"), Move("c", "d", "e"), Move("e", "d", None), Move("x", "d", "y")]
    first, *others = in_steps(moves)
    assert {move.id for move in first} == {"a", "b", "c", "e"}
    assert [len(step) for step in others] == [1000, 1000, 501]
    assert len(list(in_steps([]))) == 0


@pytest.mark.slow("it starts the command six times")
def test_a_sync_that_is_killed_is_run_again(shelf: Shelf) -> None:
    for n in range(300):
        shelf.write(f"{n:03}.png", n)
    shelf.sync()
    shelf.describe(**{f"{n:03}": f"of {n}" for n in range(300)})
    for n in range(300):
        path = shelf.pictures / f"{n:03}.png"
        if n % 3 == 0:
            path.rename(shelf.pictures / f"renamed-{n:03}.png")
        elif n % 3 == 1:
            shelf.write(path.name, n + 1000)
    command = shelf.command("--sync", "--json")
    for tries in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        sequence = _sequence(shelf)
        # Killed at once when it begins to change the store, then later and later.
        while process.poll() is None and _sequence(shelf) == sequence:
            time.sleep(0.002)
        time.sleep(0.02 * tries)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        told = sorted(str(metadata["told"]) for metadata in shelf.items().values())
        assert told == sorted(f"of {n}" for n in range(300))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["failed"] == 0
    expected = {f"renamed-{n:03}.png" if n % 3 == 0 else f"{n:03}.png": f"of {n}" for n in range(300)}
    assert {id: metadata["told"] for id, metadata in shelf.items().items()} == expected
    assert shelf.counts() == (0, 0, 0, 0, 300)


def _sequence(shelf: Shelf) -> int:
    with closing(CatalogReader(shelf.store)) as reader:
        return reader.sequence()


@pytest.mark.slow("starts the command again and again")
def test_the_command_prints_counts_lists_and_exit_codes(shelf: Shelf) -> None:
    for n in range(3):
        shelf.write(f"{n}.png", n)

    def run(*options: str, code: int = 0) -> tuple[str, str]:
        done = subprocess.run(shelf.command(*options), capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    out, _ = run("--sync", "--dry-run")
    assert out.splitlines()[:3] == [f"add      {n}.png" for n in range(3)]
    assert "would be 3 added" in out.splitlines()[3]
    assert not shelf.store.exists()
    assert "3 added, 0 replaced, 0 renamed, 0 removed, 0 unchanged, 0 failed" in run("--sync")[0]
    for n in range(2):
        (shelf.pictures / f"{n}.png").unlink()
    assert "--yes removes them" in run("--sync", code=2)[1]
    facts = json.loads(run("--sync", "--yes", "--json")[0])
    assert facts["changes"]["removed"] == ["0.png", "1.png"]
    (shelf.pictures / "bad.png").write_bytes(b"no picture")
    assert "1 failed" in run("--sync", code=1)[0]
    assert "--yes: is for --sync" in run("--yes", code=2)[1]
    assert "expected one of them" in run("--watch", "--dry-run", code=2)[1]
