"""The map of vectors: what is read from it is what the catalog has, whatever happened to the file."""

import logging
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import FloatArray
from service.store import layout
from service.store.check import examine
from service.store.embedded import EmbeddedStore
from service.store.vector_map import VECTORS, VectorMap
from tests.service.store.test_embedded import D, card, item, unit

KEYS = np.asarray([7, 1, 2, 3, 30], np.int64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / VECTORS


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("dimension", [1, 3, 8, 130])
def test_what_was_written_is_read(path: Path, dtype: str, dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file grows every few rows.
    monkeypatch.setattr("service.store.vector_map._STEP_BYTES", 100)
    written = VectorMap.create(path, dimension, np.dtype(dtype))
    vectors = unit(5, dimension).astype(dtype).astype(np.float32)
    written.write(KEYS, vectors)
    written.write(KEYS[1:2], vectors[4:])
    vectors[1] = vectors[4]
    again = VectorMap(path, written.tag, dimension, np.dtype(dtype), read_only=True)
    for file in (written, again):
        for order in ([0, 1, 2, 3, 4], [4, 4, 0], []):
            read = file.read(KEYS[order])
            assert read is not None
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, vectors[order])
        assert file.holds(KEYS, vectors).all()
        assert file.holds(KEYS, -vectors).sum() == 0


def opened(path: Path) -> tuple[VectorMap, FloatArray]:
    file = VectorMap.create(path, D, np.dtype("<f4"))
    vectors = unit(5, D)
    file.write(KEYS, vectors)
    return file, vectors


@pytest.mark.parametrize("key", [0, 8, 29, 31, 10**9])
def test_a_row_that_was_never_written_is_missing(path: Path, key: int) -> None:
    file, vectors = opened(path)
    keys = np.asarray([1, key], np.int64)
    assert file.holds(keys, vectors[1:3]).tolist() == [True, False]
    assert file.read(keys) is None
    assert not file.usable


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(128 + 40 * 1, 128 + 40 * 4 - 1), bit=st.integers(0, 7))
def test_a_damaged_row_is_noticed(path: Path, place: int, bit: int) -> None:
    file, vectors = opened(path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    damaged = VectorMap(path, file.tag, D, np.dtype("<f4"))
    row = (place - 128) // 40
    assert damaged.holds(KEYS, vectors).tolist() == [key != row for key in KEYS.tolist()]
    assert damaged.read(KEYS[row != KEYS]) is not None
    assert damaged.read(np.asarray([row], np.int64)) is None


def test_a_row_of_another_key_is_noticed(path: Path) -> None:
    file, _ = opened(path)
    content = bytearray(path.read_bytes())
    content[128 + 40 : 128 + 80] = content[128 + 80 : 128 + 120]
    path.write_bytes(content)
    assert VectorMap(path, file.tag, D, np.dtype("<f4")).read(KEYS[1:2]) is None


def test_another_file_is_refused(path: Path) -> None:
    file, _ = opened(path)
    for tag, dimension, dtype in (("0" * 32, D, "<f4"), (file.tag, D + 1, "<f4"), (file.tag, D, "<f2")):
        with pytest.raises(ValueError, match="another file"):
            VectorMap(path, tag, dimension, np.dtype(dtype))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="another file"):
        VectorMap(path, file.tag, D, np.dtype("<f4"))


# In a store --------------------------------------------------------------------------------------


def map_of(store: EmbeddedStore) -> VectorMap:
    assert store._live.map is not None
    return store._live.map


def agrees(store: EmbeddedStore) -> bool:
    """Whether the store's map has every vector of the catalog."""
    return all(map_of(store).holds(*chunk).all() for chunk in store._reader.vectors())


def filled(folder: Path, **options: Any) -> EmbeddedStore:
    store = EmbeddedStore(folder, card(), D, **options)
    store.add([item(f"p{n}", vector, n=n) for n, vector in enumerate(unit(60, D))])
    store.settle()
    return store


def change(store: EmbeddedStore) -> None:
    store.add([item(f"p{n}", vector, n=n) for n, vector in enumerate(unit(10, D, seed=1))])
    store.add([item(f"new{n}", vector) for n, vector in enumerate(unit(3, D, seed=2))])
    store.remove("p20")


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_it_follows_every_change_and_opens_again(tmp_path: Path, vector_type: str) -> None:
    store = filled(tmp_path / "store", vector_type=vector_type)
    tag = map_of(store).tag
    change(store)
    assert agrees(store)
    assert [hit.id for hit in store.search(unit(3, D, seed=2)[:1], 1)[0]] == ["new0"]
    # As a kill would leave it: with the snapshot of before the changes.
    shutil.copytree(tmp_path / "store", tmp_path / "killed")
    store.close()
    for folder in ("store", "killed"):
        again = EmbeddedStore(tmp_path / folder, card(), D)
        assert map_of(again).tag == tag
        assert agrees(again)
        assert list(examine(tmp_path / folder)) == []
        again.close()


