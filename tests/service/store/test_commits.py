"""Group commit: which callers share a commit, and which caller gets which error."""

import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apsw
import pytest

from service.errors import InvalidRequest, InvalidStore, StorePaused
from service.store import commits
from service.store.catalog import FILE, CatalogWriter, Change
from service.store.commits import Commits
from service.store.embedded import EmbeddedStore
from tests.service.store.quota import no_room
from tests.service.store.test_embedded import D, card, item, unit


@pytest.fixture
def store(tmp_path: Path) -> EmbeddedStore:
    return EmbeddedStore(tmp_path / "store", card(), D)


def writer_of(store: EmbeddedStore) -> CatalogWriter:
    assert store._writer is not None
    return store._writer


def together(store: EmbeddedStore, count: int) -> "list[object]":
    """Let `count` callers wait for one commit and return the result or exception of each."""
    entered, go = threading.Event(), threading.Event()

    def hold(_: CatalogWriter, changes: list[Change]) -> None:
        entered.set()
        go.wait(10)

    with ThreadPoolExecutor(count + 1) as pool:
        first = pool.submit(store._commits.run, hold)
        entered.wait(10)
        jobs = [pool.submit(change, store, n) for n in range(count)]
        while len(store._commits._waiting) < count:
            time.sleep(0.001)
        go.set()
        first.result(10)
        return [job.exception(10) or job.result() for job in jobs]


def change(store: EmbeddedStore, n: int) -> object:
    if n % 3 == 1:

        def refuse(_: dict[str, object]) -> dict[str, object]:
            raise InvalidRequest("too large")

        return store.set_metadata("there", refuse)
    if n % 3 == 2:
        return store.add([item(f"p{n}", unit(D, seed=n)), item("half", unit(D), name="\ud800")])
    return store.add([item(f"p{n}", unit(D, seed=n))])


def test_callers_share_a_commit_and_keep_their_own_errors(store: EmbeddedStore, tmp_path: Path) -> None:
    store.add([item("there", unit(D))])
    commits: list[int] = []

    def count() -> bool:
        commits.append(1)
        return False

    writer_of(store)._database.set_commit_hook(count)
    outcomes = together(store, 9)
    # The held commit is one; all nine callers share the other.
    assert len(commits) == 2
    for n, outcome in enumerate(outcomes):
        assert (
            outcome == [True]
            if n % 3 == 0
            else isinstance(outcome, (InvalidRequest, UnicodeEncodeError)[n % 3 - 1 : n % 3])
        )
    store.close()
    store = EmbeddedStore(tmp_path / "store", card(), D)
    assert [found.id for found in store.scan(20)[0]] == ["there", "p0", "p3", "p6"]
    assert store.count() == 4
    store.close()


def test_an_answer_is_given_after_the_commit(store: EmbeddedStore, tmp_path: Path) -> None:
    other = apsw.Connection(str(tmp_path / "store" / FILE), flags=apsw.SQLITE_OPEN_READONLY)
    for n in range(20):
        store.add([item(f"p{n}", unit(D))])
        assert next(other.execute("SELECT count(*) FROM items"))[0] == n + 1
        assert store.count() == n + 1
    other.close()
    store.close()


def full(store: EmbeddedStore) -> None:
    """Let SQLite find no room, as on a full disk."""
    pages = next(writer_of(store)._database.execute("PRAGMA page_count"))[0]
    writer_of(store)._database.execute(f"PRAGMA max_page_count = {pages}").fetchall()


def roomy(store: EmbeddedStore) -> None:
    writer_of(store)._database.execute("PRAGMA max_page_count = 1000000").fetchall()


MANY = [item(f"p{n}", unit(D, seed=n)) for n in range(1000)]


