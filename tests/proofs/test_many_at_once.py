"""Concurrent writers and searches: every search equals a plain NumPy search in one state of the store.

The test records the catalog's state whenever a commit reaches the index. A search must agree with a state between the
last one before its start and the last one before its end.
"""

import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.store import Hit
from service.store.catalog import Change
from service.store.embedded import EmbeddedStore
from service.store.faiss_index import FaissIndex
from service.store.filters import parse_filter
from tests.proofs.truth import (
    ALL,
    FILTER,
    NUMBERS,
    SEEDS,
    VECTORS,
    D,
    Kept,
    State,
    after,
    assert_finds,
    do,
    encoder,
    held,
    nearest,
    new_item,
    opened,
    some_change,
)

pytestmark = pytest.mark.proof

# 600 in the long form.
SECONDS = float(os.environ.get("LOOKALIKE_SECONDS", "10"))
WRITERS, READERS = 4, 8
FEW = FILTER["n"]["$lt"]


class Watched(EmbeddedStore):
    """A store that records its latest states, each with the sequence number of its last change."""

    def write_down(self, changes: list[Change], sequence: int) -> None:
        """Apply a commit, and keep the state that it made."""
        last = self.states[-1][1]
        latest = dict(last)
        since = self.states[-1][0]
        with self._reader.connections.borrow() as database:
            for key, _ in database.execute("SELECT key, id FROM removed WHERE sequence > ?", (since,)):
                latest.pop(key, None)
            # Ordered by key, so that new items come last, as in a search.
            query = "SELECT key, id, digest, metadata ->> 'n' FROM items WHERE sequence > ? ORDER BY key"
            for key, id, digest, n in database.execute(query, (since,)):
                latest[key] = (id, Kept(int(digest), n))
        self.states.append((sequence, latest))
        self.apply(changes, sequence)
        self.reached = sequence

    def watch(self) -> None:
        """Start recording with the current state."""
        self.apply, self._commits._apply = self._commits._apply, self.write_down
        self.states: deque[tuple[int, dict[int, tuple[str, Kept]]]] = deque(maxlen=5_000)
        with self._reader.connections.borrow() as database:
            rows: list[Any] = database.execute(
                "SELECT key, id, digest, metadata ->> 'n' FROM items ORDER BY key"
            ).fetchall()
        self.reached = self._reader.sequence()
        self.states.append((self.reached, {key: (id, Kept(int(digest), n)) for key, id, digest, n in rows}))

    def between(self, first: int) -> list[State]:
        """Return the states since a sequence number, each in insertion order."""
        found = [state for sequence, state in list(self.states) if sequence >= first]
        assert self.states[0][0] <= first, "a search outlived the recorded states"
        return [dict(state.values()) for state in found]


@pytest.mark.timeout(int(4 * SECONDS) + 120)
@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_writers_and_searches_at_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = [(n % SEEDS if kind == "exact" else n, n % NUMBERS) for n in range(60 if kind == "exact" else 2000)]
    filled = opened(tmp_path / "store", exact_limit=1000)
    filled.add([new_item(f"fixed {n}", *numbers) for n, numbers in enumerate(fixed)])
    filled.settle()
    filled.close()
    store = Watched(tmp_path / "store", encoder(), D, exact_limit=1000)
    assert (store.partition is None) == (kind == "exact")
    store.watch()
    crowd = Crowd(store, kind == "exact")
    add = FaissIndex.add

    def slowly(*arguments: Any) -> None:
        # Gives other threads time to interleave, if a lock lets them.
        time.sleep(0.01)
        add(*arguments)

    monkeypatch.setattr(FaissIndex, "add", slowly)
    crowd.run()
    print(f"\n{kind}: {dict(crowd.done)} in {SECONDS:.0f} s")
    assert not crowd.errors, crowd.errors[0]
    assert min(crowd.done["searches"], crowd.done["changes"], crowd.done["beside changes"]) > 3 * SECONDS
    for writer, own in crowd.own.items():
        assert {id: kept for id, kept in _now(store).items() if id.startswith(f"w{writer} ")} == own
    now = _now(store)
    store.close()
    again = opened(tmp_path / "store", exact_limit=1000)
    assert (held(again) if kind == "exact" else _now(again)) == now
    again.close()


