"""Store = catalog + index, in one process."""

import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from service import FloatArray, IntArray
from service.encoding.card import Card
from service.errors import InvalidQuery, InvalidStore, StoreMismatch
from service.store import Hit, Item, NewItem, snapshot
from service.store.catalog import FILE, Catalog, Change, read_meta
from service.store.commits import Commits
from service.store.faiss_index import FaissIndex, checked
from service.store.filter_cache import Selections
from service.store.filters import Filter
from service.store.ivf_training import approximate
from service.store.layout import current, lock
from service.store.rwlock import Turns
from service.store.snapshot import SNAPSHOT, DamagedSnapshot

log = logging.getLogger("bentoml.lookalike")

_CHANGES_A_SNAPSHOT = 50_000  # or a fifth of the store, when that is more
_SAMPLED = 64  # codes of a snapshot that are compared with the catalog
_ATTEMPTS = 50
_SCORED = 256  # pairs at a time: what is computed of them stays in the processor's cache
_QUIET_S, _MOST_QUIET_S = 1, 30
_NICENESS = 10


class EmbeddedStore:
    """A folder with a catalog and a snapshot of its index; the index itself is in memory.

    Changes go through one group commit and reach the index right after it, which excludes searches for the moment.
    Searches run together. A search whose candidates changed between the commit and the index starts again, so that
    what it returns is the store as it was at one moment. Snapshots are taken by a thread of the store's own.
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
        """Open a store, or make an empty one where there is none.

        Args:
            folder: of the store.
            card: the encoder whose embeddings it holds.
            dimension: D.
            read_only: open an existing store without the right to change it, beside a process that does; searches
                follow that one's changes.
            exact_limit: vectors up to which searches look at every one.
            vector_type: float32 or float16, of vectors on disk in a new store; an older one keeps its own.

        Raises:
            StoreMismatch: it holds embeddings of another encoder.
            InvalidStore: damaged, in use by another process, or read_only and not there.

        Cost: reads the snapshot and what changed since; without a snapshot that can be used, every vector once.
        """
        self._home, self._card, self._dimension, self._read_only = folder, card, dimension, read_only
        self._exact_limit, self._vector_type = exact_limit, vector_type
        self._guards = [] if read_only else [lock(folder)]
        try:
            self.folder = current(folder)
            if self.folder != folder and not read_only:
                self._guards.append(lock(self.folder))
            self._open()
        except BaseException:
            self._release()
            raise

    def _open(self) -> None:
        card = self._card
        meta = {
            "fingerprint": card.fingerprint,
            "dimension": str(self._dimension),
            "model": card.name,
            "model_folder": str(card.folder),
            "vector_type": self._vector_type,
        }
        self._catalog = Catalog(self.folder, None if self._read_only else meta)
        try:
            self._check(self._catalog.meta)
            self._selections = Selections(self._catalog)
            self._turns = Turns()
            self._commits = Commits(self._catalog, self._apply)
            if self._read_only:
                self._commits.refuse("the store cannot be written: it was opened read-only")
            self._futile = 0  # vectors up to which an approximate index need not be tried again
            self._unsaved = 0
            self._changed_at = 0.0
            self._closing = False
            self._due, self._settling = threading.Event(), threading.Lock()
            self._index, self._applied = self._load()
            if self._outgrown():
                self._due.set()
            self._keeper = threading.Thread(target=self._keep, name="store keeper", daemon=True)
            if not self._read_only:
                self._keeper.start()
        except BaseException:
            self._catalog.close()
            raise

    def _check(self, have: dict[str, str]) -> None:
        card = self._card
        if have["fingerprint"] != card.fingerprint:
            raise StoreMismatch(
                f"{self.folder}: built by the encoder {have['model']} ({have['fingerprint'][:12]}…), "
                f"not by {card.name} ({card.fingerprint[:12]}…); name that encoder with --model, or another --store, "
                f"or bring it over with `lookalike reindex --model {shlex.quote(str(card.folder))} "
                f"--store {shlex.quote(str(self._home))}`"
            )
        if have["dimension"] != str(self._dimension):
            raise InvalidStore(
                f"{self._catalog.path}: damaged: it says that its vectors have {have['dimension']} numbers, "
                f"the encoder {card.name} gives {self._dimension}; the file is left as it is"
            )

    # Changing ----------------------------------------------------------------------------------------

    def add(self, items: Sequence[NewItem]) -> list[bool]:
        """See Store.add. Raises InvalidQuery for an embedding that is none, then nothing is added."""
        latest = {item.id: item for item in items}  # an id given twice keeps its last picture
        if not latest:
            return []
        checked(np.stack([item.embedding for item in latest.values()]), self._dimension)

        def work(changes: list[Change]) -> dict[str, bool]:
            changes += (self._catalog.put(item) for item in latest.values())
            return {id: change.old is None for id, change in zip(latest, changes, strict=True)}

        new = self._commits.run(work)
        return [new[item.id] for item in items]

    def remove(self, id: str) -> bool:
        """See Store.remove."""

        def work(changes: list[Change]) -> bool:
            change = self._catalog.remove(id)
            changes += [change] if change is not None else []
            return change is not None

        return self._commits.run(work)

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """See Store.set_metadata."""
        return self._commits.run(lambda _: self._catalog.change_metadata(id, change))

    def facts(self) -> dict[str, str]:
        """What the store says of itself: fingerprint, model, and what `note` wrote."""
        return read_meta(self.folder)

    def note(self, facts: dict[str, str]) -> None:
        """Let the store say something of itself. Durable when it returns."""
        self._commits.run(lambda _: self._catalog.note(facts))

    def _apply(self, changes: list[Change], sequence: int) -> None:
        """Bring the index to a commit. One thread at a time: Commits sees to that."""
        first: dict[int, Change] = {}
        last: dict[int, Change] = {}
        for change in changes:
            first.setdefault(change.key, change)
            last[change.key] = change
        old = [(key, change.old) for key, change in first.items() if change.old is not None]
        new = [(key, change.new) for key, change in last.items() if change.new is not None]
        gone, gone_from = self._assigned(old)[::2]
        keys, vectors, lists = self._assigned(new)
        with self._turns.alone():
            self._index.remove(gone, gone_from)
            self._index.add(keys, vectors, lists)
            self._applied = sequence
        self._unsaved += len(changes)
        self._changed_at = time.monotonic()
        if self._outgrown() or self._unsaved >= self._most_unsaved():
            self._due.set()

    def _assigned(self, pairs: list[tuple[int, FloatArray]]) -> tuple[IntArray, FloatArray, IntArray]:
        keys = np.asarray([key for key, _ in pairs], np.int64)
        vectors = np.stack([vector for _, vector in pairs]) if pairs else np.empty((0, self._dimension), np.float32)
        return keys, vectors, self._index.assign(keys, vectors)

    # Searching ---------------------------------------------------------------------------------------

    def search(self, queries: FloatArray, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """See Store.search.

        Raises:
            InvalidQuery: wrong D, non-finite or non-unit rows, or k < 1.
            InvalidStore: the catalog cannot be read.
        """
        queries = checked(queries, self._dimension)
        if k < 1:
            raise InvalidQuery(f"k must be 1 or more, not {k}")
        if not len(queries):
            return []
        if self._commits.refused:
            self._follow()
        found = self._attempt(queries, k, where)
        for _ in range(_ATTEMPTS):
            if found is not None:
                return found
            if self._commits.refused:
                self._follow()
                found = self._attempt(queries, k, where)
            else:
                with self._commits.paused():
                    found = self._attempt(queries, k, where)
        raise InvalidStore(f"{self.folder}: the index and the catalog differ; `lookalike store check` says where")

    def _attempt(self, queries: FloatArray, k: int, where: Filter | None) -> list[list[Hit]] | None:
        """The hits, or None where the catalog is ahead of the index in what they were made of."""
        if where is not None:
            self._selections.get(where)  # what takes long the first time must not keep changes waiting
        with self._turns.shared():
            selection = None if where is None else self._selections.get(where)
            if selection is not None and selection.sequence > self._applied:
                return None
            candidates = self._index.candidates(queries, k, None if selection is None else selection.among)
            lengths = np.asarray([len(own) for own in candidates])
            keys, places = np.unique(np.concatenate(candidates), return_inverse=True)
            vectors = self._catalog.some_vectors(keys, self._applied)
            if vectors is None:
                return None
            best, scores = _best(queries, lengths, vectors, places, k)
            shown = self._catalog.shown(keys[np.unique(best)], self._applied)
            if shown is None:
                return None
        found = zip(keys[best].tolist(), scores.tolist(), strict=True)
        hits = iter([Hit(id, score, metadata) for key, score in found for id, metadata in (shown[key],)])
        return [list(islice(hits, count)) for count in np.minimum(lengths, k).tolist()]

    def _follow(self) -> None:
        """Bring the index to what is committed by now: by a writer elsewhere, or by a commit that ended in an error."""
        if self._catalog.sequence() == self._applied:
            return
        with self._commits.paused(), self._turns.alone():
            self._applied = self._replay(self._index, self._applied)

    # Reading -----------------------------------------------------------------------------------------

    def get(self, id: str) -> Item | None:
        """See Store.get."""
        return self._catalog.get(id)

    def embedding(self, id: str) -> FloatArray | None:
        """See Store.embedding."""
        return self._catalog.vector(id)

    def thumbnail(self, id: str) -> bytes | None:
        """See Store.thumbnail."""
        return self._catalog.thumbnail(id)

    def original(self, id: str) -> bytes | None:
        """See Store.original."""
        return self._catalog.original(id)

    def scan(self, limit: int, after: int = 0) -> tuple[list[Item], int | None]:
        """See Store.scan."""
        rows = self._catalog.scan(limit + 1, after)
        return [item for _, item in rows[:limit]], rows[limit - 1][0] if len(rows) > limit else None

    def count(self) -> int:
        """See Store.count."""
        if self._commits.refused:
            self._follow()
        return len(self._index)

    # The index and its snapshot ----------------------------------------------------------------------

    def _load(self) -> tuple[FaissIndex, int]:
        """The index from its snapshot and what changed since, else from the catalog; and what it is up to."""
        path = self.folder / SNAPSHOT
        try:
            return self._from_snapshot(path)
        except FileNotFoundError:
            reason = "there is no snapshot of it"
        except (DamagedSnapshot, ValueError) as error:
            reason = f"{path} cannot be used: {error}"
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror}"
        if not self._read_only:  # once the catalog has gone on, nobody could tell that it is not of this store's past
            self._discard(path)
        sequence = self._catalog.sequence()
        index = self._exact()
        if len(index):
            log.warning("the index was made anew from %d vectors: %s", len(index), reason)
        self._unsaved = len(index)
        if self._read_only:  # a writer may have gone on meanwhile
            sequence = self._replay(index, sequence)
        return index, sequence

    def _discard(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            snapshot.sync(path.parent)
        except OSError as error:
            raise InvalidStore(f"{path}: cannot be used, and not removed either: {error.strerror}") from error

    def _from_snapshot(self, path: Path) -> tuple[FaissIndex, int]:
        facts, arrays = snapshot.read(path)
        if facts.get("fingerprint") != self._card.fingerprint:
            raise DamagedSnapshot("it is of another encoder's store")
        sequence = facts.get("sequence")
        if not isinstance(sequence, int) or not 0 <= sequence <= self._catalog.sequence():
            raise DamagedSnapshot("it is of a later state than the catalog, which may have come from a backup")
        index = FaissIndex.of_arrays(self._dimension, facts, arrays)
        del arrays
        before = sequence
        sequence = self._replay(index, sequence)
        self._unsaved = sequence - before
        keys = self._catalog.keys()
        if not np.array_equal(index.keys(), keys):
            raise DamagedSnapshot("it holds other items than the catalog")
        some = np.random.default_rng().permutation(keys[:-_SAMPLED])[:_SAMPLED]
        some = np.concatenate([some, keys[-_SAMPLED:]])
        if not all(index.holds(*chunk) for chunk in self._catalog.vectors(some)):
            raise DamagedSnapshot("it holds other vectors than the catalog")
        return index, sequence

    def _replay(self, index: FaissIndex, since: int) -> int:
        """Bring an index that nobody else uses from one sequence number to the catalog's; return that."""
        latest = self._catalog.sequence()
        changed = self._catalog.changed(since)
        index.drop(changed)
        for keys, vectors in self._catalog.vectors(changed):
            index.add(keys, vectors, index.assign(keys, vectors))
        return latest

    def _outgrown(self) -> bool:
        """Whether the index is of the wrong kind for so many vectors, or of one that was learnt on too few or many."""
        count, partition = len(self._index), self._index.partition
        if partition is None:
            return count > max(self._exact_limit, self._futile)
        return not partition.count // 2 <= count <= partition.count * 2

    def _most_unsaved(self) -> int:
        return max(_CHANGES_A_SNAPSHOT, len(self._index) // 5)

    def _keep(self) -> None:
        """Make indexes and take snapshots as changes come in, until the store closes."""
        if sys.platform == "linux":  # this thread, and those that FAISS starts in it, after those who answer
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            self._due.wait()
            self._due.clear()
            self._await_quiet()
            if self._closing:
                return
            try:
                self.settle()
            except Exception:
                log.exception("the index could not be looked after; it goes on as it is")

    def _await_quiet(self) -> None:
        """Wait for a second without changes, not for ever."""
        start = time.monotonic()
        while not self._closing and time.monotonic() < min(self._changed_at + _QUIET_S, start + _MOST_QUIET_S):
            time.sleep(0.05)

    def settle(self) -> None:
        """Make the index and take the snapshot that are due, now rather than in the background.

        Raises:
            InvalidStore: the catalog cannot be read.
        """
        with self._settling:
            if self._outgrown():
                self._make_index()
            if self._unsaved >= self._most_unsaved():
                self._save()

    def _make_index(self) -> None:
        """Make the index anew, of the kind that its size asks for; searches and changes go on meanwhile."""
        start, sequence, keys = time.monotonic(), self._catalog.sequence(), self._catalog.keys()
        index: FaissIndex | None
        if len(keys) <= self._exact_limit:
            index = self._exact()
        else:
            index = approximate(self._catalog.vectors, keys, self._dimension, lambda: self._closing)
        if self._closing:
            return
        if index is None:
            self._futile = 2 * len(keys)
            log.warning(
                "an index that looks at a part of these %d vectors misses too many: all are looked at", len(keys)
            )
            if self._index.partition is None:
                return
            index = self._exact()
        sequence = self._replay(index, sequence)
        with self._commits.paused():
            sequence = self._replay(index, sequence)
            with self._turns.alone():
                self._index, self._applied = index, sequence
        seconds = time.monotonic() - start
        if index.partition is not None:
            learnt = index.partition
            log.info(
                "an approximate index of %d vectors is in use: %d of %d lists a search, recall@10 %.4f; made in %.0f s",
                *(len(index), learnt.probes, len(learnt.centroids), learnt.recall, seconds),
            )
        self._unsaved = max(self._unsaved, self._most_unsaved())

    def _exact(self) -> FaissIndex:
        index = FaissIndex(self._dimension)
        for keys, vectors in self._catalog.vectors():
            index.add(keys, vectors, index.assign(keys, vectors))
        return index

    def _save(self) -> None:
        """Take a snapshot. Changes wait while it is written, not while it goes to the disk; searches go on."""
        path = self.folder / SNAPSHOT
        try:
            with self._commits.paused():
                facts, sections = self._index.sections()
                facts |= {"fingerprint": self._card.fingerprint, "sequence": self._applied}
                temporary = snapshot.write(path, facts, sections)
                self._unsaved = 0
            snapshot.publish(temporary, path)
        except OSError as error:  # the catalog has it all
            log.warning("no snapshot of the index could be written to %s: %s", path, error.strerror or error)

    def inherit(self, earlier: "EmbeddedStore") -> None:
        """Take over the folder of the store that this is the successor of, with its locks; that one only reads on."""
        self._home = earlier._home
        self._guards, earlier._guards = self._guards + earlier._guards, []

    @contextmanager
    def retiring(self, reason: str) -> Iterator[None]:
        """Let changes wait for the end of the block. If it ends well they are refused from then on; searches go on."""
        with self._commits.paused():
            yield
            self._commits.refuse(reason)

    def close(self) -> None:
        """Take a snapshot if anything changed, close the catalog and let the next process in."""
        if self._closing:
            return
        self._closing = True
        self._due.set()
        if not self._read_only:
            self._keeper.join()
            if self._unsaved:
                self._save()
        with self._commits.paused(), self._turns.alone():
            self._commits.refuse("the store is closed")
            self._catalog.close()
        self._release()

    def _release(self) -> None:
        for guard in self._guards:
            os.close(guard)
        self._guards = []


def _best(
    queries: FloatArray, lengths: IntArray, vectors: FloatArray, places: IntArray, k: int
) -> tuple[IntArray, FloatArray]:
    """The best k of each query's own candidates: their places, query after query, and their scores.

    Equal vectors have equal scores to the last bit: each is summed by itself, in float64.

    Args:
        queries: (N, D).
        lengths: (N,), of candidates of each.
        vectors: (M, D), what any of them may be.
        places: of all candidates in these, query after query.
        k: 1 or more; equal scores stand in the order of places.
    """
    exact, owners = queries.astype(np.float64), np.repeat(np.arange(len(queries)), lengths)
    scores = np.empty(len(places), np.float32)
    for start in range(0, len(places), _SCORED):
        part = slice(start, start + _SCORED)
        scores[part] = (vectors[places[part]] * exact[owners[part]]).sum(1)
    scores = np.clip(scores, -1, 1)
    order = np.lexsort((places, -scores, owners))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    best = order[rank < k]
    return places[best], scores[best]


def recorded_model(folder: Path) -> tuple[Path, str] | None:
    """Return folder and name of the encoder that a store was built with, or None where there is no store.

    Raises:
        InvalidStore: it is damaged.
    """
    folder = current(folder)
    if not (folder / FILE).exists():
        return None
    meta = read_meta(folder)
    return Path(meta["model_folder"]), meta["model"]
