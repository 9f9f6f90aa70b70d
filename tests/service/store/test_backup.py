"""A backup is one complete file, whenever it is made and whatever interrupts it; a restored store has what it had."""

import errno
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from service.errors import InvalidOutput, InvalidRequest, InvalidStore
from service.gallery import Gallery
from service.generations import build, switch, written
from service.jobs.index import index_source
from service.sources import open_source
from service.store import NewItem
from service.store.backup import backup, count_in_files, restore
from service.store.catalog import FILE, read_meta
from service.store.catalog_reader import CatalogReader
from service.store.check import examine
from service.store.embedded import EmbeddedStore
from service.store.layout import current, publish
from tests.conftest import ROOT, encoded, scene
from tests.service.store.quota import no_room
from tests.service.store.test_embedded import D, card, item, unit
from tests.service.test_generations import adding, put


def ids(folder: Path, name: str) -> list[str]:
    """Open a store, and return the ids of its items."""
    with closing(EmbeddedStore(folder, card(name), D)) as store:
        return sorted(found.id for found in store.scan(9999)[0])


class Writer(threading.Thread):
    """Adds and removes items until it is stopped, and knows which are there for certain."""

    def __init__(self, store: EmbeddedStore, prefix: str) -> None:
        super().__init__(daemon=True)
        self.store, self.prefix, self.stopped = store, prefix, threading.Event()
        self.added: list[str] = []
        self.removed: list[str] = []

    def run(self) -> None:
        number = 0
        while not self.stopped.is_set():
            id = f"{self.prefix}{number}"
            put(self.store, id, bytes(number % 50 + 1))
            if number % 3 == 2:
                self.store.remove(f"{self.prefix}{number - 1}")
                self.removed.append(f"{self.prefix}{number - 1}")
            self.added.append(id)
            number += 1

    def certain(self) -> tuple[set[str], set[str]]:
        """Return the ids that are there by now, and those that are gone; the last additions may be removed yet."""
        removed = set(self.removed)
        return set(self.added[:-3]) - removed, removed


def taken(home: Path, out: Path, writer: Writer, name: str) -> None:
    """Back up and restore a store that is written meanwhile, and compare with what was acknowledged before."""
    while len(writer.added) < 20:
        time.sleep(0.01)
    there, gone = writer.certain()
    # A removal is acknowledged after the addition that comes before it in the list.
    count = backup(written(home), out)
    restored = out.with_suffix(f".{name}.store")
    assert restore(out, restored) == count
    found = set(ids(restored, name))
    assert len(found) == count
    assert there - set(writer.removed) <= found
    assert not gone & found
    assert list(examine(restored)) == []


def test_a_backup_under_writes_with_a_reindex_in_between(tmp_path: Path) -> None:
    home, out = tmp_path / "store", tmp_path / "backup.sqlite"
    with ExitStack() as opened:
        first = opened.enter_context(closing(EmbeddedStore(home, card("first"), D)))
        writer = Writer(first, "a")
        writer.start()
        taken(home, out, writer, "first")

        second = EmbeddedStore(home / "generation-2", card("second"), D)
        with closing(CatalogReader(home)) as earlier:
            build(second, earlier, home, adding(second), lambda _: None)
        second.close()
        publish(home, second.folder)
        # The service has not taken up the new generation, and goes on with the first.
        (tmp_path / "backup.first.store").rename(tmp_path / "before")
        assert written(home) == home
        taken(home, out, writer, "first")
        writer.stopped.set()
        writer.join()

        later = opened.enter_context(closing(EmbeddedStore(current(home), card("second"), D)))
        switch(first, later, home, adding(later), read_only=False)
        assert written(home) == home / "generation-2"
        first.close()
        writer = Writer(later, "b")
        writer.start()
        taken(home, out, writer, "second")
        writer.stopped.set()
        writer.join()
    # A restored store stands alone.
    assert "earlier" not in read_meta(tmp_path / "backup.second.store")


def test_pictures_in_files_are_counted(tmp_path: Path, gallery: Gallery) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(scene()))
    index_source(open_source(str(tmp_path / "pictures")), gallery)
    gallery.add("sent", encoded(scene(seed=1)), {})
    assert backup(tmp_path / "store", tmp_path / "backup") == 2
    assert count_in_files(tmp_path / "backup") == 1


def test_removed_pictures_are_not_in_the_file(tmp_path: Path) -> None:
    secret = b"a picture of somebody who wants it gone" * 1000
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        put(store, "kept", b"kept")
        put(store, "gone", secret)
        store.remove("gone")
        assert backup(store.folder, tmp_path / "backup") == 1
    assert secret[:500] not in (tmp_path / "backup").read_bytes()


