"""The power goes while the store is written: nothing that was acknowledged is lost. With less care, it is."""

import os
import random
from contextlib import suppress
from pathlib import Path

import apsw
import pytest

from service.errors import InvalidStore
from service.store.check import examine
from service.store.snapshot import SNAPSHOT
from tests.proofs.disk import Disk
from tests.proofs.truth import Change, State, after, do, held, opened, some_change, writer_of

pytestmark = pytest.mark.proof

CYCLES = int(os.environ.get("LOOKALIKE_POWER_LOSSES", "30"))  # the long form is 300
IDS = [f"p{n}" for n in range(24)]
CHANGES = 25  # at most, between two losses


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL", "OFF"])
def test_power_loss(tmp_path: Path, synchronous: str) -> None:
    lost, cuts = 0, 0
    state: State | None = None
    folder = tmp_path
    for cycle in range(CYCLES):
        chance = random.Random(cycle)
        if state is None or cycle % 8 == 0:  # else the loss comes upon what the loss before left
            folder, state = tmp_path / f"new{cycle}", {}
        found, state, doubtful, was_cut = _until_the_power_goes(folder, state, synchronous, chance)
        cuts += was_cut
        folder = tmp_path / f"after{cycle}"
        folder.mkdir()
        for name, data in found.items():
            (folder / name).write_bytes(data)
        try:
            now = _reopened(folder, chance)
        except (InvalidStore, AssertionError) as error:
            assert synchronous != "FULL", f"cycle {cycle}: {error}"
            lost, state = lost + 1, None
            continue
        good = now in ([state] if doubtful is None else [state, after(state, doubtful)])
        assert good or synchronous != "FULL", f"cycle {cycle}: expected {state} or that and {doubtful}, found {now}"
        lost, state = lost + (not good), now
    print(
        f"\nsynchronous={synchronous}: {lost} of {CYCLES} power losses lost what was acknowledged; {cuts} came in work"
    )
    assert cuts > CYCLES / 2
    assert synchronous == "FULL" or lost, "this test cannot fail"


def _until_the_power_goes(
    folder: Path, state: State, synchronous: str, chance: random.Random
) -> tuple[dict[str, bytes], State, Change | None, bool]:
    """The files then, what was acknowledged, what was not yet, and whether the power went in the middle of work."""
    found: dict[str, bytes] | None = None
    cut_at = int(10 ** chance.uniform(0, 2.7))

    def before(count: int, name: str, what: str) -> None:
        nonlocal found
        if count >= cut_at and found is None:  # nobody looks at what is written after that
            found = look()
            raise apsw.IOError("the power is gone")

    def look() -> dict[str, bytes]:
        found = disk.after_power_loss(chance)
        if (folder / SNAPSHOT).exists():
            found[SNAPSHOT] = (folder / SNAPSHOT).read_bytes()
        return found

    doubtful = None
    with Disk(before) as disk:
        try:
            store = opened(folder)
        except InvalidStore:
            assert found is not None
            return found, state, None, True
        pragmas = [f"wal_autocheckpoint = {chance.choice([4, 16, 1000])}"]
        pragmas += [] if synchronous == "FULL" else [f"synchronous = {synchronous}"]  # FULL is the store's own
        for pragma in pragmas:
            writer_of(store)._database.execute(f"PRAGMA {pragma}").fetchall()
        for _ in range(chance.randrange(CHANGES)):
            doubtful = some_change(chance, IDS)
            try:
                do(store, doubtful)
            except InvalidStore:
                break
            if found is not None:  # gone in a checkpoint after the commit, or with one that asked for no sync
                break
            state, doubtful = after(state, doubtful), None
            if chance.random() < 0.1:
                store._maintenance.save()
        with suppress(apsw.Error):  # the real SQLite says nothing of what fails while it closes
            if chance.random() < 0.3:
                store.close()
        was_cut = found is not None
        found = look() if found is None else found
        with suppress(apsw.Error):
            store.close()
        return found, state, doubtful, was_cut


def _reopened(folder: Path, chance: random.Random) -> State:
    """What the store holds, read by a reader or by a writer."""
    read_only = chance.random() < 0.5 and (folder / "catalog.sqlite").exists()
    try:
        store = opened(folder, read_only=read_only)
    except InvalidStore:
        if not read_only:
            raise
        store = opened(folder)  # what was never finished needs a writer
    try:
        return held(store)
    finally:
        store.close()
        assert not list(examine(folder))
