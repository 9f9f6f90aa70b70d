"""Near-duplicates among a million vectors with planted groups: time, memory, and how many of the groups are found.

python -m benchmarks.duplicates_scale --work DIR [--count 1000000] [--groups 20000] [--dimension 256]
python -m benchmarks.duplicates_scale --work DIR --count 100000 --groups 2000 --dimension 128 --serve

The vectors are those of benchmarks/search.py: clusters of about 200, in which two strangers have a score of 0.74. A
planted group is one of them with one to three copies, whose scores with it are near 0.97. With --serve, a service has
the store, and one client searches while GET /duplicates is at work: the dimension must be the encoder's, 128.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPConnection
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import typer

from benchmarks.servers import running
from service import FloatArray, IntArray
from service.duplicates import find_groups
from service.encoding.card import read_card
from service.store import NewItem
from service.store.embedded import EmbeddedStore
from service.store.snapshot import SNAPSHOT
from tests.ports import free_port

R = TypeVar("R")

MODEL = Path(__file__).parent.parent / "models" / "mnist"
_PER_CENTRE, _NOISE, _COPY_NOISE = 200, 0.6, 0.25
_THRESHOLD = 0.9
_BLOCK, _COMMIT = 50_000, 1024


class Told(NamedTuple):
    """What the search for duplicates took and found: seconds, peak bytes, and groups by the share of them found."""

    seconds: float
    peak: float
    groups: int
    whole: int
    wrong: int


def main(
    work: Annotated[Path, typer.Option(help="Folder for the store, which is made once.")],
    count: Annotated[int, typer.Option(min=1000)] = 1_000_000,
    groups: Annotated[int, typer.Option(min=1, help="Planted groups.")] = 20_000,
    dimension: Annotated[int, typer.Option(min=2, help="Numbers of a vector.")] = 256,
    exact_limit: Annotated[int, typer.Option(min=1000, help="Of the store.")] = 100_000,
    serve: Annotated[bool, typer.Option("--serve", help="Measure searches beside GET /duplicates.")] = False,
) -> None:
    """Print the table."""
    # Imports torch, whose memory the processes that are measured must not have.
    from benchmarks.machine import describe

    folder = work / f"duplicates-{count}-{groups}-{dimension}-{exact_limit}"
    if not (folder / SNAPSHOT).exists():
        seconds = _apart(fill, folder, count, groups, dimension, exact_limit)
        print(f"the store was made in {seconds:.0f} s")
    if serve:
        print(describe())
        _serve(folder, exact_limit)
        return
    told = _apart(_find, folder, count, groups)
    print(describe())
    print("| vectors | planted groups | seconds | peak memory, MB | groups found | whole planted groups | wrong |")
    print("|---|---|---|---|---|---|---|")
    cells = (count, groups, round(told.seconds, 1), round(told.peak / 1e6), told.groups, told.whole, told.wrong)
    print("| " + " | ".join(f"{cell:,}" for cell in cells) + " |")


def _members(count: int, groups: int) -> list[IntArray]:
    """Return the numbers of the vectors of each planted group: the original first, anywhere among the others."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 5, groups)
    return np.split(rng.permutation(count)[: int(sizes.sum())], np.cumsum(sizes)[:-1])


