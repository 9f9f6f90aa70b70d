"""Changes of many callers → one commit → each caller's own result or own error."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import apsw

from service.errors import InvalidStore, LookalikeError, StorePaused
from service.store.catalog import CatalogWriter, Change

log = logging.getLogger("bentoml.lookalike")

R = TypeVar("R")
Work = Callable[[CatalogWriter, list[Change]], R]
"""Makes changes through the writer, appends those of vectors to the list, and returns the caller's result."""

# After one of these errors the content of the disk is uncertain, or nothing more can be written to it.
_GRAVE = (
    apsw.FullError,
    apsw.IOError,
    apsw.CorruptError,
    apsw.NotADBError,
    apsw.CantOpenError,
    apsw.ReadOnlyError,
    apsw.NoMemError,
    apsw.ProtocolError,
)


# Time between two trials to write to a disk that was full.
_PROBE_S = 2.0


class _Job:
    """One caller's work, and its result or error once it is done."""

    def __init__(self, work: Work[Any]) -> None:
        self.work = work
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        self.error, self.done = error, True


class Commits:
    """Group commit: the caller that holds the lock commits for all callers that wait, with one fsync.

    It needs no thread of its own. While one caller commits, others queue; the next to get the lock commits for all of
    them.
    """

    def __init__(
        self,
        writer: CatalogWriter | None,
        apply: Callable[[list[Change], int], None],
        catch_up: Callable[[], object] = lambda: None,
    ) -> None:
        """Commit through a writer.

        Args:
            writer: of the catalog; None for a store that refuses every change.
            apply: is called after each commit and before its callers are answered, with the changes of vectors and
                the sequence number of the last change.
            catch_up: is called when a full disk has room again: a commit that failed may be in the catalog.
        """
        self._writer = writer
        self._apply, self._catch_up = apply, catch_up
        self._committing = threading.Lock()
        self._waiting: list[_Job] = []
        self._refusal: InvalidStore | None = None

    def run(self, work: Work[R]) -> R:
        """Do the work in a transaction. Durable when it returns.

        Raises:
            InvalidStore: the disk failed now or earlier, or changes are refused (see `refuse`).
            StorePaused: the disk is full. Changes are taken again soon after there is room.
            Exception: any error of the work itself. None of its changes are in the catalog then; those of other
                callers are.
        """
        job = _Job(work)
        self._waiting.append(job)
        with self._committing:
            if not job.done:
                jobs, self._waiting = self._waiting, []
                self._commit(jobs)
        if job.error is not None:
            raise job.error
        result: R = job.result
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold all changes back during the block. Searches go on."""
        with self._committing:
            yield

    @property
    def refused(self) -> bool:
        """Whether every change is refused."""
        return self._refusal is not None

    def refuse(self, reason: InvalidStore) -> None:
        """Refuse every change from now on. The first reason stays, unless it was a full disk."""
        if self._refusal is None or isinstance(self._refusal, StorePaused):
            self._refusal = reason

    def _commit(self, jobs: list[_Job]) -> None:
        try:
            if self._refusal is not None:
                raise type(self._refusal)(str(self._refusal))
            assert self._writer is not None
            with self._writer.transaction():
                changes = [change for job in jobs for change in self._do(job, self._writer)]
                sequence = self._writer.drawn
            self._apply(changes, sequence)
        except BaseException as error:
            # After any other error it is uncertain how much of the commit the disk holds.
            if isinstance(error, apsw.FullError):
                self._pause(f"the store cannot be written: {error}; it is read-only until there is room")
            elif not isinstance(error, InvalidStore):
                said = f"the store cannot be written: {error}; it is read-only until the service starts again"
                log.error(said)
                self.refuse(InvalidStore(said))
            for job in jobs:
                if job.error is None:
                    job.fail(_ours(error))
        for job in jobs:
            job.done = True

    def _pause(self, reason: str) -> None:
        log.error(reason)
        self.refuse(StorePaused(reason))
        threading.Thread(target=self._probe, args=(self._refusal,), name="full disk", daemon=True).start()

    def _probe(self, pause: StorePaused) -> None:
        """Write to the catalog now and then, and take changes again once that works."""
        assert self._writer is not None
        while True:
            time.sleep(_PROBE_S)
            with self._committing:
                # The store was closed or replaced meanwhile.
                if self._refusal is not pause:
                    return
                try:
                    with self._writer.transaction():
                        self._writer.note({"room_since": str(round(time.time()))})
                    self._catch_up()
                except (apsw.Error, InvalidStore):
                    continue
                self._refusal = None
                log.info("the store can be written again")
                return

    def _do(self, job: _Job, writer: CatalogWriter) -> list[Change]:
        changes: list[Change] = []
        try:
            with writer.part():
                job.result = job.work(writer, changes)
        except BaseException as error:
            if isinstance(error, _GRAVE) or not writer.in_transaction:
                raise
            job.fail(_ours(error))
            return []
        return changes


def _ours(error: BaseException) -> BaseException:
    if isinstance(error, LookalikeError) or not isinstance(error, apsw.Error | OSError):
        return error
    kind = StorePaused if isinstance(error, apsw.FullError) else InvalidStore
    ours = kind(f"the store cannot be written: {error}")
    ours.__cause__ = error
    return ours
