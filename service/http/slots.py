"""Work slots: how many requests may be at work or wait, how long each may take, and what stops when a caller leaves."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service import metrics
from service.errors import Busy, TimedOut

R = TypeVar("R")

# More threads than cores: they wait for the disk, for one another's commits and for the encoder.
_THREADS = 32
# Most requests end sooner, and watching for their callers' disconnect would cost more than it saves.
_UNWATCHED_S = 0.02


class Slots:
    """The slots that requests work in once their bodies are read; a slow upload occupies none.

    Written by hand and not on anyio's limiter and task groups: see docs/decisions/0022.
    """

    def __init__(self, max_waiting: int, timeout_s: float) -> None:
        self._max_waiting, self._timeout_s = max_waiting, timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, "work")
        self._count = 0
        self._counting = threading.Lock()

    def place(self, receive: Receive | None = None) -> "Place":
        """Return a context manager that occupies a slot during its `async with` block.

        Args:
            receive: the request's own, after its body was read; it reports when the caller disconnects.

        Raises:
            Busy: on entering, if `max_waiting` slots are occupied; nothing was started.
            TimedOut: on leaving, if the block took too long. A thread cannot be killed; its slot stays occupied until
                the work ends.
            ClientDisconnect: on leaving, if the caller has disconnected; work that had not started never starts.
        """
        return Place(self, self._threads, self._timeout_s, receive)

    async def run(self, work: Callable[[], R], receive: Receive | None = None) -> R:
        """Run blocking work in a slot and return its result. Raises as `place`, or as the work does."""
        async with self.place(receive) as place:
            return await place.run(work)

    def close(self) -> None:
        """Start no more work, and wait for the work that runs."""
        self._threads.shutdown(cancel_futures=True)

    def enter(self) -> None:
        """Occupy a slot. Raises Busy."""
        with self._counting:
            if self._count >= self._max_waiting:
                raise Busy(f"{self._count} requests are waiting already; try again in a second")
            self._count += 1
        metrics.requests_at_work.inc()

    def leave(self, _: "Future[Any] | None" = None) -> None:
        """Free a slot."""
        metrics.requests_at_work.dec()
        with self._counting:
            self._count -= 1


class Place:
    """One request's slot, from the end of its body to its result. See Slots.place."""

    def __init__(self, slots: Slots, threads: ThreadPoolExecutor, timeout_s: float, receive: Receive | None) -> None:
        self._slots, self._threads, self._timeout_s, self._receive = slots, threads, timeout_s, receive
        self._work: Future[Any] | None = None
        self._timeout = asyncio.timeout(timeout_s)
        self._watch: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> "Place":
        self._slots.enter()
        await self._timeout.__aenter__()
        if self._receive is not None:
            self._timer = asyncio.get_running_loop().call_later(_UNWATCHED_S, self._begin_watch)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            if self._gone:
                raise ClientDisconnect from late
            raise TimedOut(f"the work took longer than {self._timeout_s:g} s") from late
        finally:
            if self._receive is not None:
                self._timer.cancel()
            if self._watch is not None:
                self._watch.cancel()
            if self._work is None:
                self._slots.leave()
            else:
                self._work.add_done_callback(self._slots.leave)

    async def run(self, work: Callable[[], R]) -> R:
        """Run blocking work on a thread and return its result. Raises as the work does."""
        self._work = future = self._threads.submit(work)
        return await asyncio.wrap_future(future)

    async def wait(self, futures: "Sequence[Future[Any]]") -> None:
        """Wait until all futures are done or have failed; if the block is cancelled, cancel those that wait."""
        try:
            for future in futures:
                if not future.done():
                    await _done(future)
        except asyncio.CancelledError:
            for future in futures:
                future.cancel()
            raise

    def _begin_watch(self) -> None:
        self._watch = asyncio.create_task(self._look_out())

    async def _look_out(self) -> None:
        assert self._receive is not None
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._timeout.reschedule(0)


async def _done(future: "Future[Any]") -> None:
    """Wait until a future that a thread resolves is done, has failed or was cancelled."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(_wake, waiter))
    await waiter


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
