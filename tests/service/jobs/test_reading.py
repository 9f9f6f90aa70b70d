"""The jobs' shared reading: outcomes keep their order, and errors that concern no picture end the job."""

import os
import signal
import threading

import pytest

from service.errors import InvalidStore, LookalikeError, NoEmbedding, Outcome, UndecodablePicture
from service.jobs.reading import in_two_stages, read_ahead, use_good


def read(position: int) -> int:
    if position % 7 == 3:
        raise UndecodablePicture(f"number {position}")
    return 10 * position


def test_chunks_come_in_order_with_an_outcome_each() -> None:
    chunks = list(read_ahead(range(5, 205), read))
    assert [len(chunk) for chunk in chunks] == [64, 64, 64, 8]
    outcomes = [pair for chunk in chunks for pair in chunk]
    assert [position for position, _ in outcomes] == list(range(5, 205))
    for position, outcome in outcomes:
        assert str(outcome) == (f"number {position}" if position % 7 == 3 else f"{10 * position}")
    assert list(read_ahead(range(0), read)) == []


def test_work_is_called_once_and_its_outcomes_find_their_places() -> None:
    calls: list[list[int]] = []

    def work(values: list[int]) -> list[Outcome[int]]:
        calls.append(values)
        return [NoEmbedding("black") if value == 20 else value + 1 for value in values]

    (chunk,) = read_ahead(range(5), read)
    found = [(position, str(outcome)) for position, outcome in use_good(chunk, work)]
    assert found == [(0, "1"), (1, "11"), (2, "black"), (3, "number 3"), (4, "41")]
    assert calls == [[0, 10, 20, 40]]
    assert len(use_good(chunk[3:4], work)) == len(calls) == 1


def test_an_error_of_the_store_ends_the_job() -> None:
    failed: list[Outcome[int]] = [1, InvalidStore("full")]
    with pytest.raises(InvalidStore, match="full"):
        use_good([(0, 1), (1, 2), (2, LookalikeError("bad"))], lambda _: failed)


def test_stages_overlap_and_keep_the_order() -> None:
    begun = threading.Event()

    def first(number: int) -> int:
        if number == 1:
            begun.set()
        return number

    def second(number: int) -> int:
        # Chunk 0 ends only while chunk 1 is in its first stage or past it.
        assert begun.wait(10)
        return 10 * number

    assert list(in_two_stages(range(5), first, second)) == [0, 10, 20, 30, 40]
    assert list(in_two_stages([], first, second)) == []


def test_an_error_in_a_stage_comes_after_the_chunks_before_it() -> None:
    def fail_at_2(number: int) -> int:
        if number == 2:
            raise InvalidStore("full")
        return number

    for stages in ((fail_at_2, int), (int, fail_at_2)):
        done: list[int] = []
        with pytest.raises(InvalidStore, match="full"):
            done.extend(in_two_stages(range(5), *stages))
        assert done == [0, 1]


@pytest.mark.parametrize("at", [0, 2])
def test_ctrl_c_waits_until_the_chunk_is_used_and_is_never_lost(at: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    used = []
    with pytest.raises(KeyboardInterrupt):
        for number, chunk in enumerate(read_ahead(range(3 * 64), str)):
            if number == at:
                os.kill(os.getpid(), signal.SIGINT)
            used.append(len(chunk))
    assert used == [64] * (at + 1)
    assert signal.getsignal(signal.SIGINT) is before
