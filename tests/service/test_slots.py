"""Work slots: bounded, timed, and given back when the work ends, not when somebody stops waiting."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from service.errors import Busy, TimedOut
from service.slots import Slots


def test_one_too_many_is_busy_and_begins_nothing() -> None:
    begun: list[int] = []
    go = threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        go.wait(10)
        return number

    async def main() -> None:
        slots = Slots(2, 10)
        first = [asyncio.ensure_future(slots.run(work, number)) for number in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="2 requests are waiting already"):
            await slots.run(work, 2)
        go.set()
        assert await asyncio.gather(*first) == [0, 1]
        assert await slots.run(work, 3) == 3
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
            await Slots(1, 10).run(int, "x")

    asyncio.run(main())
