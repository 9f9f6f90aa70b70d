"""Many callers' changes → one commit → each caller's own result or own error."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import apsw

from service.errors import InvalidStore, LookalikeError
from service.store.catalog import Catalog, Change

R = TypeVar("R")
Work = Callable[[list[Change]], R]
"""Changes the catalog, appends what that did to vectors, and returns the caller's result."""

# After one of these what SQLite has on disk is no longer certain, or nothing more goes there.
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


class _Job:
    """One caller's change, and what became of it."""

    def __init__(self, work: Work[Any]) -> None:
        self.work = work
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        self.error, self.done = error, True


class Commits:
    """Group commit: whoever gets the lock commits for all who wait, with one fsync.

    There is no thread of its own. While one caller commits, those who come queue; the first of them to get the lock
    takes them all along.
    """

    def __init__(self, catalog: Catalog, apply: Callable[[list[Change], int], None]) -> None:
        """`apply` gets what a commit did to vectors and its last sequence number, before any caller is answered."""
        self._catalog = catalog
        self._apply = apply
        self._committing = threading.Lock()
        self._waiting: list[_Job] = []
        self._refusal: str | None = None

    def run(self, work: Work[R]) -> R:
        """Do the work in a transaction; durable when it returns.

        Raises:
            InvalidStore: it could not be written; or writing ended earlier, see `refuse`.
            What the work raised: nothing of it is in the catalog then, other callers' changes are.
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
        """Let nobody change anything in the meantime; searches go on."""
        with self._committing:
            yield

    @property
    def refused(self) -> bool:
        """Whether no change is taken any more."""
        return self._refusal is not None

    def refuse(self, reason: str) -> None:
        """Take no change from now on. The first reason stays."""
        self._refusal = self._refusal or reason

    def _commit(self, jobs: list[_Job]) -> None:
        try:
            if self._refusal is not None:
                raise InvalidStore(self._refusal)
            with self._catalog.transaction():
                changes = [change for job in jobs for change in self._do(job)]
                sequence = self._catalog.drawn
            self._apply(changes, sequence)
        except BaseException as error:
            if not isinstance(error, InvalidStore):  # nobody knows how much of it the disk holds
                self.refuse(f"the store cannot be written: {error}; it is read-only until the service starts again")
            for job in jobs:
                if job.error is None:
                    job.fail(_ours(error))
        for job in jobs:
            job.done = True

    def _do(self, job: _Job) -> list[Change]:
        changes: list[Change] = []
        try:
            with self._catalog.part():
                job.result = job.work(changes)
        except BaseException as error:
            if isinstance(error, _GRAVE) or not self._catalog.in_transaction:
                raise
            job.fail(_ours(error))
            return []
        return changes


def _ours(error: BaseException) -> BaseException:
    if isinstance(error, LookalikeError) or not isinstance(error, apsw.Error | OSError):
        return error
    ours = InvalidStore(f"the store cannot be written: {error}")
    ours.__cause__ = error
    return ours
