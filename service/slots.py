"""Work off the event loop: a few threads, a bounded number of requests waiting for one, a time for each."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from service.errors import Busy, TimedOut

P = ParamSpec("P")
R = TypeVar("R")

# More than cores: most of them wait for their batch while the encoder runs it.
_THREADS = 32


class Slots:
    """Where requests do their work once their bodies are in; an upload, however slow, holds none."""

    def __init__(self, max_waiting: int, timeout_s: float) -> None:
        self._max_waiting, self._timeout_s = max_waiting, timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, "work")
        self._count = 0
        self._counting = threading.Lock()

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do the work on a thread and return what it returns.

        Raises:
            Busy: as many as may wait are at work or waiting; nothing was begun.
            TimedOut: it took too long. Python stops no thread: it holds its slot to its end, its result is lost.
        """
        with self._counting:
            if self._count >= self._max_waiting:
                raise Busy(f"{self._count} requests are waiting already; try again in a second")
            self._count += 1
        future = self._threads.submit(work, *args, **kwargs)
        future.add_done_callback(self._leave)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise TimedOut(f"the work took longer than {self._timeout_s:g} s") from error

    def close(self) -> None:
        """Let what runs end, and begin nothing more."""
        self._threads.shutdown(cancel_futures=True)

    def _leave(self, _: "Future[Any]") -> None:
        with self._counting:
            self._count -= 1
