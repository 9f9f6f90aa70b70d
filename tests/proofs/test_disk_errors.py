"""A write or a sync fails, once or for good: the store raises, loses nothing acknowledged and keeps searching."""

import os
import random
import resource
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import apsw
import pytest

from service.errors import InvalidStore
from service.store.check import examine
from service.store.snapshot import SNAPSHOT
from tests.proofs.child import in_child
from tests.proofs.disk import Disk
from tests.proofs.truth import Change, State, after, do, held, opened, some_change, writer_of

pytestmark = pytest.mark.proof

# The first writes and syncs of a new store.
POINTS = 200
# 1 in the long form.
STEP = int(os.environ.get("LOOKALIKE_ERRORS_STEP", "8"))
IDS = [f"p{n}" for n in range(16)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError], ids=["EIO", "ENOSPC"])
def test_disk_errors(tmp_path: Path, error: type[apsw.Error], lasting: bool) -> None:
    outcomes = Counter[str]()
    for point in range(1, POINTS + 1, STEP):
        outcomes[_fails_at(tmp_path / f"point{point}", point, error, lasting)] += 1
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    assert outcomes["an error of write"] and outcomes["an error of sync"]


def _fails_at(folder: Path, point: int, error: type[apsw.Error], lasting: bool) -> str:
    """Change a store until a write or sync fails, check the aftermath, and return which of them failed."""
    failed, opening, state, doubtful = "", True, State(), None

    def before(count: int, _: str, what: str) -> None:
        nonlocal failed
        if count == point or (lasting and count > point and not opening):
            failed = failed or what
            raise error("the disk is broken")

    with Disk(before) as disk:
        store = None
        try:
            store = opened(folder)
        except InvalidStore:
            assert failed
        opening = False
        if store is not None:
            writer_of(store)._database.execute("PRAGMA wal_autocheckpoint = 8").fetchall()
            state, doubtful = _work(store, random.Random(1))
            assert failed and doubtful, "no error was raised"
            # apsw raises for a checkpoint that fails after the commit, so the change may be stored.
            assert held(store) in (state, after(state, doubtful)), "searches do not go on"
            for change in (["put", {"p1": [1, 1]}], ["remove", "p1"], ["describe", "p1", 1]):
                with pytest.raises(InvalidStore, match=r"read-only until (the service starts again|there is room)"):
                    do(store, change)
            assert held(store) in (state, after(state, doubtful)), "searches do not go on"
            # SQLite itself ignores failures while closing.
            with suppress(apsw.Error):
                store.close()
        files = disk.after_kill()
    reopened = folder.with_name(folder.name + " reopened")
    reopened.mkdir()
    for name, data in files.items():
        (reopened / name).write_bytes(data)
    if (folder / SNAPSHOT).exists():
        (reopened / SNAPSHOT).write_bytes((folder / SNAPSHOT).read_bytes())
    store = opened(reopened)
    assert held(store) in (state, state if doubtful is None else after(state, doubtful)), f"lost something at {point}"
    do(store, ["put", {"more": [3, 3]}])
    store.close()
    assert not list(examine(reopened))
    return f"an error of {failed}"


def _work(store: object, chance: random.Random) -> tuple[State, Change | None]:
    state = State()
    for _ in range(POINTS):
        change = some_change(chance, IDS)
        try:
            do(store, change)  # type: ignore[arg-type]
        except InvalidStore:
            return state, change
        state = after(state, change)
    return state, None


@pytest.mark.parametrize("most_bytes", [0, 1, 100, 1000, 3000])
def test_no_room_for_a_snapshot(tmp_path: Path, most_bytes: int) -> None:
    store = opened(tmp_path / "store")
    state = State()
    for change in (["put", {f"p{n}": [n % 40, n % 10] for n in range(200)}], ["remove", "p7"]):
        do(store, change)
        state = after(state, change)
    store.close()
    assert (tmp_path / "store" / SNAPSHOT).stat().st_size > 3000
    assert in_child(partial(_fills_the_disk, tmp_path / "store", state, most_bytes)) == 0
    store = opened(tmp_path / "store")
    assert held(store) == after(state, ["remove", "p8"])
    store.close()


def _fills_the_disk(folder: Path, state: State, most_bytes: int) -> None:
    store = opened(folder)
    do(store, ["remove", "p8"])
    before = (folder / SNAPSHOT).read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    store._maintenance._unsaved = 10**9
    store.settle()
    assert (folder / SNAPSHOT).read_bytes() == before, "a partial snapshot replaced a complete one"
    assert held(store) == after(state, ["remove", "p8"])
    # The write-ahead log does not fit either.
    if most_bytes < 1000:
        with pytest.raises(InvalidStore):
            do(store, ["remove", "p9"])
        assert held(store) == after(state, ["remove", "p8"])
    store.close()
