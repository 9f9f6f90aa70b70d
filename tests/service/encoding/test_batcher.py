"""Many callers share a batch, and each gets its own result or error."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from service import FloatArray, PixelArray
from service.encoding.batcher import Batcher
from service.errors import OutOfMemory


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


def submit(batcher: Batcher[PixelArray], value: int) -> "Future[FloatArray]":
    future: Future[FloatArray] = Future()
    batcher.submit(picture(value), future)
    return future


def occupy(batcher: Batcher[PixelArray], recorder: "Recorder | Small") -> "Future[FloatArray]":
    """Keep the batcher's thread busy with one picture, so that later pictures wait."""
    first = submit(batcher, 99)
    assert recorder.busy.wait(10)
    return first


def test_each_caller_gets_its_own() -> None:
    recorder = Recorder()
    batcher = Batcher([recorder.encode], max_batch=8)
    values = [(7 * caller) % 200 + 20 for caller in range(300)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda own: submit(batcher, own).result(10), values))
    assert [result[0] for result in results] == values
    assert sum(recorder.batches) == len(values)
    assert max(recorder.batches) <= 8
    batcher.close()


def test_what_waits_goes_together() -> None:
    recorder = Recorder()
    recorder.free.clear()
    batcher = Batcher([recorder.encode], max_batch=16)
    first = occupy(batcher, recorder)
    futures = [submit(batcher, value) for value in range(20, 39)]
    recorder.free.set()
    assert [future.result(10)[0] for future in futures] == list(range(20, 39))
    assert first.result(10)[0] == 99
    assert recorder.batches == [1, 16, 3]
    batcher.close()


def test_a_bad_one_harms_nobody_else() -> None:
    recorder = Recorder()
    recorder.free.clear()
    batcher = Batcher([recorder.encode], max_batch=64)
    occupy(batcher, recorder)
    futures = {value: submit(batcher, value) for value in range(9, 41)}
    recorder.free.set()
    for value, future in futures.items():
        if value == 13:
            with pytest.raises(ValueError, match="thirteen"):
                future.result(10)
        else:
            assert future.result(10)[0] == value
    assert recorder.batches[:2] == [1, 32]
    assert len(recorder.batches) <= 2 + 2 * 5, "found by halves, not one by one"
    batcher.close()


def test_callers_that_have_gone_are_passed_over() -> None:
    recorder = Recorder()
    recorder.free.clear()
    batcher = Batcher([recorder.encode], max_batch=64)
    occupy(batcher, recorder)
    futures = [submit(batcher, value) for value in range(20, 30)]
    assert all(future.cancel() for future in futures[:9])
    recorder.free.set()
    assert futures[9].result(10)[0] == 29
    assert recorder.batches == [1, 1]
    batcher.close()


def test_lanes_run_together() -> None:
    # The barrier breaks unless two lanes wait at it at the same time.
    both = threading.Barrier(2)

    def encode(pixels: Sequence[PixelArray]) -> FloatArray:
        both.wait(10)
        return np.stack([one[0, 0].astype(np.float32) for one in pixels])

    batcher = Batcher([encode, encode], max_batch=1)
    assert [future.result(10)[0] for future in [submit(batcher, 5), submit(batcher, 6)]] == [5, 6]
    batcher.close()


class Small:
    """A device with memory for so many pictures at once, or for none."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.batches: list[int] = []
        self.busy = threading.Event()
        self.free = threading.Event()

    def encode(self, pixels: Sequence[PixelArray]) -> FloatArray:
        self.busy.set()
        self.free.wait(10)
        self.batches.append(len(pixels))
        if len(pixels) > self.most:
            raise OutOfMemory("no memory")
        return np.stack([one[0, 0].astype(np.float32) for one in pixels])


def test_a_batch_without_memory_is_halved_once_and_later_ones_are_smaller() -> None:
    small = Small(8)
    batcher = Batcher([small.encode], max_batch=16)
    first = occupy(batcher, small)
    futures = [submit(batcher, value) for value in range(20, 52)]
    small.free.set()
    assert [future.result(10)[0] for future in [first, *futures]] == [99, *range(20, 52)]
    assert max(small.batches[small.batches.index(16) + 1 :]) == 8
    assert small.batches.count(16) == 1
    batcher.close()


def test_no_memory_for_the_halves_either_is_told_to_all() -> None:
    small = Small(1)
    batcher = Batcher([small.encode], max_batch=16)
    first = occupy(batcher, small)
    futures = [submit(batcher, value) for value in range(16)]
    small.free.set()
    assert first.result(10)[0] == 99
    for future in futures:
        with pytest.raises(OutOfMemory):
            future.result(10)
    # The halves are not halved again.
    assert small.batches == [1, 16, 8, 8]
    batcher.close()


def test_close_finishes_what_waits() -> None:
    before = set(threading.enumerate())
    recorder = Recorder()
    recorder.free.clear()
    batcher = Batcher([recorder.encode], max_batch=64)
    futures = [submit(batcher, 20), submit(batcher, 21)]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(batcher.close)
        recorder.free.set()
        assert [future.result(10)[0] for future in futures] == [20, 21]
        closing.result(10)
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("lane")]