LARGE = """
from pathlib import Path
from service.store.backup import backup
print("begun", flush=True)
backup(Path({folder!r}), Path({out!r}))
"""


def test_a_backup_that_is_killed_leaves_the_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "backup.sqlite"
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        put(store, "first", b"first")
        backup(store.folder, out)
        earlier = out.read_bytes()
        for n in range(8):
            large = bytes([n]) * 4_000_000
            store.add([NewItem(f"large{n}", {}, None, "0" * 64, "fp32", unit(D), b"t", large)])
        code = LARGE.format(folder=str(store.folder), out=str(out))
        killed = 0
        for delay_s in (0.005, 0.03):
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay_s)
            child.kill()
            child.communicate()
            if child.returncode:
                killed += 1
                assert out.read_bytes() == earlier
        assert killed
        assert out.with_name(out.name + ".tmp").exists()
        # What the killed ones have left is no hindrance.
        assert backup(store.folder, out) == 9
    assert not out.with_name(out.name + ".tmp").exists()
    assert restore(out, tmp_path / "restored") == 9


def test_a_restore_that_was_interrupted_starts_again(tmp_path: Path) -> None:
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        store.add([item("a", unit(D))])
        backup(store.folder, tmp_path / "backup")
    home = tmp_path / "restored"
    home.mkdir()
    (home / "LOCK").write_text("123")
    (home / f"{FILE}.tmp").write_bytes(b"half a catalog")
    assert restore(tmp_path / "backup", home) == 1
    assert sorted(path.name for path in home.iterdir()) == ["LOCK", FILE]
    assert ids(home, "encoder") == ["a"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        store.add([item("a", unit(D))])
        for out in (store.folder / FILE, store.folder / "backup", tmp_path):
            with pytest.raises(InvalidOutput, match="outside of every store's folder"):
                backup(store.folder, out)
        (tmp_path / "letter").write_text("dear reader")
        with pytest.raises(InvalidOutput, match="no backup that can be read"):
            backup(store.folder, tmp_path / "letter")
        assert (tmp_path / "letter").read_text() == "dear reader"
        assert store.count() == 1
        backup(store.folder, tmp_path / "backup")
        with pytest.raises(InvalidRequest, match="holds a store already"):
            restore(tmp_path / "backup", store.folder)
    with pytest.raises(InvalidStore, match="is not a store and not empty"):
        restore(tmp_path / "backup", tmp_path)
    with pytest.raises(InvalidRequest, match="no such file"):
        restore(tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(InvalidStore, match=r"cannot be|damaged"):
        restore(tmp_path / "letter", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_store_is_said_and_the_earlier_backup_stays(tmp_path: Path) -> None:
    out = tmp_path / "backup"
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        store.add([NewItem(f"p{n}", {}, None, "0" * 64, "fp32", unit(D), b"t", bytes(1000)) for n in range(300)])
        backup(store.folder, out)
    earlier = out.read_bytes()
    content = bytearray((tmp_path / "store" / FILE).read_bytes())
    for page in range(3, len(content) // 16384):
        content[page * 16384 : page * 16384 + 100] = bytes(range(100))
    (tmp_path / "store" / FILE).write_bytes(content)
    with pytest.raises(InvalidStore, match="damaged"):
        backup(tmp_path / "store", out)
    assert out.read_bytes() == earlier
    out.write_bytes(earlier[:50_000])
    with pytest.raises(InvalidStore, match="damaged"):
        restore(out, tmp_path / "new")


def test_a_file_with_its_log_beside_it_is_restored_whole(tmp_path: Path) -> None:
    """A catalog.sqlite that was copied away together with its -wal."""
    store = EmbeddedStore(tmp_path / "store", card(), D)
    store.add([item("a", unit(D))])
    for name in (FILE, f"{FILE}-wal"):
        (tmp_path / name).write_bytes((store.folder / name).read_bytes())
    store.close()
    assert restore(tmp_path / FILE, tmp_path / "new") == 1


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT], ids=["a full disk", "a quota"])
def test_a_backup_without_room_names_its_file(tmp_path: Path, reason: int) -> None:
    with closing(EmbeddedStore(tmp_path / "store", card(), D)) as store:
        store.add([item("a", unit(D))])
        with no_room(reason), pytest.raises(InvalidOutput, match=r"out: cannot be written: .*(full|[Qq]uota)"):
            backup(tmp_path / "store", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["store"]
        assert backup(tmp_path / "store", tmp_path / "out") == 1
