"""The process that finds duplicates for a service: its priority, its end, and what becomes of its failures."""

import os
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from service import grouping
from service.errors import InvalidRequest, InvalidStore
from service.grouping import Groupings, Page, Wanted
from service.store.embedded import EmbeddedStore
from tests.service.store.test_embedded import D, card, item, unit


def wait(groupings: Groupings, wanted: Wanted, sequence: int) -> Page:
    for _ in range(600):
        found = groupings.first_page(wanted, sequence, 10)
        if isinstance(found, Page):
            return found
        time.sleep(0.05)
    raise AssertionError("no groups were found in half a minute")


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "service.grouping" in one.cmdline()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        store.add([item(f"{n}", unit(D, seed=n // 2)) for n in range(20)])
    return tmp_path / "store"


def test_one_process_of_low_priority_works_and_ends(folder: Path) -> None:
    with closing(Groupings()) as groupings:
        assert groupings.first_page(Wanted(folder, 0.9), 20, 10) == 0
        (process,) = children()
        # Another threshold waits for the same process.
        assert groupings.first_page(Wanted(folder, 0.8), 20, 10) == 0
        assert children() == [process]
        for _ in range(100):
            if process.status() == psutil.STATUS_ZOMBIE or process.nice() == 19:
                break
            time.sleep(0.02)
        assert process.nice() == 19
        assert len(wait(groupings, Wanted(folder, 0.9), 20).groups) == 10
        assert children() == []


def test_work_that_nobody_asks_about_makes_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Groupings()) as groupings:
        groupings.first_page(Wanted(folder, 0.9), 20, 10)
        assert groupings._job is not None
        process, files = groupings._job.process, Path(groupings._job.folder.name)
        monkeypatch.setattr(grouping, "_PATIENCE_S", 0)
        groupings.first_page(Wanted(folder, 0.8), 20, 10)
        assert groupings._job.wanted == Wanted(folder, 0.8)
        assert process.done
        assert not files.exists()
        assert len(wait(groupings, Wanted(folder, 0.8), 20).groups) == 10


def test_closing_ends_the_process_and_removes_its_files(folder: Path) -> None:
    groupings = Groupings()
    wait(groupings, Wanted(folder, 0.9), 20)
    result = groupings._results[Wanted(folder, 0.9)]
    groupings.first_page(Wanted(folder, 0.8), 20, 10)
    assert groupings._job is not None
    folders = [Path(result.folder.name), Path(groupings._job.folder.name)]
    assert all(one.is_dir() for one in folders)
    groupings.close()
    assert children() == []
    assert not any(one.exists() for one in folders)
    with pytest.raises(InvalidStore, match="stopping"):
        groupings.first_page(Wanted(folder, 0.9), 20, 10)


def test_a_process_that_is_killed_is_an_error_once(folder: Path) -> None:
    with closing(Groupings()) as groupings:
        groupings.first_page(Wanted(folder, 0.9), 20, 10)
        assert groupings._job is not None
        os.kill(groupings._job.process._process.pid, 9)
        with pytest.raises(InvalidStore, match="ended with status -9"):
            wait(groupings, Wanted(folder, 0.9), 20)
        assert len(wait(groupings, Wanted(folder, 0.9), 20).groups) == 10


def test_what_the_process_refuses_is_raised(folder: Path, tmp_path: Path) -> None:
    with closing(Groupings()) as groupings:
        with pytest.raises(InvalidRequest, match="expected a number above 0"):
            wait(groupings, Wanted(folder, 1.5), 20)
        with pytest.raises(InvalidStore, match="no store there"):
            wait(groupings, Wanted(tmp_path / "none", 0.9), 20)


def test_the_process_ends_when_its_parent_closes_the_pipe(folder: Path) -> None:
    with closing(Groupings()) as groupings:
        groupings.first_page(Wanted(folder, 0.9), 20, 10)
        assert groupings._job is not None
        process = groupings._job.process._process
        assert process.stdin is not None
        process.stdin.close()
        # It may have been done by then.
        assert process.wait(30) in (0, 1)


def test_only_so_many_results_are_kept(folder: Path) -> None:
    with closing(Groupings()) as groupings:
        for number in range(6):
            wait(groupings, Wanted(folder, 0.9 + number / 100), 20)
        assert [round(wanted.threshold, 2) for wanted in groupings._results] == [0.92, 0.93, 0.94, 0.95]
