"""Pictures that do not fit beside others wait; the memory is that of the container."""

import os
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from service import memory_bytes
from service.encoding.decode_memory import DecodeMemory


def test_a_picture_waits_until_it_fits_and_is_not_overtaken() -> None:
    memory, order = DecodeMemory(100), []

    def decode(name: str, pixels: int) -> None:
        with memory.take(pixels):
            order.append(name)

    with ThreadPoolExecutor(3) as pool:
        with memory.take(60):
            with memory.take(40):
                large = pool.submit(decode, "larger than all", 1000)
                assert not wait([large], 0.3, FIRST_COMPLETED).done
            small = pool.submit(decode, "small", 1)
            assert not wait([large, small], 0.3, FIRST_COMPLETED).done
        large.result(10)
        small.result(10)
    assert order == ["larger than all", "small"]


def test_an_error_gives_the_memory_back() -> None:
    memory = DecodeMemory(10)
    for _ in range(3):
        try:
            with memory.take(10):
                raise ValueError
        except ValueError:
            pass
    with memory.take(10):
        pass


def test_memory_is_at_most_that_of_the_machine() -> None:
    assert 100_000_000 < memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