def _vectors(count: int, groups: int, dimension: int) -> Iterator[FloatArray]:
    """Yield blocks (N, D) of unit rows."""
    rng = np.random.default_rng(0)

    def noise(size: int, length: float) -> FloatArray:
        drawn: FloatArray = rng.standard_normal((size, dimension), np.float32) * np.float32(length / dimension**0.5)
        return drawn

    centres = _unit(noise(max(count // _PER_CENTRE, 1), 1))
    planted = _members(count, groups)
    firsts = {int(own[0]) for own in planted}
    originals = _unit(centres[rng.integers(0, len(centres), groups)] + noise(groups, _NOISE))
    owner = np.full(count, -1, np.int64)
    for number, own in enumerate(planted):
        owner[own] = number
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        rows = centres[rng.integers(0, len(centres), size)] + noise(size, _NOISE)
        owners = owner[start : start + size]
        copies = np.flatnonzero(owners >= 0)
        moved = noise(len(copies), _COPY_NOISE)
        moved[[start + place in firsts for place in copies.tolist()]] = 0
        rows[copies] = originals[owners[copies]] + moved
        yield _unit(rows)


def fill(folder: Path, count: int, groups: int, dimension: int, exact_limit: int, thumbnail: bytes = b"") -> float:
    """Make a store with planted groups, whose items have all the same thumbnail; return the seconds that it took."""
    begun = time.perf_counter()
    store = EmbeddedStore(folder, read_card(MODEL), dimension, exact_limit=exact_limit)
    number = 0
    for rows in _vectors(count, groups, dimension):
        for first in range(0, len(rows), _COMMIT):
            some = enumerate(rows[first : first + _COMMIT], number + first)
            store.add([NewItem(str(n), {}, None, f"{n:064x}", "fp32", row, thumbnail, None) for n, row in some])
        number += len(rows)
    store.settle()
    store.close()
    return time.perf_counter() - begun


def _find(folder: Path, count: int, groups: int) -> Told:
    begun = time.perf_counter()
    found = {frozenset(int(copy.item.id) for copy in group.copies) for group in find_groups(folder, _THRESHOLD).groups}
    seconds = time.perf_counter() - begun
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024.0
    planted = {frozenset(own.tolist()) for own in _members(count, groups)}
    owner = {number: own for own in planted for number in own}
    wrong = sum(not group <= owner.get(min(group), frozenset()) for group in found)
    return Told(seconds, peak, len(found), len(found & planted), wrong)


def _serve(folder: Path, exact_limit: int) -> None:
    """Print the times of searches by one client, alone and while GET /duplicates is at work."""
    port = free_port()
    environment = {"LOOKALIKE_MODEL": str(MODEL), "LOOKALIKE_STORE": str(folder), "LOOKALIKE_VARIANT": "fp32"}
    environment |= {"LOOKALIKE_EXACT_LIMIT": str(exact_limit), "BENTOML_DO_NOT_TRACK": "True"}
    command = [str(Path(sys.executable).with_name("lookalike")), "serve", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with running(command, f"{address}/readyz", environment, folder / "log"):
        connection = HTTPConnection("127.0.0.1", port)
        alone = _searches(connection, 20, lambda: True)
        begun = time.perf_counter()
        beside = _searches(connection, 600, lambda: _asked(connection, f"/duplicates?threshold={_THRESHOLD}") == 202)
        seconds = time.perf_counter() - begun
    print("| searches by id, k = 10, one client | number | median, ms | p99, ms |")
    print("|---|---|---|---|")
    for name, times in (("alone", alone), (f"beside GET /duplicates, {seconds:.0f} s", beside)):
        median, p99 = (1e3 * float(np.quantile(times, share)) for share in (0.5, 0.99))
        print(f"| {name} | {len(times):,} | {median:.2f} | {p99:.2f} |")


def _searches(connection: HTTPConnection, seconds: float, go_on: Callable[[], bool]) -> list[float]:
    """Search until the time is over or `go_on`, which is asked after every 100 searches, returns False."""
    times: list[float] = []
    rng = np.random.default_rng(0)
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds and (len(times) % 100 or go_on()):
        body = json.dumps({"id": str(rng.integers(0, 10_000)), "k": 10})
        started = time.perf_counter()
        status = _asked(connection, "/search", body)
        times.append(time.perf_counter() - started)
        if status != 200:
            raise RuntimeError(f"expected 200, got {status}")
    return times


def _asked(connection: HTTPConnection, path: str, body: str | None = None) -> int:
    """Ask, and return the status of the answer."""
    headers = {} if body is None else {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, body, headers)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def _apart(work: Callable[..., R], *arguments: Any) -> R:
    """Run work in a new process, whose peak of memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _unit(rows: FloatArray) -> FloatArray:
    unit: FloatArray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


if __name__ == "__main__":
    typer.run(main)
