"""A store in one process: the catalog on disk, and an index of it in memory."""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from service import FloatArray
from service.encoding.card import Card
from service.errors import CountMismatch, InvalidQuery, InvalidStore, ReadOnlyStore, StoreMismatch, StorePaused
from service.file_facts import Move
from service.store import DiskState, Field, Folder, Hit, Item, Known, NewItem, Order
from service.store.catalog import FILE, CatalogWriter, Change, read_meta
from service.store.catalog_reader import CatalogReader
from service.store.commits import Commits
from service.store.faiss_index import Partition, checked
from service.store.filter_cache import FilterCache
from service.store.filters import EVERY, Filter
from service.store.layout import current, lock
from service.store.live_index import LiveIndex
from service.store.maintenance import Maintenance, load_index
from service.store.ranking import find_hits
from service.store.snapshot import SNAPSHOT
from service.store.summaries import Summaries

_MAX_ATTEMPTS = 50
# An exact index scans so many codes in about a millisecond.
_FEW_TO_SCAN = 20_000


class EmbeddedStore:
    """A folder with a catalog and a snapshot of its index; the index itself is in memory.

    Changes go through a group commit, and into the index right after it; searches wait only for the latter. Searches
    run side by side. If a search finds an item that has changed between its commit and the index, it starts again, so
    that its result is the store as of one moment.

    Attributes:
        folder: of the generation that is open.
    """

    def __init__(
        self,
        folder: Path,
        card: Card,
        dimension: int,
        read_only: bool = False,
        exact_limit: int = 100_000,
        vector_type: str = "float32",
    ) -> None:
        """Open a store, or create an empty one.

        Args:
            folder: of the store. Its current generation is opened.
            card: the encoder that made the embeddings.
            dimension: D.
            read_only: open an existing store beside the process that changes it. Searches see that process's changes,
                and every change here is refused.
            exact_limit: number of vectors up to which searches score all of them.
            vector_type: float32 or float16, of vectors on disk in a new store. An existing store keeps its own.

        Raises:
            StoreMismatch: the store holds embeddings of another encoder.
            InvalidStore: the store is damaged, in use by another process, or read_only and not there.

        Cost: reads the snapshot and the changes since; every vector once, without a snapshot that can be used.
        """
        self.folder, self._read_only = folder, read_only
        self._locks = ExitStack()
        try:
            if not read_only:
                self._locks.callback(os.close, lock(folder))
            self.folder = current(folder)
            if self.folder != folder and not read_only:
                self._locks.callback(os.close, lock(self.folder))
            meta = {
                "fingerprint": card.fingerprint,
                "dimension": str(dimension),
                "model": card.name,
                "model_folder": str(card.folder),
                "vector_type": vector_type,
            }
            self._open(folder, card, meta, exact_limit)
        except BaseException:
            self._locks.close()
            raise

    def _open(self, home: Path, card: Card, meta: dict[str, str], exact_limit: int) -> None:
        with ExitStack() as opened:
            self._writer = None if self._read_only else CatalogWriter(self.folder, meta)
            if self._writer is not None:
                opened.callback(self._writer.close)
            self._reader = CatalogReader(self.folder)
            opened.callback(self._reader.close)
            _check_encoder(self._reader, home, card, meta)
            self._dimension = int(meta["dimension"])
            self._filters = FilterCache(self._reader)
            self._summaries = Summaries(self._reader, self._filters)
            loaded = load_index(self.folder, self._reader, self._read_only)
            self._live = LiveIndex(self._reader, loaded.index, loaded.sequence, loaded.map)

            def apply(changes: list[Change], sequence: int) -> None:
                self._live.apply(changes, sequence)
                self._maintenance.count(len(changes))

            self._commits = Commits(self._writer, apply, self._live.catch_up)
            self._maintenance = Maintenance(
                self.folder, self._reader, self._commits, self._live, self._filters, loaded.unsaved, exact_limit
            )
            if self._read_only:
                self._commits.refuse(ReadOnlyStore("the store was opened read-only; send changes to its writer"))
            else:
                self._maintenance.start()
            opened.pop_all()

    # Changing ----------------------------------------------------------------------------------------

    def add(self, items: Sequence[NewItem]) -> list[bool]:
        """See Store.add. Raises InvalidQuery, and adds nothing, for an embedding of wrong shape or norm."""
        if not items:
            return []
        checked(np.stack([item.embedding for item in items]), self._dimension)

        def work(writer: CatalogWriter, changes: list[Change]) -> list[bool]:
            # An id that is given twice is new once, and keeps its last picture.
            changes += [writer.put(item) for item in items]
            return [change.old is None for change in changes]

        return self._commits.run(work)

    def remove(self, id: str) -> bool:
        """See Store.remove."""

        def work(writer: CatalogWriter, changes: list[Change]) -> bool:
            change = writer.remove(id)
            changes += [change] if change is not None else []
            return change is not None

        return self._commits.run(work)

    def remove_matching(self, where: Filter, expect: int | None = None) -> int:
        """See Store.remove_matching. Cost: reads the metadata of all items, and holds other changes up meanwhile."""

        def work(writer: CatalogWriter, changes: list[Change]) -> int:
            ids = writer.ids_matching(where)
            if expect is not None and len(ids) != expect:
                raise CountMismatch(f"expected {expect} items that match, found {len(ids)}; nothing is removed")
            changes += [change for id in ids if (change := writer.remove(id)) is not None]
            return len(ids)

        return self._commits.run(work)

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """See Store.set_metadata."""
        return self._commits.run(lambda writer, _: writer.change_metadata(id, change))

    def move(self, moves: Sequence[Move]) -> int:
        """See Store.move."""
        return self._commits.run(lambda writer, changes: writer.move(moves, changes))

    def below(self, origin: str) -> list[Known]:
        """See Store.below."""
        return self._reader.below(origin)

    def facts(self) -> dict[str, str]:
        """See Store.facts."""
        return read_meta(self.folder)

    def note(self, facts: dict[str, str]) -> None:
        """See Store.note."""
        self._commits.run(lambda writer, _: writer.note(facts))

    def dismiss(self, pairs: Sequence[tuple[str, str]], dismissed: bool = True) -> None:
        """See Store.dismiss."""
        self._commits.run(lambda writer, _: writer.dismiss(pairs, dismissed))

    # Searching and reading ---------------------------------------------------------------------------

    def search(self, queries: FloatArray, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """See Store.search.

        Raises:
            InvalidQuery: wrong D, non-finite or non-unit rows, or k < 1.
            InvalidStore: the catalog cannot be read.
        """
        queries = checked(queries, self._dimension)
        where = None if where == EVERY else where
        if k < 1:
            raise InvalidQuery(f"k must be 1 or more, not {k}")
        if not len(queries):
            return []
        for attempt in range(_MAX_ATTEMPTS + 1):
            self._catch_up()
            # The first attempt may see a change between its commit and the index. The next ones hold changes back,
            # unless another process makes them.
            with self._commits.paused() if attempt and not self._commits.refused else nullcontext():
                found = find_hits(self._live, self._reader, self._filters, queries, k, where)
            if found is not None:
                return found
        raise InvalidStore(f"{self.folder}: the index and the catalog differ; `lookalike store check` says where")

    def _catch_up(self) -> None:
        """Bring the index up to date with changes that did not come through this store's commits."""
        if self._commits.refused and self._reader.sequence() != self._live.sequence:
            with self._commits.paused():
                self._live.catch_up()

    def get(self, id: str) -> Item | None:
        """See Store.get."""
        return self._reader.get(id)

    def embedding(self, id: str) -> FloatArray | None:
        """See Store.embedding."""
        return self._reader.vector(id)

    def thumbnail(self, id: str) -> bytes | None:
        """See Store.thumbnail."""
        return self._reader.thumbnail(id)

    def original(self, id: str) -> bytes | None:
        """See Store.original."""
        return self._reader.original(id)

    def scan(self, limit: int, after: int = 0) -> tuple[list[Item], int | None]:
        """See Store.scan."""
        rows = self._reader.scan(limit + 1, after)
        return [item for _, item in rows[:limit]], rows[limit - 1][0] if len(rows) > limit else None

    def page(
        self, limit: int, after: str = "", where: Filter | None = None, order: Order = "added", offset: int = 0
    ) -> tuple[list[Item], str | None]:
        """See Store.page."""
        among = None if where is None or where == EVERY else self._filters.get(where).keys.every
        return self._reader.page(limit, after, among, order, offset)

    def folders(self, prefix: str = "", where: Filter | None = None) -> list[Folder]:
        """See Store.folders."""
        return self._summaries.folders(prefix, where or EVERY)

    def fields(self, where: Filter | None = None) -> list[Field]:
        """See Store.fields."""
        return self._summaries.fields(where or EVERY)

    def count(self, where: Filter | None = None) -> int:
        """See Store.count. Cost: with a filter as FilterCache.get."""
        if where not in (None, EVERY):
            return self._filters.get(where).keys.count
        self._catch_up()
        return len(self._live.index)

    def sequence(self) -> int:
        """See Store.sequence."""
        return self._reader.sequence()

    @property
    def quick(self) -> bool:
        """Whether a search with one query and no filter takes about a millisecond. A reader may have to catch up."""
        index = self._live.index
        return not self._read_only and (index.partition is not None or len(index) <= _FEW_TO_SCAN)

    @property
    def writable(self) -> bool:
        """See Store.writable."""
        return not self._commits.refused

    def disk_state(self) -> DiskState:
        """See Store.disk_state."""
        try:
            disk = os.statvfs(self.folder)
            snapshot = self.folder / SNAPSHOT
            written = snapshot.stat().st_mtime if snapshot.exists() else 0.0
        except OSError as error:
            raise InvalidStore(f"{self.folder}: cannot be read: {error.strerror}") from error
        size = disk.f_blocks - disk.f_bfree + disk.f_bavail
        due = self._maintenance.snapshot_due and not self._read_only
        return DiskState(size * disk.f_frsize, disk.f_bavail * disk.f_frsize, written, due)

    # The index, generations, the end -----------------------------------------------------------------

    @property
    def partition(self) -> Partition | None:
        """How the approximate index is laid out; None while the index is exact."""
        return self._live.index.partition

    def settle(self) -> None:
        """See Store.settle. Raises InvalidStore if the catalog cannot be read."""
        self._maintenance.settle()

    @contextmanager
    def retiring(self, reason: str) -> Iterator[None]:
        """Hold changes back during the block, and refuse them from then on if it ends well. Searches go on."""
        with self._commits.paused():
            yield
            self._commits.refuse(StorePaused(reason))

    def inherit(self, earlier: "EmbeddedStore") -> None:
        """Take over the locks of the store that this one succeeds. That one must refuse changes."""
        self._locks.push(earlier._locks.pop_all())

    def close(self) -> None:
        """Save a snapshot if anything changed, close the catalog, and release the locks."""
        if self._maintenance.closing:
            return
        self._maintenance.close()
        with self._commits.paused(), self._live.lock.writing():
            self._commits.refuse(InvalidStore("the store is closed"))
            self._reader.close()
            if self._writer is not None:
                self._writer.close()
        self._locks.close()


def _check_encoder(reader: CatalogReader, home: Path, card: Card, expected: dict[str, str]) -> None:
    """Raise StoreMismatch or InvalidStore if a catalog is not of an encoder's embeddings."""
    have = reader.meta
    if have["fingerprint"] != expected["fingerprint"]:
        raise StoreMismatch(
            f"{reader.path.parent}: built by the encoder {have['model']} ({have['fingerprint'][:12]}…), "
            f"not by {card.name} ({card.fingerprint[:12]}…); name that encoder with --model, or another --store, "
            f"or bring it over with `lookalike reindex --model {shlex.quote(str(card.folder))} "
            f"--store {shlex.quote(str(home))}`"
        )
    if have["dimension"] != expected["dimension"]:
        raise InvalidStore(
            f"{reader.path}: damaged: it says that its vectors have {have['dimension']} numbers, "
            f"the encoder {card.name} gives {expected['dimension']}; the file is left as it is"
        )


def recorded_model(folder: Path) -> tuple[Path, str] | None:
    """Return folder and name of the encoder that built a store; None if there is no store.

    Raises:
        InvalidStore: the store is damaged.
    """
    folder = current(folder)
    if not (folder / FILE).exists():
        return None
    meta = read_meta(folder)
    return Path(meta["model_folder"]), meta["model"]
