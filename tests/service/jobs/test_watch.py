"""`lookalike index --watch`: a store follows a folder while it changes."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.jobs.sync import Synced, Target
from service.jobs.watch import Settling, follow
from tests.conftest import encoded, scene
from tests.service.jobs.test_sync import Shelf


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Return a folder of six pictures and no store yet."""
    shelf = Shelf(tmp_path)
    for n in range(6):
        os.utime(shelf.write(f"{n}.png", n), (10**9, 10**9))
    return shelf


@contextmanager
def following(shelf: Shelf) -> Iterator[list[Synced]]:
    """Follow the folder in a thread until the block ends; yield what the syncs did."""
    done: list[Synced] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=follow, args=(str(shelf.pictures), Target(shelf.settings), None, False, done.append, stop)
    )
    thread.start()
    try:
        until(lambda: len(done) > 0)
        yield done
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.05)


def test_each_change_of_a_folder_arrives_and_metadata_stay(shelf: Shelf) -> None:
    with following(shelf) as done:
        assert len(shelf.items()) == 6
        shelf.describe(**{"0": "of 0", "1": "of 1"})
        (shelf.pictures / "0.png").rename(shelf.pictures / "zero.png")
        until(lambda: "zero.png" in shelf.items())
        # As many programs save: the old file goes first.
        (shelf.pictures / "1.png").unlink()
        shelf.write("1.png", 11)
        until(lambda: done[-1].changes.replaced != {})
        (shelf.pictures / "2.png").unlink()
        until(lambda: "2.png" not in shelf.items())
        shelf.write("new/deep/one.png", 12)
        until(lambda: "new/deep/one.png" in shelf.items())
        told = {id: metadata.get("told") for id, metadata in shelf.items().items()}
        assert (told["zero.png"], told["1.png"]) == ("of 0", "of 1")
        assert set(told) == {"zero.png", "1.png", "3.png", "4.png", "5.png", "new/deep/one.png"}


@pytest.mark.slow("waits for changes of a folder")
def test_a_file_that_grows_is_waited_for_and_a_bad_one_is_tried_once(shelf: Shelf) -> None:
    with following(shelf) as done:
        data = encoded(scene(600, 400, seed=20), "BMP")
        with (shelf.pictures / "slow.bmp").open("wb") as file:
            for start in range(0, len(data), len(data) // 8 + 1):
                file.write(data[start : start + len(data) // 8 + 1])
                file.flush()
                os.fsync(file.fileno())
                time.sleep(0.4)
        until(lambda: "slow.bmp" in shelf.items())
        assert not any(one.changes.account.failures for one in done)
        (shelf.pictures / "bad.png").write_bytes(b"no picture")
        until(lambda: bool(done[-1].changes.account.failures))
        told = len(done)
        shelf.write("good.png", 21)
        until(lambda: len(done) > told)
        assert "good.png" in shelf.items()
        assert [len(one.changes.account.failures) for one in done[told:]] == [0]


@pytest.mark.slow("waits for changes of a folder")
def test_a_folder_that_is_gone_for_a_while_loses_nothing(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    with following(shelf):
        away = shelf.pictures.with_name("away")
        shelf.pictures.rename(away)
        printed = ""

        def said(text: str) -> bool:
            nonlocal printed
            printed += capsys.readouterr().err
            return text in printed

        until(lambda: said("cannot be followed: No such file"))
        # The place of a disk that is not mounted.
        shelf.pictures.mkdir()
        until(lambda: said("is it mounted?"))
        assert len(shelf.items()) == 6
        shelf.pictures.rmdir()
        (away / "3.png").unlink()
        away.rename(shelf.pictures)
        until(lambda: "3.png" not in shelf.items())
        assert len(shelf.items()) == 5


def test_the_command_follows_until_ctrl_c(shelf: Shelf) -> None:
    command = shelf.command("--watch", "--json")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["added"] == 6
    shelf.write("late.png", 30)
    assert json.loads(process.stdout.readline())["changes"]["added"] == ["late.png"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_what_settles() -> None:
    settling = Settling()
    old, now = (1, 0), (1, time.time_ns())
    # What is gone at the start is gone; a file that was written a moment ago may still grow.
    assert [settling("a", None), settling("b", old), settling("c", now)] == ["take", "take", "wait"]
    settling.begin()
    assert settling("a", None) == "wait"
    time.sleep(0.6)
    settling.begin()
    assert [settling("a", None), settling("b", old)] == ["take", "take"]
    settling.fail(["b"])
    settling.begin()
    assert [settling("b", old), settling("b", (2, 0))] == ["pass", "take"]
