"""The process that makes maps for a service: in which order it makes them, and what is shown meanwhile."""

import os
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import orjson
import psutil
import pytest

from service.errors import InvalidStore
from service.maps import Maps, Shown, Wanted
from service.store.embedded import EmbeddedStore
from tests.service.store.test_embedded import D, card, item, unit


def wait(maps: Maps, wanted: Wanted, sequence: int) -> Shown:
    """Ask until there is a map. A busy machine has little time for a process of low priority."""
    for _ in range(4000):
        found = maps.get(wanted, sequence)
        if isinstance(found, Shown):
            return found
        time.sleep(0.05)
    raise AssertionError("no map was made in minutes")


def wait_for_last(maps: Maps, wanted: Wanted, sequence: int) -> Shown:
    for _ in range(4000):
        found = wait(maps, wanted, sequence)
        if found.progress is None:
            return found
        time.sleep(0.05)
    raise AssertionError("the map was not finished in minutes")


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "service.maps" in one.cmdline()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        store.add([item(f"{n}", vector) for n, vector in enumerate(unit(40, D))])
    return tmp_path / "store"


def test_pca_comes_first_and_tsne_follows(folder: Path) -> None:
    wanted = Wanted(folder, "t-sne")
    with closing(Maps()) as maps:
        assert maps.get(wanted, 40) == 0
        assert len(children()) == 1
        first = wait(maps, wanted, 40)
        assert first.map.method == "pca"
        assert first.progress is not None
        last = wait_for_last(maps, wanted, 40)
        assert (last.map.method, last.map.sequence, last.map.count) == ("t-sne", 40, 40)
        assert children() == []
        # PCA alone is there, too.
        assert maps.get(Wanted(folder, "pca"), 40) == Shown(first.map, None)
        assert orjson.loads(last.map.ids) == [f"{n}" for n in range(40)]
        assert last.map.keys.tolist() == list(range(1, 41))
        assert np.frombuffer(last.map.positions, "<u2").reshape(-1, 2).max() == 65535


@pytest.mark.slow("computes t-SNE twice")
def test_an_earlier_map_is_shown_until_the_next_one_is_made(folder: Path) -> None:
    wanted = Wanted(folder, "t-sne")
    with closing(Maps()) as maps:
        earlier = wait_for_last(maps, wanted, 40).map
        with closing(EmbeddedStore(folder, card(), D)) as store:
            store.add([item("new", unit(D, seed=9))])
            store.remove("3")
        shown = maps.get(wanted, 42)
        assert shown == Shown(earlier, 0.0)
        later = wait_for_last(maps, wanted, 42).map
        assert (later.method, later.sequence, later.count) == ("t-sne", 42, 40)
        ids = orjson.loads(later.ids)
        assert "3" not in ids
        assert ids[-1] == "new"


def test_closing_ends_the_process_and_removes_its_files(folder: Path) -> None:
    maps = Maps()
    made = wait(maps, Wanted(folder, "t-sne"), 40).map
    assert maps._job is not None
    folders = [Path(made.folder.name), Path(maps._job.folder.name)]
    assert all(one.is_dir() for one in folders)
    maps.close()
    assert children() == []
    assert not any(one.exists() for one in folders)
    with pytest.raises(InvalidStore, match="stopping"):
        maps.get(Wanted(folder, "pca"), 40)


def test_a_process_that_is_killed_is_an_error_once(folder: Path) -> None:
    wanted = Wanted(folder, "pca")
    with closing(Maps()) as maps:
        maps.get(wanted, 40)
        assert maps._job is not None
        os.kill(maps._job.process._process.pid, 9)
        with pytest.raises(InvalidStore, match="the process that makes the map ended with status -9"):
            wait(maps, wanted, 40)
        assert wait(maps, wanted, 40).map.count == 40


def test_only_so_many_maps_are_kept(tmp_path: Path) -> None:
    with closing(Maps()) as maps:
        for number in range(6):
            with closing(EmbeddedStore(tmp_path / str(number), card(), D)) as store:
                store.add([item("a", unit(D))])
            wait(maps, Wanted(tmp_path / str(number), "pca"), 1)
        assert [wanted.folder.name for wanted in maps._maps] == ["2", "3", "4", "5"]
