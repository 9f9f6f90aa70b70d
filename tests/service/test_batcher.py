"""Many callers, one batch, each caller's own result or own error."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from service import FloatArray, PixelArray
from service.batcher import Batcher


def picture(value: int) -> PixelArray:
    return np.full((2, 2, 3), value, np.uint8)


class Recorder:
    """Encodes pixels to their own value and remembers the batches; value 13 cannot be encoded."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.busy = threading.Event()
        self.free = threading.Event()
        self.free.set()

    def encode(self, pixels: Sequence[PixelArray]) -> FloatArray:
        self.busy.set()
        self.free.wait(10)
        self.batches.append(len(pixels))
        if any(one[0, 0, 0] == 13 for one in pixels):
            raise ValueError("thirteen")
        return np.stack([one[0, 0].astype(np.float32) for one in pixels])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def occupy(batcher: Batcher, recorder: Recorder, pool: ThreadPoolExecutor) -> "Future[FloatArray]":
    """Have the batcher's thread busy with one picture, so that what follows has to wait."""
    first = pool.submit(batcher.encode, [picture(99)])
    assert recorder.busy.wait(10)
    return first


def test_each_caller_gets_its_own_in_its_own_order() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder.encode, max_batch=8)
    values = [[(7 * caller + n) % 200 + 20 for n in range(caller % 5 + 1)] for caller in range(50)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda own: batcher.encode([picture(value) for value in own]), values))
    for own, result in zip(values, results, strict=True):
        assert result[:, 0].tolist() == own
    assert sum(recorder.batches) == sum(map(len, values))
    assert max(recorder.batches) <= 8
    batcher.close()


def test_what_waits_goes_together() -> None:
    recorder = Recorder()
    recorder.free.clear()
    batcher = Batcher(recorder.encode, max_batch=64)
    with ThreadPoolExecutor(20) as pool:
        first = occupy(batcher, recorder, pool)
        futures = [pool.submit(batcher.encode, [picture(value)]) for value in range(20, 39)]
        wait_for(lambda: batcher._waiting.qsize() == 19)
        recorder.free.set()
        assert [future.result(10)[0, 0] for future in futures] == list(range(20, 39))
        assert first.result(10)[0, 0] == 99
    assert recorder.batches == [1, 19]
    batcher.close()


def test_a_bad_one_harms_nobody_else() -> None:
    recorder = Recorder()
    recorder.free.clear()
    batcher = Batcher(recorder.encode)
    with ThreadPoolExecutor(10) as pool:
        occupy(batcher, recorder, pool)
        futures = {value: pool.submit(batcher.encode, [picture(value)]) for value in range(9, 18)}
        wait_for(lambda: batcher._waiting.qsize() == 9)
        recorder.free.set()
        for value, future in futures.items():
            if value == 13:
                with pytest.raises(ValueError, match="thirteen"):
                    future.result(10)
            else:
                assert future.result(10)[0, 0] == value
    assert recorder.batches == [1, 9] + [1] * 9
    batcher.close()


def test_close_finishes_what_waits() -> None:
    recorder = Recorder()
    recorder.free.clear()
    batcher = Batcher(recorder.encode)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.encode, [picture(20), picture(21)])
        closing = pool.submit(batcher.close)
        recorder.free.set()
        assert first.result(10)[:, 0].tolist() == [20, 21]
        closing.result(10)
    assert not batcher._thread.is_alive()
