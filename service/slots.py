"""Places for requests at work: a bounded number of them, a time for each, and none for a caller that has gone."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service import metrics
from service.errors import Busy, TimedOut

R = TypeVar("R")

# More than cores: they wait for the disk, for one another's commits and for pictures that are being embedded.
_THREADS = 32
_UNWATCHED_S = 0.02  # most requests end sooner, and looking out for their callers would cost more than it saves


class Slots:
    """Where requests do their work once their bodies are in; an upload, however slow, holds none."""

    def __init__(self, max_waiting: int, timeout_s: float) -> None:
        self._max_waiting, self._timeout_s = max_waiting, timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, "work")
        self._count = 0
        self._counting = threading.Lock()

    @asynccontextmanager
    async def place(self, receive: Receive | None = None) -> AsyncIterator["Place"]:
        """Give a request a place for as long as the block runs.

        Args:
            receive: of the request, whose body is in; tells when the caller has gone.

        Raises:
            Busy: as many as may wait are at work or waiting; nothing was begun.
            TimedOut: the block took too long. Python stops no thread: what one is at holds the place to its end.
            ClientDisconnect: nobody waits for the answer any more; what was not begun is not begun.
        """
        with self._counting:
            if self._count >= self._max_waiting:
                raise Busy(f"{self._count} requests are waiting already; try again in a second")
            self._count += 1
        metrics.requests_at_work.inc()
        place = Place(self._threads)
        watch = None
        try:
            async with asyncio.timeout(self._timeout_s) as timeout:
                if receive is not None:
                    watch = _Watch(receive, timeout)
                yield place
        except TimeoutError as error:
            if watch is not None and watch.gone:
                raise ClientDisconnect from error
            raise TimedOut(f"the work took longer than {self._timeout_s:g} s") from error
        finally:
            if watch is not None:
                watch.end()
            place.leave(self._leave)

    async def run(self, work: Callable[[], R], receive: Receive | None = None) -> R:
        """Do work that blocks in a place of its own and return what it returns. Raises as `place`."""
        async with self.place(receive) as place:
            return await place.run(work)

    def close(self) -> None:
        """Let what runs end, and begin nothing more."""
        self._threads.shutdown(cancel_futures=True)

    def _leave(self, _: "Future[Any] | None" = None) -> None:
        metrics.requests_at_work.dec()
        with self._counting:
            self._count -= 1


class Place:
    """One request's, from when its body is in to when its answer is known."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._work: Future[Any] | None = None

    async def run(self, work: Callable[[], R]) -> R:
        """Do work that blocks on a thread and return what it returns."""
        self._work = future = self._threads.submit(work)
        return await asyncio.wrap_future(future)

    async def wait(self, futures: "Sequence[Future[Any]]") -> None:
        """Wait until all are done, well or not; those not begun yet are cancelled when the time is over."""
        try:
            for future in futures:
                if not future.done():
                    await _done(future)
        finally:
            for future in futures:
                future.cancel()

    def leave(self, then: "Callable[[Future[Any] | None], None]") -> None:
        """Call `then` now, or when the thread that this request left behind has ended."""
        if self._work is None:
            then(None)
        else:
            self._work.add_done_callback(then)


async def _done(future: "Future[Any]") -> None:
    """Wait for a future that a thread resolves, whatever it comes to."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(_wake, waiter))
    await waiter


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Watch:
    """Ends a place's time when the caller has gone."""

    def __init__(self, receive: Receive, timeout: asyncio.Timeout) -> None:
        self.gone = False
        self._receive, self._timeout = receive, timeout
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_UNWATCHED_S, self._begin)

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._look_out())

    async def _look_out(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._timeout.reschedule(0)

    def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
