"""A process that changes a store until it is killed, and prints each change before and after making it.

    python -m tests.proofs.writer FOLDER SEED

LOOKALIKE_KILL_AT names a point, and LOOKALIKE_KILL_AFTER the number of passes before the process kills itself there.
This module wraps functions of the store and its VFS to mark the points; the store's own code is unchanged.
LOOKALIKE_SNAPSHOTS=1 saves snapshots all the time, LOOKALIKE_CLOCK=1 makes the clock jump by a day.
"""

import functools
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

from service import files
from service.errors import InvalidStore
from service.store import maintenance, snapshot, vector_map
from service.store.catalog import FILE, CatalogWriter
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from service.store.live_index import LiveIndex
from service.store.maintenance import Maintenance
from service.store.vector_map import VectorMap
from tests.proofs.truth import State, after, do, new_item, opened, some_change, writer_of

THREADS = 3
# Items that no thread changes. With so many, loading a snapshot compares only a sample with the catalog.
FIXED = 300
POINTS = [
    "before a transaction",
    "after a row was put",
    "after a row was removed",
    "before the log is written",
    "in the middle of writing the log",
    "after the log was written",
    "before the log is synced",
    "after the log was synced",
    "in the middle of a checkpoint",
    "after a checkpoint wrote",
    "before a checkpoint is synced",
    "after a checkpoint was synced",
    "after the commit, before the index",
    "after the index, before the answer",
    "in the middle of a snapshot",
    "before a snapshot is published",
    "before a snapshot is synced",
    "before a snapshot is renamed",
    "after a snapshot was renamed",
    "while a snapshot is read",
    "before what came later is replayed",
    "while a store is made",
    "before rows of the map are written",
    "in the middle of rows of the map",
    "after rows of the map were written",
    "before the map is synced",
    "before the store is closed",
    "in the middle of a store that is closed",
    "after the store was closed",
]


def ids_of(thread: int) -> list[str]:
    """Return the ids that only this thread changes."""
    return [f"t{thread} {n}" for n in range(12)]


def fixed() -> State:
    """Return the state of a new store: the items that no thread changes."""
    state: State = {}
    for n in range(FIXED):
        state = after(state, ["put", {f"fixed {n}": [n % 40, n % 10]}])
    return state


def say(*words: Any) -> None:
    """Print a line atomically."""
    os.write(1, (json.dumps(words) + "\n").encode())


_left = itertools.count(int(os.environ.get("LOOKALIKE_KILL_AFTER", "0")), -1)


def at(point: str) -> None:
    """Kill the process if this is the chosen point and it was passed often enough."""
    if point == os.environ.get("LOOKALIKE_KILL_AT") and next(_left) <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def around(owner: Any, name: str, before: str = "", behind: str = "") -> None:
    """Wrap a function with a point before and a point behind it."""
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments: Any, **named: Any) -> Any:
        at(before)
        result = inner(*arguments, **named)
        at(behind)
        return result

    setattr(owner, name, outer)


class Files(apsw.VFS):
    """SQLite's own VFS with points around writes and syncs."""

    def __init__(self) -> None:
        super().__init__("points", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return Points(name, flags)


class Points(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self.log = path.endswith("-wal")
        self.database = path.endswith(FILE)
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        middle = "in the middle of writing the log" if self.log else "in the middle of a checkpoint"
        if self.log:
            at("before the log is written")
        if (self.log or self.database) and os.environ.get("LOOKALIKE_KILL_AT") == middle:
            super().xWrite(data[: len(data) // 2], offset)
            at(middle)
        super().xWrite(data, offset)
        at("after the log was written" if self.log else "after a checkpoint wrote")
        at("in the middle of a store that is closed" if closing.is_set() else "")
        at("" if made.is_set() else "while a store is made")

    def xSync(self, flags: int) -> None:  # noqa: N802
        at("before the log is synced" if self.log else "before a checkpoint is synced")
        super().xSync(flags)
        at("after the log was synced" if self.log else "after a checkpoint was synced")


made, closing = threading.Event(), threading.Event()


def put_points() -> None:
    """Wrap the functions of the store with their points."""
    around(CatalogWriter, "transaction", "before a transaction")
    around(CatalogWriter, "put", behind="after a row was put")
    around(CatalogWriter, "remove", behind="after a row was removed")
    around(CatalogReader, "close", "before the store is closed")
    around(CatalogWriter, "close", behind="after the store was closed")
    around(LiveIndex, "apply", "after the commit, before the index", "after the index, before the answer")
    around(CatalogReader, "changed", "before what came later is replayed")
    around(VectorMap, "write", "before rows of the map are written", "after rows of the map were written")
    around(VectorMap, "sync", "before the map is synced")
    write = vector_map._write

    def torn(file: int, data: bytes, place: int) -> None:
        write(file, data[: len(data) // 2], place)
        at("in the middle of rows of the map")
        write(file, data, place)

    vector_map._write = torn
    around(snapshot, "_put", behind="in the middle of a snapshot")
    around(snapshot, "publish", "before a snapshot is published")
    around(snapshot, "_parse", "while a snapshot is read")
    around(files, "sync", "before a snapshot is synced")
    around(Path, "rename", "before a snapshot is renamed", "after a snapshot was renamed")


def jump() -> None:
    """Make the clock jump by up to a day, forward or back, at every call."""
    real, real_ns, chance = time.time, time.time_ns, random.Random(0)
    time.time = lambda: real() + chance.choice([-86_400, 0, 86_400])
    time.time_ns = lambda: real_ns() + chance.choice([-86_400, 0, 86_400]) * 10**9


def work(store: EmbeddedStore, thread: int, chance: random.Random) -> None:
    """Change a store until the process ends or the store is closed."""
    for number in itertools.count():
        change = some_change(chance, ids_of(thread))
        say("begin", thread, number, change)
        try:
            do(store, change)
        except InvalidStore:
            if closing.is_set():
                return
            os.abort()
        say("done", thread, number)


def main() -> None:
    """Open the store, fill a new one, and change it in threads; close it when the point lies in closing."""
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    files = Files()
    put_points()
    if os.environ.get("LOOKALIKE_CLOCK") == "1":
        jump()
    if os.environ.get("LOOKALIKE_SNAPSHOTS") == "1":
        vars(maintenance)["_QUIET_S"] = 0.0
        Maintenance._snapshot_after = lambda _: 7  # type: ignore[assignment, method-assign]
    store = opened(folder)
    made.set()
    writer_of(store)._database.execute("PRAGMA wal_autocheckpoint = 8").fetchall()
    if not store.count():
        store.add([new_item(id, *kept) for id, kept in fixed().items()])
    say("ready")
    for thread in range(THREADS):
        chance = random.Random(seed * THREADS + thread)
        threading.Thread(target=work, args=(store, thread, chance), daemon=True).start()
    if "closed" in os.environ.get("LOOKALIKE_KILL_AT", ""):
        time.sleep(0.2)
        closing.set()
        store.close()
    time.sleep(60)
    del files


if __name__ == "__main__":
    main()