def test_a_reader_beside_the_writer_reads_the_catalog(tmp_path: Path) -> None:
    store = filled(tmp_path)
    reader = EmbeddedStore(tmp_path, card(), D, read_only=True)
    assert reader._live.map is None
    change(store)
    assert [hit.id for hit in reader.search(unit(3, D, seed=2)[:1], 1)[0]] == ["new0"]
    reader.close()
    store.close()


def stale(folder: Path, before: Path) -> None:
    """Rows as they were before the last changes, though the snapshot knows these."""
    shutil.copy(before / VECTORS, folder / VECTORS)


def without(folder: Path, _: Path) -> None:
    (folder / VECTORS).unlink()


def of_another(folder: Path, _: Path) -> None:
    VectorMap.create(folder / VECTORS, D, np.dtype("<f4"))


def cut(folder: Path, _: Path) -> None:
    with (folder / VECTORS).open("r+b") as file:
        file.truncate(128 + 40 * 5)


def zeroed(folder: Path, _: Path) -> None:
    with (folder / VECTORS).open("r+b") as file:
        file.seek(128)
        file.write(bytes(40 * 70))


@pytest.mark.parametrize("damage", [stale, without, of_another, cut, zeroed])
def test_a_map_that_cannot_be_used_is_written_anew(tmp_path: Path, damage: Any) -> None:
    store = filled(tmp_path / "store")
    map_of(store).sync()
    shutil.copytree(tmp_path / "store", tmp_path / "before")
    change(store)
    expected = store.search(unit(20, D, seed=5), 10)
    store.close()
    damage(tmp_path / "store", tmp_path / "before")
    again = EmbeddedStore(tmp_path / "store", card(), D)
    assert again._live.map is None
    assert again.search(unit(20, D, seed=5), 10) == expected
    again.settle()
    assert agrees(again)
    assert again.search(unit(20, D, seed=5), 10) == expected
    again.close()
    assert list(examine(tmp_path / "store")) == []


def test_damage_while_it_is_used_changes_no_hit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path)
    expected = store.search(unit(20, D, seed=5), 10)
    with (tmp_path / VECTORS).open("r+b") as file:
        file.seek(128 + 40 * 30)
        file.write(bytes(range(40)))
    with caplog.at_level(logging.WARNING, "bentoml.lookalike"):
        assert store.search(unit(20, D, seed=5), 10) == expected
    assert "vectors.map is damaged: searches read the catalog" in caplog.text
    assert not map_of(store).usable
    change(store)
    store.settle()
    assert map_of(store).usable
    assert agrees(store)
    store.close()


def test_the_check_names_a_damaged_map(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.close()
    with (tmp_path / VECTORS).open("r+b") as file:
        file.seek(128 + 40 * 30)
        file.write(bytes(range(40)))
    assert list(examine(tmp_path)) == [
        "vectors.map: holds other vectors than catalog.sqlite; remove it, it is written anew"
    ]


def test_a_disk_that_refuses_it_stops_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The catalog's write-ahead log stays below; the map would grow by a step.
    most = max(path.stat().st_size for path in tmp_path.iterdir())
    map_of(store)._rows = map_of(store)._rows[:40]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most - 1, limits[1]))
    try:
        with caplog.at_level(logging.WARNING, "bentoml.lookalike"):
            change(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "vectors.map cannot be written: File too large: searches read the catalog" in caplog.text
    assert [hit.id for hit in store.search(unit(3, D, seed=2)[:1], 1)[0]] == ["new0"]
    store.settle()
    assert agrees(store)
    store.close()
    assert list(examine(tmp_path)) == []


def test_rows_that_nothing_reads_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store.vector_map._UNUSED_BYTES", 0)
    store = filled(tmp_path)
    first = map_of(store)
    vectors = unit(600, D, seed=3)
    for n in range(0, 600, 100):
        store.add([item(f"many{m}", vectors[m]) for m in range(n, n + 100)])
    assert not first.bloated(660)
    for n in range(600):
        store.remove(f"many{n}")
    assert first.bloated(60)
    store.settle()
    assert map_of(store) is not first
    assert agrees(store)
    store.close()


def test_a_generation_is_removed_with_its_map(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    store.close()
    layout.remove(tmp_path, tmp_path / "store")
    assert not (tmp_path / "store").exists()