class Crowd:
    """Threads that write, each its own items, threads that search, and one that maintains the index."""

    def __init__(self, store: Watched, exact: bool) -> None:
        self.store, self.exact = store, exact
        self.done, self.errors = Counter[str](), list[BaseException]()
        self.own: dict[int, State] = {writer: {} for writer in range(WRITERS)}
        self.ending = threading.Event()

    def run(self) -> None:
        """Run all threads for SECONDS."""
        work: list[tuple[Callable[[int], None], int]] = [(self.write, writer) for writer in range(WRITERS)]
        work += [(self.search, reader) for reader in range(READERS)] + [(self.settle, 0)]
        threads = [threading.Thread(target=self.again, args=each) for each in work]
        for thread in threads:
            thread.start()
        self.ending.wait(SECONDS)
        self.ending.set()
        for thread in threads:
            thread.join()

    def again(self, work: Callable[[int], None], number: int) -> None:
        """Repeat work until the end or until any thread fails."""
        self.chances = getattr(self, "chances", threading.local())
        self.chances.one = random.Random(f"{work.__name__} {number}")
        try:
            while not self.ending.is_set():
                work(number)
        except BaseException as error:
            self.errors.append(error)
            self.ending.set()

    def write(self, writer: int) -> None:
        change = some_change(self.chances.one, [f"w{writer} {n}" for n in range(40)])
        do(self.store, change)
        self.own[writer] = after(self.own[writer], change)
        self.done["changes"] += 1

    def search(self, _: int) -> None:
        chance: random.Random = self.chances.one
        seeds = [chance.randrange(SEEDS) for _ in range(chance.choice([1, 1, 3]))]
        k, where = chance.choice([1, 5, 20]), chance.choice([None, FILTER])
        first = self.store.reached
        found = self.store.search(VECTORS[seeds], k, None if where is None else parse_filter(where))
        states = self.store.between(first)
        right = any(self.agrees(state, where is not None, seeds, k, found) for state in states)
        assert right, f"seeds {seeds}, k {k}, {where}: {found} in none of {len(states)} states"
        self.done["searches"] += 1
        self.done["beside changes"] += len(states) > 1

    def agrees(self, state: State, filtered: bool, seeds: list[int], k: int, found: list[list[Hit]]) -> bool:
        """Return whether hits fit a state: all the nearest for an exact index, else correct items in order."""
        matching = {id: kept for id, kept in state.items() if not filtered or kept.n < FEW}
        order = {id: place for place, id in enumerate(matching)}
        for seed, hits in zip(seeds, found, strict=True):
            if self.exact and [(hit.id, hit.metadata["n"]) for hit in hits] != nearest(matching, VECTORS[seed], k):
                return False
            for hit in hits:
                kept = matching.get(hit.id)
                if kept is None or hit.metadata != {"n": kept.n} or not _close(hit.score, seed, kept.seed):
                    return False
            ranks = [(-hit.score, order[hit.id]) for hit in hits]
            if ranks != sorted(set(ranks)):
                return False
        return True

    def settle(self, _: int) -> None:
        """Save a snapshot or rebuild the index."""
        # The store's own thread may be at it.
        with self.store._maintenance._settling:
            if self.chances.one.random() < 0.5:
                self.store._maintenance.save()
            else:
                self.store._maintenance.rebuild()
        self.done["indexes and snapshots"] += 1
        self.ending.wait(0.2)


def _close(score: float, first: int, second: int) -> bool:
    return abs(score - float(VECTORS[first].astype(np.float64) @ ALL[second])) < 1e-6


def _now(store: EmbeddedStore) -> State:
    items: list[Any] = store.scan(100_000)[0]
    return {item.id: Kept(int(item.digest), item.metadata["n"]) for item in items}


class Machine(RuleBasedStateMachine):
    """Random sequences of operations by one writer and one reader; hypothesis shrinks a failing one."""

    ids = st.sampled_from([f"p{n}" for n in range(8)])
    seeds, numbers = st.integers(0, 4), st.integers(0, NUMBERS - 1)

    @initialize()
    def open(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = opened(Path(self.folder.name) / "store")
        self.reader: EmbeddedStore | None = None
        self.state: State = {}

    @rule(items=st.dictionaries(ids, st.tuples(seeds, numbers), min_size=1, max_size=4))
    def put(self, items: Mapping[str, tuple[int, int]]) -> None:
        self.change(["put", items])

    @rule(id=ids)
    def remove(self, id: str) -> None:
        self.change(["remove", id])

    @rule(id=ids, n=numbers)
    def describe(self, id: str, n: int) -> None:
        self.change(["describe", id, n])

    @rule(id=ids)
    def fail(self, id: str) -> None:
        self.change(["fail", id])

    def change(self, change: Any) -> None:
        do(self.store, change)
        self.state = after(self.state, change)

    @rule(save=st.booleans())
    def make_index(self, save: bool) -> None:
        with self.store._maintenance._settling:
            self.store._maintenance.rebuild()
            if save:
                self.store._maintenance.save()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = opened(Path(self.folder.name) / "store")

    @rule()
    def read_beside(self) -> None:
        if self.reader is not None:
            self.reader.close()
        self.reader = opened(Path(self.folder.name) / "store", read_only=True)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "store"):
            for store in (self.store, self.reader):
                if store is not None:
                    # Lists compare the insertion order, too.
                    assert list(_now(store).items()) == list(self.state.items())
                    assert_finds(store, self.state, 5)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            if self.reader is not None:
                self.reader.close()
            self.store.close()
            self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis.settings(
    max_examples=int(2 * SECONDS),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
