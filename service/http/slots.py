"""Slots: a bounded number of requests at work, each with a timeout, and cancelled when its client disconnects."""

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

# More than cores, because these threads wait: for the disk, for commits, for pictures that are being embedded.
_THREADS = 32
# Most requests end sooner, and watching their connections costs more than it saves.
_UNWATCHED_S = 0.02


class Slots:
    """The slots of a service. A request takes one when its body is complete, so a slow upload occupies none.

    Attributes:
        count: number of requests at work.

    Written by hand and not on anyio's limiter and task groups: see docs/decisions/0022.
    """

    def __init__(self, max_waiting: int, timeout_s: float) -> None:
        self._max_waiting, self._timeout_s = max_waiting, timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, "work")
        self.count = 0
        self._counting = threading.Lock()

    def place(self, receive: Receive | None = None) -> "Place":
        """Return a slot that a request occupies during an `async with` block.

        Args:
            receive: the request's, after its complete body; reports that the client has disconnected.

        Raises, on entering:
            Busy: max_waiting requests are at work or waiting. Nothing was started.

        Raises, on leaving:
            TimedOut: the block exceeded the timeout. A thread cannot be killed; its slot stays occupied until the work
                ends.
            ClientDisconnect: the client has gone. Work that had not started is cancelled.
        """
        return Place(self, self._threads, self._timeout_s, receive)

    async def run(self, work: Callable[[], R], receive: Receive | None = None) -> R:
        """Run a blocking function in a slot of its own and return its result. Raises like `place`."""
        async with self.place(receive) as place:
            return await place.run(work)

    def close(self) -> None:
        """Wait for running work, and cancel all that has not started."""
        self._threads.shutdown(cancel_futures=True)

    def enter(self) -> None:
        """Occupy a slot. Raises Busy if none is free."""
        with self._counting:
            if self.count >= self._max_waiting:
                raise Busy(f"{self.count} requests are waiting already; try again in a second")
            self.count += 1
        metrics.requests_at_work.inc()

    def leave(self, _: "Future[Any] | None" = None) -> None:
        """Free a slot."""
        metrics.requests_at_work.dec()
        with self._counting:
            self.count -= 1


class Place:
    """The slot of one request, from its complete body to its answer. See Slots.place."""

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

    @property
    def alone(self) -> bool:
        """Whether no other request has a slot."""
        return self._slots.count == 1

    async def run(self, work: Callable[[], R]) -> R:
        """Run a blocking function on a worker thread and return its result."""
        self._work = future = self._threads.submit(work)
        return await asyncio.wrap_future(future)

    async def wait(self, futures: "Sequence[Future[Any]]") -> None:
        """Wait until all futures are done or failed. On a timeout, cancel those that have not started."""
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
    """Wait until a thread has resolved a future, without raising its exception."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(_wake, waiter))
    await waiter


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
