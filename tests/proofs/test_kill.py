"""kill -9 at random moments and at named points: no acknowledged change is lost, no deleted item returns.

Three threads change the store, each its own items. The change that each thread had in flight may be stored or not. The
test then opens the store as a writer or a reader, compares it with the model, and goes on with it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from service.store.check import examine
from tests.conftest import ROOT
from tests.proofs.truth import Change, State, after, held, opened
from tests.proofs.writer import POINTS, THREADS, fixed, ids_of

pytestmark = pytest.mark.proof

# 2,000 in the long form.
CYCLES = int(os.environ.get("LOOKALIKE_KILLS", "36"))
SEED = int(os.environ.get("LOOKALIKE_KILLS_SEED", "0"))
# A writer that has not reached its point by then is killed anyway.
LONGEST_S = 3.0


@pytest.mark.timeout(60 + 10 * CYCLES)
def test_kills(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, state = tmp_path / "store", State()
    deaths, acknowledged, through = Counter[str](), 0, 0
    for cycle in range(CYCLES):
        chance = random.Random(SEED * CYCLES + cycle)
        named = cycle < len(POINTS) or chance.random() < 0.5
        point = POINTS[cycle % len(POINTS)] if named else "a random moment"
        if point == "while a store is made":
            folder, state = tmp_path / f"store{cycle}", State()
        started = dict(state)
        lines, died = _killed(folder, cycle, point, chance)
        done, doubtful = _read(lines)
        if ["ready"] in lines:
            state = state or fixed()
        for change in done:
            state = after(state, change)
        deaths[point if died else "too late"] += 1
        acknowledged += len(done)

        caplog.clear()
        found = _reopened(folder, read_only=point != "while a store is made" and chance.random() < 0.5)
        assert not list(examine(folder))
        # A kill leaves the previous or the new snapshot; both are usable.
        assert not [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]
        name = f"cycle {cycle}, killed {'at' if died else 'before'} {point}"
        if not started and ["ready"] not in lines:
            assert found in ({}, fixed()), name
        for thread in range(THREADS):
            before, now = _of(thread, state), _of(thread, found)
            under_way = doubtful.get(thread)
            assert now in (before, before if under_way is None else after(before, under_way)), (
                f"{name}: thread {thread}: expected {before} or that and {under_way}, found {now}"
            )
            through += now != before
        assert all(found[id] == kept for id, kept in state.items() if id.startswith("fixed")), name
        state = found
    print(f"\n{CYCLES} kills -9: {acknowledged} changes acknowledged, none lost; {through} stored unacknowledged")
    print("\n".join(f"{count:4} at {point}" for point, count in deaths.items()))
    missed = set(POINTS) - set(deaths)
    assert len(POINTS) - len(missed) >= 12, f"never reached {missed}"


def _killed(folder: Path, cycle: int, point: str, chance: random.Random) -> tuple[list[list[Any]], bool]:
    """Run and kill a writer; return the lines that it printed and whether it reached the point."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "LOOKALIKE_KILL_AT": point,
        "LOOKALIKE_KILL_AFTER": str(chance.choice([0, 1, 5, 30]) if cycle >= len(POINTS) else 0),
        "LOOKALIKE_SNAPSHOTS": str(int("snapshot" in point or "replayed" in point or cycle % 2 == 0)),
        "LOOKALIKE_CLOCK": str(cycle // 2 % 2),
    }
    command = [sys.executable, "-m", "tests.proofs.writer", str(folder), str(SEED * CYCLES + cycle)]
    writer = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    random_moment = threading.Timer(
        chance.uniform(0.2, 1.5) if point == "a random moment" else LONGEST_S,
        writer.kill,
    )
    random_moment.start()
    output, _ = writer.communicate()
    in_time = random_moment.is_alive() or point == "a random moment"
    random_moment.cancel()
    assert writer.returncode == -signal.SIGKILL, f"ended with {writer.returncode} instead of being killed"
    return [json.loads(line) for line in output.splitlines()], in_time


def _read(lines: list[list[Any]]) -> tuple[list[Change], dict[int, Change]]:
    """Return the acknowledged changes, and the unacknowledged change of each thread."""
    done: list[Change] = []
    begun: dict[int, Change] = {}
    for what, *words in lines:
        if what == "begin":
            begun[words[0]] = words[2]
        elif what == "done":
            done.append(begun.pop(words[0]))
    return done, begun


def _of(thread: int, state: State) -> State:
    return {id: state[id] for id in ids_of(thread) if id in state}


def _reopened(folder: Path, read_only: bool) -> State:
    store = opened(folder, read_only=read_only)
    try:
        return held(store)
    finally:
        store.close()
