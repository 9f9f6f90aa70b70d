"""Leaks of `lookalike serve` under a mixed load: memory, threads and descriptors against requests.

    python -m benchmarks.soak --minutes 10

Clients send random requests: they embed and search, change a small gallery, send broken pictures, and disconnect
before the answer.
"""

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import numpy as np
import psutil
import typer
import uvloop

from benchmarks.load import ask, form, raw, request
from benchmarks.machine import describe
from benchmarks.photos import photos
from benchmarks.servers import OURS, serving

_MODEL = Path(__file__).parent.parent / "models" / "mnist"
# The number of distinct ids.
_ITEMS = 200
_EVERY_S = 5
# Memory is fitted over this last share of the run, after pools and caches have filled.
_LAST = 0.8
# Pools and caches fill in the first minutes; a shorter run would fit that growth.
_LEAST_MINUTES = 6
# The largest accepted growth per 10,000 requests.
_MOST_MB = 1.0
# So many more threads or descriptors at the end are no trend.
_TOLERANCE = 2


class Sample(NamedTuple):
    """The worker's resources after some requests: memory in MB; `unique` memory is not shared with other processes."""

    requests: int
    unique: float
    resident: float
    threads: int
    descriptors: int


def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="Length of the load.")] = 10,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 8,
) -> None:
    """Print the table; exit code 1 for growth above a limit or a status of 500 or above other than 503."""
    # SystemExit runs the context manager that ends the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with TemporaryDirectory() as folder, serving(OURS, _MODEL, "fp32", Path(folder)) as port:
        statuses, samples = uvloop.run(_load(port, clients, 60 * minutes))
    raise typer.Exit(0 if _report(statuses, samples, minutes) else 1)


# Load ---------------------------------------------------------------------------------------------


class _Requests:
    """A random mix of requests."""

    def __init__(self) -> None:
        self._photos = photos()

    def draw(self) -> tuple[str, bytes]:
        """Return a kind and its request."""
        photo, id = random.choice(self._photos), f"item-{random.randrange(_ITEMS)}"
        kinds: dict[str, tuple[int, Callable[[], bytes]]] = {
            "embed": (30, lambda: raw("/embed", photo)),
            "embed a form of 4": (8, lambda: form("/embed", "file", random.choices(self._photos, k=4))),
            "search by picture": (15, lambda: raw("/search?k=10", photo)),
            "search by id": (15, lambda: request("/search", "application/json", json.dumps({"id": id}).encode())),
            "put": (8, lambda: raw(f"/images/{id}", photo, "PUT")),
            "delete": (5, lambda: request(f"/images/{id}", method="DELETE")),
            "list": (4, lambda: request("/images?limit=50", method="GET")),
            "thumbnail": (4, lambda: request(f"/images/{id}/thumbnail", method="GET")),
            "bad picture": (6, lambda: raw("/embed", random.choice([photo[:50_000], photo[::-1], b"", b"no picture"]))),
            "gone before the answer": (5, lambda: raw("/embed", photo)),
        }
        (kind,) = random.choices(list(kinds), [weight for weight, _ in kinds.values()])
        return kind, kinds[kind][1]()


async def _load(port: int, clients: int, seconds: float) -> tuple[Counter[tuple[str, str]], list[Sample]]:
    """Return answers by kind and status, and a sample every few seconds."""
    statuses: Counter[tuple[str, str]] = Counter()
    tree = psutil.Process().children(recursive=True)
    worker = max(tree, key=lambda process: process.memory_info().rss)
    requests, end = _Requests(), time.monotonic() + seconds
    crowd = [asyncio.create_task(_client(port, requests, statuses)) for _ in range(clients)]
    samples = []
    try:
        while (left := end - time.monotonic()) > 0:
            await asyncio.wait(crowd, timeout=min(left, _EVERY_S), return_when=asyncio.FIRST_EXCEPTION)
            for task in crowd:
                if task.done():
                    # Clients run for ever, so a finished one failed: this raises its exception.
                    task.result()
            samples.append(_sample(worker, statuses.total()))
            print(samples[-1], file=sys.stderr)
    finally:
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    return statuses, samples


async def _client(port: int, requests: _Requests, statuses: Counter[tuple[str, str]]) -> None:
    connection = None
    while True:
        kind, content = requests.draw()
        try:
            connection = connection or await asyncio.open_connection("127.0.0.1", port)
            if kind == "gone before the answer":
                connection[1].write(content[: random.choice([100, 60_000, len(content)])])
                await connection[1].drain()
                await asyncio.sleep(random.choice([0, 0.005]))
                status = "closed"
            else:
                async with asyncio.timeout(60):
                    status = await ask(*connection, content)
        except (OSError, EOFError) as error:
            status = type(error).__name__
        statuses[kind, status] += 1
        # The server closes the connection after an early refusal.
        if connection and not status.startswith("2"):
            connection[1].transport.abort()
            with suppress(OSError):
                await connection[1].wait_closed()
            connection = None


def _sample(worker: psutil.Process, requests: int) -> Sample:
    memory = worker.memory_full_info()
    return Sample(requests, memory.uss / 1e6, memory.rss / 1e6, worker.num_threads(), worker.num_fds())


# Table --------------------------------------------------------------------------------------------


def _report(statuses: Counter[tuple[str, str]], samples: list[Sample], minutes: float) -> bool:
    """Print the table; return whether all limits hold."""
    print(f"\n{describe()}; {minutes:g} minutes, {statuses.total()} requests\n")
    late = samples[int((1 - _LAST) * len(samples)) :]
    counts = [sample.requests / 10_000 for sample in late]
    print(
        "| the worker's | at the start | after a fifth | at the end | per 10,000 requests |\n|---|---:|---:|---:|---:|"
    )
    slopes = {}
    for name in Sample._fields[1:]:
        values = [getattr(sample, name) for sample in late]
        slopes[name] = float(np.polyfit(counts, values, 1)[0])
        cells = [f"{getattr(one, name):.0f}" for one in (samples[0], late[0], samples[-1])]
        unit = " memory, MB" if name in ("unique", "resident") else ""
        print(f"| {name}{unit} | {' | '.join(cells)} | {slopes[name]:+.2f} |")
    print("\n| request | answers |\n|---|---|")
    for kind in sorted({kind for kind, _ in statuses}):
        seen = {status: count for (other, status), count in sorted(statuses.items()) if other == kind}
        print(f"| {kind} | {', '.join(f'{status}: {count}' for status, count in seen.items())} |")
    lean, flat = slopes["unique"] < _MOST_MB, all(_flat(column) for column in list(zip(*late, strict=True))[3:])
    failed = sorted({status for _, status in statuses if status.startswith("5") and status != "503"})
    if minutes < _LEAST_MINUTES:
        print(f"\nMemory: no verdict, since pools and caches fill first; run at least {_LEAST_MINUTES} minutes.")
        lean = True
    else:
        verdict = "kept" if lean else "BROKEN"
        print(f"\nMemory: {verdict}: {slopes['unique']:+.2f}, limit {_MOST_MB} MB a 10,000 requests.")
    print(f"Threads and descriptors: {'flat' if flat else 'NOT FLAT'}.")
    print(f"Statuses of 500 or above, other than 503: {', '.join(failed) or 'none'}.")
    return lean and flat and not failed


def _flat(values: Sequence[float]) -> bool:
    """Return whether the last quarter is no higher than the first, within the tolerance."""
    quarter = max(1, len(values) // 4)
    return float(np.median(values[-quarter:]) - np.median(values[:quarter])) <= _TOLERANCE


if __name__ == "__main__":
    typer.run(main)
