"""Snapshots of the index: a valid one is used, an invalid one never."""

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from service.store import snapshot
from service.store.catalog import FILE
from service.store.embedded import EmbeddedStore
from service.store.snapshot import SNAPSHOT, DamagedSnapshot, section
from tests.service.store.test_embedded import D, card, item, unit

VECTORS = unit(40, D)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed store of 40 items, with its snapshot."""
    store = EmbeddedStore(tmp_path / "store", card(), D)
    store.add([item(f"p{n}", vector, n=n) for n, vector in enumerate(VECTORS)])
    store.close()
    return tmp_path / "store"


def finds_all(store: EmbeddedStore) -> bool:
    return [hits[0].id for hits in store.search(VECTORS, 1)] == [f"p{n}" for n in range(40)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_arrays_come_back_as_they_went(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5, dtype="<i8"), "b": np.ones((2, 3), "<f4"), "empty": np.empty((0, 7), "|u1")}
    path = tmp_path / "file"
    snapshot.publish(snapshot.write(path, {"x": 1}, [section(name, array) for name, array in arrays.items()]), path)
    facts, found = snapshot.read(path)
    assert facts == {"x": 1}
    assert all(
        np.array_equal(found[name], array) and found[name].shape == array.shape for name, array in arrays.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_any_flipped_bit_and_any_cut_is_noticed(folder: Path) -> None:
    path = folder / SNAPSHOT
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedSnapshot):
            snapshot.read(path)
        path.write_bytes(whole[:position])
        with pytest.raises(DamagedSnapshot):
            snapshot.read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedSnapshot):
        snapshot.read(path)


def test_a_snapshot_is_used_and_what_came_later_replayed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = (folder / SNAPSHOT).read_bytes()
    store = EmbeddedStore(folder, card(), D)
    store.remove("p0")
    store.add([item("p1", VECTORS[0]), item("new", VECTORS[1])])
    store.close()
    # The saved snapshot is older than the catalog.
    (folder / SNAPSHOT).write_bytes(saved)
    store = EmbeddedStore(folder, card(), D)
    assert warnings(caplog) == []
    assert [hits[0].id for hits in store.search(VECTORS[:3], 1)] == ["p1", "new", "p2"]
    assert store.count() == 40
    store.close()
    assert (folder / SNAPSHOT).read_bytes() != saved


def test_an_unchanged_store_leaves_its_snapshot(folder: Path) -> None:
    # The map of vectors is written once, and the snapshot that names it.
    store = EmbeddedStore(folder, card(), D)
    store.settle()
    store.close()
    before = (folder / SNAPSHOT).stat().st_mtime_ns
    EmbeddedStore(folder, card(), D).close()
    assert (folder / SNAPSHOT).stat().st_mtime_ns == before


def changed_facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A snapshot with changed facts and a recomputed checksum."""

    def damage(path: Path) -> None:
        facts, arrays = snapshot.read(path)
        change(facts)
        sections = [section(name, array) for name, array in arrays.items()]
        snapshot.publish(snapshot.write(path, facts, sections), path)

    return damage


def changed_array(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        facts, arrays = snapshot.read(path)
        arrays[name] = change(arrays[name])
        sections = [section(name, array) for name, array in arrays.items()]
        snapshot.publish(snapshot.write(path, facts, sections), path)

    return damage


def header_says(content: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header = json.dumps(content).encode()
        whole = b"LOOKSNAP" + len(header).to_bytes(4, "little") + header
        path.write_bytes(whole + zlib.crc32(whole).to_bytes(4, "little"))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "there is no snapshot"),
        (lambda path: path.write_bytes(b""), "does not begin like"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes, which its header does not say"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5] + b"x" + path.read_bytes()[-4:]), "checksum"),
        (changed_facts(lambda facts: facts.update(fingerprint="other")), "another encoder's store"),
        (changed_facts(lambda facts: facts.update(sequence=1000)), "of a later state than the catalog"),
        (changed_facts(lambda facts: facts.update(sequence=-1)), "of a later state than the catalog"),
        (changed_facts(lambda facts: facts.update(sequence="7")), "of a later state than the catalog"),
        (changed_facts(lambda facts: facts.update(dimension=7)), "dimension are not those"),
        (changed_facts(lambda facts: facts.update(count=41)), "keys are not those"),
        (changed_array("keys", lambda keys: keys[::-1]), "other vectors than the catalog"),
        (changed_array("keys", lambda keys: keys + 1), "other items than the catalog"),
        (changed_array("keys", lambda keys: keys * 0 - 1), "other items than the catalog"),
        (changed_array("keys", lambda keys: keys.astype("<f4")), "keys are not those"),
        (changed_array("codes", lambda codes: codes ^ 255), "other vectors than the catalog"),
        (changed_array("codes", lambda codes: codes[:, :-1]), "codes are not those"),
        (changed_array("lengths", lambda lengths: lengths[:-1]), "lengths are not those"),
        (changed_array("lengths", lambda lengths: lengths - 2**62), "lengths are not those"),
        (changed_array("lengths", lambda lengths: lengths * 2), "lengths are not those"),
        (header_says({}), "header cannot be read"),
        (header_says({"facts": [], "arrays": []}), "header is not one of ours"),
        (header_says({"facts": {}, "arrays": [{"name": "a", "dtype": "|O", "shape": [1]}]}), "not one of ours"),
        (header_says({"facts": {}, "arrays": [{"name": "a", "dtype": "|u1", "shape": [2**60]}]}), "cannot be read"),
        (header_says({"facts": {}, "arrays": [{"name": "a", "dtype": "<f4", "shape": [2**20] * 2}]}), "does not say"),
    ],
)
def test_a_snapshot_that_is_not_the_stores_is_replaced(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], says: str
) -> None:
    damage(folder / SNAPSHOT)
    # A read-only store finds all items and replaces no file.
    reader = EmbeddedStore(folder, card(), D, read_only=True)
    assert finds_all(reader)
    reader.close()
    store = EmbeddedStore(folder, card(), D)
    assert finds_all(store)
    assert len(warnings(caplog)) == 2
    assert all("the index was rebuilt from 40 vectors" in text and says in text for text in warnings(caplog))
    store.close()
    EmbeddedStore(folder, card(), D).close()
    # The new snapshot is valid, so there is no further warning.
    assert len(warnings(caplog)) == 2


