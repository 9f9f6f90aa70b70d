"""Slots for work: bounded, timed, and released when the work ends, not when its caller stops waiting."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.errors import Busy, TimedOut
from service.http.slots import Slots


def test_one_too_many_is_busy_and_begins_nothing() -> None:
    begun: list[int] = []
    go = threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        go.wait(10)
        return number

    async def main() -> None:
        slots = Slots(2, 10)
        first = [asyncio.ensure_future(slots.run(partial(work, number))) for number in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="2 requests are waiting already"):
            await slots.run(partial(work, 2))
        go.set()
        assert await asyncio.gather(*first) == [0, 1]
        assert await slots.run(partial(work, 3)) == 3
        slots.close()

    asyncio.run(main())
    assert begun == [0, 1, 3]


def test_work_that_takes_too_long_is_given_up_but_keeps_its_slot() -> None:
    async def main(wait: Callable[[], bool], go: Callable[[], None]) -> None:
        slots = Slots(1, 0.05)
        with pytest.raises(TimedOut, match=r"longer than 0\.05 s"):
            await slots.run(wait)
        with pytest.raises(Busy):
            await slots.run(int)
        go()
        for _ in range(100):
            try:
                assert await slots.run(int) == 0
                return
            except Busy:
                await asyncio.sleep(0.01)
        raise AssertionError("the slot was not given back")

    event = threading.Event()
    asyncio.run(main(lambda: event.wait(10), event.set))


def test_what_the_work_raises_reaches_its_caller() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="invalid literal"):
            await Slots(1, 10).run(partial(int, "x"))

    asyncio.run(main())


async def _gone() -> Message:
    return {"type": "http.disconnect"}


def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    async def main() -> None:
        slots = Slots(1, 30)
        waiting: list[Future[int]] = [Future(), Future()]
        begun = time.monotonic()
        with pytest.raises(ClientDisconnect):
            async with slots.place(_gone) as place:
                await place.wait(waiting)
        assert time.monotonic() - begun < 5
        assert all(future.cancelled() for future in waiting)
        # The place is free again.
        assert await slots.run(int) == 0
        slots.close()

    asyncio.run(main())


def test_what_is_not_done_in_time_is_cancelled() -> None:
    async def main() -> None:
        slots = Slots(1, 0.05)
        done: Future[int] = Future()
        done.set_exception(ValueError("one that failed"))
        late: Future[int] = Future()
        with pytest.raises(TimedOut):
            async with slots.place() as place:
                await place.wait([done, late])
        assert late.cancelled()
        slots.close()

    asyncio.run(main())
