"""Latency of ordinary requests alone, beside slow uploads, and beside half-sent headers."""

import asyncio
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import sklearn.datasets
import typer

from benchmarks.load import ask
from benchmarks.machine import describe
from benchmarks.servers import OURS, serving

_MODEL = Path(__file__).parent.parent / "models" / "mnist"
# A real photograph of 640×427.
_PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
# Ordinary requests per second, far below the service's capacity.
_RATE = 50
# Phases take turns, so that other work on the host slows all of them alike.
_TURNS = 3
# Before each turn new connections open and those of the previous turn close.
_SETTLE_S = 2.0
# Shorter than the default of 30 s, so that uploads are closed and restarted within a turn.
_BODY_TIMEOUT_S = 8
# The largest accepted ratio of the p99 beside slow clients to the quiet p99.
_LIMIT = 2.0

_UPLOAD = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
_HALF = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Le"


@dataclass
class Phase:
    """Slow clients of one kind and the measurements beside them.

    Attributes:
        size: the number of concurrent slow clients.
        start: the bytes that each sends at once.
        drops: the bytes that follow, one a second.
        latencies: of ordinary requests, in seconds from their due times: a stall counts for every request it delays.
        others: answers to ordinary requests other than 200.
        ends: outcomes of the slow clients' connections.
    """

    name: str
    size: int = 0
    start: bytes = b""
    drops: bytes = b""
    latencies: list[float] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)


def main(
    seconds: Annotated[int, typer.Option(min=_TURNS, help="Length of the measurement in each phase.")] = 60,
    uploads: Annotated[int, typer.Option(min=1, help="Concurrent slow uploads.")] = 200,
    idle: Annotated[int, typer.Option(min=1, help="Connections that never finish their headers.")] = 500,
) -> None:
    """Print the table; exit code 1 when an ordinary request got any answer but 200."""
    phases = [
        Phase("quiet"),
        Phase(f"{uploads} slow uploads", uploads, _UPLOAD, _PHOTO.read_bytes()),
        Phase(f"{idle} half-sent headers", idle, _HALF),
    ]
    # SystemExit runs the context manager that ends the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _allow_files(2 * max(uploads, idle) + 200)
    server = replace(OURS, environment={"LOOKALIKE_BODY_TIMEOUT_S": str(_BODY_TIMEOUT_S)})
    with TemporaryDirectory() as folder, serving(server, _MODEL, "fp32", Path(folder)) as port:
        asyncio.run(_measure(port, phases, seconds / _TURNS))
    raise typer.Exit(0 if _report(phases) else 1)


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else hard, hard))


async def _measure(port: int, phases: list[Phase], turn_s: float) -> None:
    await _ask_steadily(port, Phase("warm-up"), min(turn_s, 5))
    for turn in range(_TURNS):
        for phase in phases:
            print(f"turn {turn + 1} of {_TURNS}: {phase.name}", file=sys.stderr)
            async with _company(port, phase):
                await asyncio.sleep(_SETTLE_S)
                await _ask_steadily(port, phase, turn_s)


async def _ask_steadily(port: int, phase: Phase, turn_s: float) -> None:
    """Send the photograph repeatedly at the steady rate, one at a time, on a persistent connection."""
    photo = _PHOTO.read_bytes()
    request = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(photo), photo)
    begun = time.perf_counter()
    due, connection = begun, None
    while due < begun + turn_s:
        await asyncio.sleep(due - time.perf_counter())
        try:
            async with asyncio.timeout(30):
                connection = connection or await asyncio.open_connection("127.0.0.1", port)
                status = await ask(*connection, request)
        except (OSError, EOFError) as error:
            status, connection = type(error).__name__, None
        phase.latencies.append(time.perf_counter() - due)
        if status != "200":
            phase.others[status] += 1
        due += 1 / _RATE
    if connection:
        connection[1].close()


# Slow clients -----------------------------------------------------------------------------------


@asynccontextmanager
async def _company(port: int, phase: Phase) -> AsyncIterator[None]:
    """Run the phase's slow clients during the block."""
    crowd = [asyncio.create_task(_persist(port, number, phase)) for number in range(phase.size)]
    try:
        yield
    finally:
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)


async def _persist(port: int, number: int, phase: Phase) -> None:
    """Run a slow client, and another after each one that the server ends."""
    # Spread the clients over a second.
    await asyncio.sleep(number / phase.size)
    while True:
        # At most one connection a second: these are slow clients, not a flood.
        again = time.monotonic() + 1
        await _drip(port, phase)
        await asyncio.sleep(again - time.monotonic())


async def _drip(port: int, phase: Phase) -> None:
    """Run one slow client until the server answers or closes."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        phase.ends["no connection"] += 1
        return
    answer = asyncio.create_task(reader.readline())
    try:
        writer.write(phase.start)
        for drop in phase.drops:
            if (await asyncio.wait([answer], timeout=1))[0]:
                break
            writer.write(bytes([drop]))
        words = (await answer).split()
        phase.ends[words[1].decode() if words else "closed without an answer"] += 1
    except OSError:
        phase.ends["closed without an answer"] += 1
    except asyncio.CancelledError:
        phase.ends["open until the end of the turn"] += 1
        raise
    finally:
        answer.cancel()
        writer.close()


# Table --------------------------------------------------------------------------------------------


def _report(phases: list[Phase]) -> bool:
    """Print the table; return whether every ordinary request got a 200."""
    print(f"\n{describe()}; {_RATE} requests/s, one at a time; bodies may take {_BODY_TIMEOUT_S} s\n")
    print("| phase | requests | p50, ms | p99, ms | p99 / quiet | other than 200 |\n|---|---:|---:|---:|---:|---|")
    quiet = float(np.percentile(phases[0].latencies, 99))
    slowed = False
    for phase in phases:
        p50, p99 = np.percentile(phase.latencies, [50, 99])
        others = ", ".join(f"{status}: {count}" for status, count in phase.others.items()) or "none"
        count = len(phase.latencies)
        print(f"| {phase.name} | {count} | {p50 * 1e3:.1f} | {p99 * 1e3:.1f} | {p99 / quiet:.2f} | {others} |")
        slowed = slowed or p99 >= _LIMIT * quiet
    print()
    for phase in phases[1:]:
        print(f"{phase.name}: " + "; ".join(f"{end}: {count}" for end, count in phase.ends.most_common()) + ".")
    if min(len(phase.latencies) for phase in phases) < 1000:
        print("Fewer than 1,000 requests in a phase: ten or fewer lie beyond its p99, which is a rough figure.")
    print(f"The limit is {_LIMIT} × the quiet p99: {'BROKEN' if slowed else 'kept'}.")
    return not any(phase.others for phase in phases)


if __name__ == "__main__":
    typer.run(main)