def test_when_the_commit_fails_nobody_is_acknowledged_and_searches_go_on(
    store: EmbeddedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.add([item("there", unit(D))])
    full(store)
    with pytest.raises(StorePaused, match=r"the store cannot be written: .*full"):
        store.add(MANY)
    assert not store.writable
    for _ in range(3):
        with pytest.raises(StorePaused, match="full; it is read-only until there is room"):
            store.remove("there")
    with pytest.raises(StorePaused, match="read-only until"):
        store.set_metadata("there", lambda metadata: metadata)
    assert [record.levelname for record in caplog.records if "cannot be written" in record.getMessage()] == ["ERROR"]
    assert store.count() == 1
    assert store.search(unit(1, D), 5)[0][0].id == "there"
    assert store.get("there") is not None
    assert store.get("p0") is None
    store.close()
    with pytest.raises(InvalidStore, match="the store is closed"):
        store.remove("there")
    store = EmbeddedStore(tmp_path / "store", card(), D)
    assert store.add([item("p0", unit(D))]) == [True]
    assert store.count() == 2
    store.close()


def test_a_store_takes_changes_again_when_a_full_disk_has_room(
    store: EmbeddedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "_PROBE_S", 0.02)
    store.add([item("there", unit(D))])
    for _ in range(2):
        full(store)
        with pytest.raises(StorePaused):
            store.add(MANY)
        assert not store.writable
        roomy(store)
        deadline = time.monotonic() + 10
        while not store.writable:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert store.add(MANY) == [True] * 1000
    assert store.remove("there")
    for found in (store.search(unit(1, D, seed=7), 1)[0][0].id, store.search(MANY[7].embedding[None], 1)[0][0].id):
        assert found == "p7"
    store.close()
    again = EmbeddedStore(tmp_path / "store", card(), D)
    assert again.count() == 1000
    again.close()


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT], ids=["a full disk", "a quota"])
def test_a_write_without_room_pauses_the_store(
    store: EmbeddedStore, reason: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(commits, "_PROBE_S", 0.02)
    store.add([item("there", unit(D))])
    with no_room(reason):
        with pytest.raises(StorePaused, match=r"the store cannot be written: .*(full|[Qq]uota)"):
            store.add([item("late", unit(D, seed=1))])
        with pytest.raises(StorePaused, match="it is read-only until there is room"):
            store.remove("there")
        # Long enough for trial writes that find no room either.
        time.sleep(0.2)
        assert not store.writable
        assert store.search(unit(1, D), 5)[0][0].id == "there"
    assert [record.levelname for record in caplog.records if "cannot be written" in record.getMessage()] == ["ERROR"]
    deadline = time.monotonic() + 10
    while not store.writable:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert store.add([item("late", unit(D, seed=1))]) == [True]
    assert store.count() == 2
    store.close()


def test_another_failed_write_still_wants_a_restart(store: EmbeddedStore) -> None:
    with no_room(errno.EIO), pytest.raises(InvalidStore, match="cannot be written") as raised:
        store.add([item("a", unit(D))])
    assert not isinstance(raised.value, StorePaused)
    with pytest.raises(InvalidStore, match="read-only until the service starts again"):
        store.add([item("a", unit(D))])
    store.close()


def test_a_store_that_could_not_be_replaced_takes_changes_again(store: EmbeddedStore) -> None:
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InvalidRequest), store.retiring("replaced"):
            waiting = pool.submit(store.add, [item("a", unit(D))])
            assert store.search(unit(1, D), 5) == [[]]
            raise InvalidRequest("the other store could not take over")
        assert waiting.result(10) == [True]
        with store.retiring("replaced"):
            late = pool.submit(store.remove, "a")
        with pytest.raises(InvalidStore, match="replaced"):
            late.result(10)
    assert store.search(unit(1, D), 5)[0][0].id == "a"
    store.close()


def test_what_cannot_reach_the_index_is_an_error_of_the_store(store: EmbeddedStore) -> None:
    def apply(changes: list[Change], sequence: int) -> None:
        raise MemoryError("no room")

    group = Commits(store._writer, apply)
    with pytest.raises(MemoryError):
        group.run(lambda *_: None)
    with pytest.raises(InvalidStore, match="cannot be written: no room; it is read-only until"):
        group.run(lambda *_: None)
    store.close()


def test_what_was_committed_and_did_not_reach_the_index_is_found_all_the_same(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([item("a", unit(D)), item("b", unit(D, seed=1))])

    def no_room(*_: object) -> None:
        monkeypatch.undo()
        raise MemoryError("no room")

    monkeypatch.setattr(store._live.index, "add", no_room)
    with pytest.raises(MemoryError):
        store.add([item("a", unit(D, seed=2)), item("c", unit(D, seed=3))])
    assert store.count() == 3
    for seed, id in ((1, "b"), (2, "a"), (3, "c")):
        hits = store.search(unit(1, D, seed=seed), 3)[0]
        assert (len(hits), hits[0].id) == (3, id)
    with pytest.raises(InvalidStore, match="read-only until"):
        store.remove("a")
    store.close()


def test_a_closed_store_says_so(store: EmbeddedStore) -> None:
    store.add([item("a", unit(D))])
    store.close()
    store.close()
    for call in (lambda: store.get("a"), lambda: store.remove("a"), lambda: store.search(unit(1, D), 1)):
        with pytest.raises(InvalidStore, match="the store is closed"):
            call()