def test_a_catalog_of_a_backup_is_believed_and_its_later_snapshot_is_not(folder: Path) -> None:
    backup = (folder / FILE).read_bytes()
    store = EmbeddedStore(folder, card(), D)
    store.remove("p7")
    store.close()
    (folder / FILE).write_bytes(backup)
    store = EmbeddedStore(folder, card(), D)
    assert finds_all(store)
    store.close()


def left_by_a_kill(folder: Path, copy: Path) -> EmbeddedStore:
    """A copy of the store as it would be found if its process were killed now."""
    # Maintenance may give a new file its name while they are copied.
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.tmp"))
    return EmbeddedStore(copy, card(), D)


def test_a_snapshot_of_a_later_state_is_not_believed_once_the_catalog_is_as_late(folder: Path, tmp_path: Path) -> None:
    first, second, *others = unit(2002, D, seed=1)
    store = EmbeddedStore(folder, card(), D)
    # There are more new items than a sample is likely to hit.
    store.add([item(f"more{n}", vector) for n, vector in enumerate(others)])
    store.close()
    backup = (folder / FILE).read_bytes()
    store = EmbeddedStore(folder, card(), D)
    store.add([item("p0", first)])
    store.close()
    (folder / FILE).write_bytes(backup)
    store = EmbeddedStore(folder, card(), D)
    store.add([item("p0", second)])
    killed = left_by_a_kill(folder, tmp_path / "copy")
    assert killed.search(second[None], 1)[0][0].id == "p0"
    killed.close()
    store.close()


def test_what_was_refused_half_way_leaves_the_snapshot_right(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = EmbeddedStore(folder, card(), D)
    store.remove("p0")
    with pytest.raises(UnicodeEncodeError):
        store.add([item("new", VECTORS[0]), item("half", VECTORS[0], name="\ud800")])
    store.close()
    EmbeddedStore(folder, card(), D).close()
    assert warnings(caplog) == []


def test_without_room_for_a_snapshot_the_store_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / SNAPSHOT).unlink()
    # A folder at this path makes the snapshot impossible to write.
    (folder / (SNAPSHOT + ".tmp")).mkdir()
    store = EmbeddedStore(folder, card(), D)
    store.add([item("more", VECTORS[0])])
    store.close()
    assert "no snapshot of the index could be written" in warnings(caplog)[-1]
    store = EmbeddedStore(folder, card(), D)
    assert store.count() == 41
    store.close()


def test_a_damaged_database_says_what_is_wrong_and_stays(folder: Path) -> None:
    path = folder / FILE
    whole = bytearray(path.read_bytes())
    # These bytes lie in the page of the schema.
    whole[100:200] = b"\xff" * 100
    path.write_bytes(whole)
    with pytest.raises(Exception, match=f"{path}: damaged: .*; the file is left as it is"):
        EmbeddedStore(folder, card(), D)
    assert path.read_bytes() == whole


def test_a_database_of_somebody_else_says_what_it_lacks(tmp_path: Path) -> None:
    database = apsw.Connection(str(tmp_path / FILE))
    database.execute("CREATE TABLE meta (name TEXT, value TEXT); INSERT INTO meta VALUES ('schema', '3')").fetchall()
    database.close()
    with pytest.raises(Exception, match="cannot be used: no such table: items; the file is left as it is"):
        EmbeddedStore(tmp_path, card(), D)
