"""What the jobs share: pictures are read ahead of their use, progress is shown, outcomes are counted."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from service import cores
from service.errors import LookalikeError, NoEmbedding

_CHUNK = 64

T = TypeVar("T")


class Tally(NamedTuple):
    """What a job came to: pictures done, pictures that were there already, pictures that could not be read."""

    done: int
    known: int
    bad: int


def read_ahead(positions: range, read: Callable[[int], T]) -> Iterator[list[tuple[int, T | LookalikeError]]]:
    """Yield chunks of (position, what was read or why not); the next chunk is read while this one is used."""

    def attempt(position: int) -> tuple[int, T | LookalikeError]:
        try:
            return position, read(position)
        except LookalikeError as error:
            return position, error

    chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
    with ThreadPoolExecutor(cores()) as pool:
        ahead = pool.map(attempt, chunks[0]) if chunks else iter(())
        for following in [*chunks[1:], None]:
            current, ahead = ahead, pool.map(attempt, following or ())
            yield list(current)


def use_good(
    chunk: list[tuple[int, Any]], work: Callable[[list[tuple[int, Any]]], None]
) -> list[tuple[int, LookalikeError]]:
    """Do the work on what could be read, all together; return (position, why not) of the others.

    A picture that the encoder gives no embedding is one of the others: it is found by going one by one.
    """
    failed = [(position, result) for position, result in chunk if isinstance(result, LookalikeError)]
    good = [(position, result) for position, result in chunk if not isinstance(result, LookalikeError)]
    if good:
        try:
            work(good)
        except NoEmbedding as error:
            if len(good) == 1:
                failed.append((good[0][0], error))
            else:
                failed += [failure for one in good for failure in use_good([one], work)]
    return failed


def progress(what: str, total: int, done: int) -> "tqdm[Any]":
    return tqdm(total=total, initial=done, desc=what, unit=" pictures", mininterval=0.5)
