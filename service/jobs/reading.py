"""Shared by the jobs: reading pictures ahead of their use, showing progress."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from service import cores
from service.errors import InvalidSource, LookalikeError, NoEmbedding, Outcome, attempt, map_values
from service.stopping import StopSignal

_CHUNK = 64

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")


def read_ahead(positions: Sequence[int], read: Callable[[int], T]) -> Generator[list[tuple[int, Outcome[T]]]]:
    """Yield chunks of positions, each with the outcome of reading it, in order.

    The next chunk is read by as many threads as there are cores while the caller uses the current one.

    Raises:
        InvalidSource: the source cannot be read now. It concerns all pictures, so none of the chunk is yielded.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came, and the caller has used the chunk in hand.
    """
    chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]

    def read_one(position: int) -> tuple[int, Outcome[T]]:
        outcome = attempt(read, position)
        if isinstance(outcome, InvalidSource):
            raise outcome
        return position, outcome

    # An interruption while a thread holds a lock would leave it locked, and the end of the pool would wait for it.
    with StopSignal() as stop:
        pool = ThreadPoolExecutor(cores())
        try:
            current: Iterator[tuple[int, Outcome[T]]] | None = None
            for chunk in chunks:
                ready, current = current, pool.map(read_one, chunk)
                if ready is not None:
                    yield list(ready)
                    stop.check()
            if current is not None:
                yield list(current)
                stop.check()
        finally:
            # If the caller stops early, what nobody waits for is not begun.
            pool.shutdown(cancel_futures=True)


def use_good(
    chunk: Sequence[tuple[int, Outcome[T]]], work: Callable[[list[T]], Sequence[Outcome[R]]]
) -> list[tuple[int, Outcome[R]]]:
    """Call `work` once on all values that could be read, and return the outcome of every position.

    Args:
        chunk: positions with the outcome of reading, as `read_ahead` yields them.
        work: returns one outcome for each value. It is not called on an empty list.

    Raises:
        LookalikeError: an outcome of `work` other than NoEmbedding. It concerns the encoder or the store rather than
            a picture, and would recur for every later picture.
    """

    def checked(values: list[T]) -> Sequence[Outcome[R]]:
        results = work(values)
        for result in results:
            if isinstance(result, LookalikeError) and not isinstance(result, NoEmbedding):
                raise result
        return results

    positions = [position for position, _ in chunk]
    return list(zip(positions, map_values([outcome for _, outcome in chunk], checked), strict=True))


def in_two_stages(chunks: Iterable[T], first: Callable[[T], S], second: Callable[[S], R]) -> Iterator[R]:
    """Yield second(first(chunk)) of every chunk, in order; `second` runs while `first` takes the following chunk.

    An error of either ends the iteration, after the chunks before it have passed both.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: Future[R] | None = None
        for chunk in chunks:
            try:
                between = first(chunk)
            except Exception:
                if pending is not None:
                    yield pending.result()
                raise
            if pending is not None:
                yield pending.result()
            pending = pool.submit(second, between)
        if pending is not None:
            yield pending.result()


def progress(what: str, total: int, done: int) -> "tqdm[Any]":
    """Return a progress bar of pictures on stderr."""
    return tqdm(total=total, initial=done, desc=what, unit=" pictures", mininterval=0.5)
