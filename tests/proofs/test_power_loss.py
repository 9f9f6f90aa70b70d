"""Power loss during writes loses nothing acknowledged with synchronous=FULL, and loses some with weaker settings."""

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Self

import apsw
import pytest

from service.errors import InvalidStore
from service.store.check import examine
from service.store.snapshot import SNAPSHOT
from service.store.vector_map import VECTORS, VectorMap
from tests.proofs.disk import SECTOR, Disk
from tests.proofs.truth import Change, State, after, do, held, opened, some_change, writer_of

pytestmark = pytest.mark.proof

# 300 in the long form.
CYCLES = int(os.environ.get("LOOKALIKE_POWER_LOSSES", "30"))
IDS = [f"p{n}" for n in range(24)]
MOST_CHANGES_PER_CYCLE = 25


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL", "OFF"])
def test_power_loss(tmp_path: Path, synchronous: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A store is small here: the usual sample would compare all of its vectors when it is opened.
    monkeypatch.setattr("service.store.maintenance._SAMPLED_CODES", 1)
    lost, cuts = 0, 0
    state: State | None = None
    folder = tmp_path
    for cycle in range(CYCLES):
        chance = random.Random(cycle)
        # Other cycles continue with the files that the previous power loss left.
        if state is None or cycle % 8 == 0:
            folder, state = tmp_path / f"new{cycle}", {}
        found, state, doubtful, was_cut = _until_power_loss(folder, state, synchronous, chance)
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
    print(f"\nsynchronous={synchronous}: {lost} of {CYCLES} power losses lost acknowledged changes; {cuts} hit a write")
    assert cuts > CYCLES / 2
    assert synchronous == "FULL" or lost, "this test cannot fail"


def _until_power_loss(
    folder: Path, state: State, synchronous: str, chance: random.Random
) -> tuple[dict[str, bytes], State, Change | None, bool]:
    """Change a store until the power loss.

    Returns:
        The surviving files, the acknowledged state, the unacknowledged change, and whether the loss hit a write or
        a sync.
    """
    found: dict[str, bytes] | None = None
    cut_at = int(10 ** chance.uniform(0, 2.7))

    def before(count: int, name: str, what: str) -> None:
        nonlocal found
        # Later writes do not reach the platter.
        if count >= cut_at and found is None:
            found = look()
            raise apsw.IOError("the power is gone")

    def look() -> dict[str, bytes]:
        found = disk.after_power_loss(chance)
        if (folder / SNAPSHOT).exists():
            found[SNAPSHOT] = (folder / SNAPSHOT).read_bytes()
        if (folder / VECTORS).exists():
            found[VECTORS] = platter.torn((folder / VECTORS).read_bytes(), chance)
        return found

    doubtful = None
    with Disk(before) as disk, _Platter(folder / VECTORS) as platter:
        try:
            store = opened(folder)
        except InvalidStore:
            assert found is not None
            return found, state, None, True
        pragmas = [f"wal_autocheckpoint = {chance.choice([4, 16, 1000])}"]
        # The store itself sets FULL.
        pragmas += [] if synchronous == "FULL" else [f"synchronous = {synchronous}"]
        for pragma in pragmas:
            writer_of(store)._database.execute(f"PRAGMA {pragma}").fetchall()
        for _ in range(chance.randrange(MOST_CHANGES_PER_CYCLE)):
            doubtful = some_change(chance, IDS)
            try:
                do(store, doubtful)
            except InvalidStore:
                break
            # The power failed in a checkpoint after the commit, or in a commit that did not sync.
            if found is not None:
                break
            state, doubtful = after(state, doubtful), None
            # The store's own thread may be at it.
            with store._maintenance._settling:
                if chance.random() < 0.1:
                    store._maintenance.save()
                if chance.random() < 0.1:
                    store._maintenance.write_map()
        # SQLite itself ignores failures while closing.
        with suppress(apsw.Error):
            if chance.random() < 0.3:
                store.close()
        was_cut = found is not None
        found = look() if found is None else found
        with suppress(apsw.Error):
            store.close()
        return found, state, doubtful, was_cut


class _Platter:
    """What of the map of vectors survives a power loss: all up to its last sync, and of later writes any sector."""

    def __init__(self, path: Path) -> None:
        self._path, self._synced, self._sync = path, b"", VectorMap.sync

    def __enter__(self) -> Self:
        if self._path.exists():
            self._synced = self._path.read_bytes()

        def sync(map: VectorMap) -> None:
            self._sync(map)
            self._synced = map.path.read_bytes()

        VectorMap.sync = sync  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        VectorMap.sync = self._sync  # type: ignore[method-assign]

    def torn(self, now: bytes, chance: random.Random) -> bytes:
        """Return the content after a power loss; a file that was never synced may hold anything."""
        found, share = bytearray(self._synced.ljust(len(now), b"\0")[: len(now)]), chance.choice([0.0, 0.5, 0.9, 1.0])
        for at in range(0, len(now), SECTOR):
            if chance.random() < share:
                found[at : at + SECTOR] = now[at : at + SECTOR]
        return bytes(found)


def _reopened(folder: Path, chance: random.Random) -> State:
    """Return the state of the store, opened as a reader or as a writer."""
    read_only = chance.random() < 0.5 and (folder / "catalog.sqlite").exists()
    try:
        store = opened(folder, read_only=read_only)
    except InvalidStore:
        if not read_only:
            raise
        # Only a writer can finish an incomplete store.
        store = opened(folder)
    try:
        return held(store)
    finally:
        store.close()
        assert not list(examine(folder))
