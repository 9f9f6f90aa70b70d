"""A load client that takes little processor time: prepared requests, persistent connections, answers hardly parsed.

    python -m benchmarks.load --port 3000 --connections 16 --seconds 10 REQUEST...

A REQUEST is a file with a whole HTTP request, including its head. The client sends the files in rotation. In a closed
loop each connection sends the next one after an answer; in an open loop requests arrive at a fixed --rate.
"""

import asyncio
import gc
import json
import math
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, cast

import typer
import uvloop

# The resolution of libuv's clock.
_TICK_S = 0.001
# Time after the measurement for outstanding answers. A request still unanswered then counts with its wait so far.
_GRACE_S = 3.0


@dataclass
class Result:
    """The measurements of a client.

    Attributes:
        seconds: length of the measurement.
        good: answers with a status below 300; an open loop counts them by the time their requests were due.
        per_s: good answers per second.
        p50_ms, p99_ms, longest_ms: latency of good answers, in an open loop from the due time; NaN for none.
        statuses: answers by status.
        errors: requests without an answer, by kind.
        client_share: the client's own processor time, as a share of one core.
    """

    seconds: float
    good: int
    per_s: float
    p50_ms: float
    p99_ms: float
    longest_ms: float
    statuses: dict[str, int]
    errors: dict[str, int]
    client_share: float


def raw(path: str, photo: bytes, method: str = "POST") -> bytes:
    """Return a request with a picture as its body."""
    return request(path, "image/jpeg", photo, method)


def form(path: str, field: str, photos: Sequence[bytes]) -> bytes:
    """Return a POST of a multipart form with pictures in one field."""
    part = '--limit\r\nContent-Disposition: form-data; name="%s"; filename="%d.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    parts = [(part % (field, number)).encode() + photo + b"\r\n" for number, photo in enumerate(photos)]
    return request(path, "multipart/form-data; boundary=limit", b"".join([*parts, b"--limit--\r\n"]))


def request(path: str, kind: str = "", body: bytes = b"", method: str = "POST") -> bytes:
    """Return a request with a body of media type `kind`, or without a body if `kind` is empty."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n" if kind else ""
    return head.encode() + b"\r\n" + body


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> str:
    """Send one request, read its answer, and return the status. Raises EOFError or OSError without an answer."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(_length(head))
    return head[9:12].decode()


def _length(head: bytes) -> int:
    """Return the Content-Length of a lower-case head, or 0."""
    _, found, rest = head.partition(b"\r\ncontent-length:")
    return int(rest[: rest.index(b"\r")]) if found else 0


def run(
    port: int,
    requests: Sequence[Path],
    connections: int,
    seconds: float,
    warm_up: float = 2,
    rate: float | None = None,
) -> Result:
    """Run a client in a separate process."""
    command = [sys.executable, "-m", "benchmarks.load", *map(str, requests), "--port", str(port)]
    command += ["--connections", str(connections), "--seconds", str(seconds), "--warm-up", str(warm_up)]
    command += [] if rate is None else ["--rate", str(rate)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Result(**json.loads(done.stdout))


def main(
    requests: Annotated[list[Path], typer.Argument(metavar="REQUEST...", help="Files with whole HTTP requests.")],
    port: Annotated[int, typer.Option(help="Port of the server on this machine.")] = 3000,
    connections: Annotated[int, typer.Option(min=1)] = 16,
    seconds: Annotated[float, typer.Option(help="Length of the measurement.")] = 10,
    warm_up: Annotated[float, typer.Option(help="Seconds before the measurement.")] = 2,
    rate: Annotated[float | None, typer.Option(help="Requests a second, in place of the closed loop.")] = None,
) -> None:
    """Send requests and print the measurements as JSON."""
    contents = [path.read_bytes() for path in requests]
    gc.freeze()
    gc.disable()
    client = _Client(port, contents, rate)
    print(json.dumps(asdict(uvloop.run(client.run(connections, seconds, warm_up)))))


class _Client:
    """All connections and the counts of their answers."""

    def __init__(self, port: int, contents: list[bytes], rate: float | None) -> None:
        self._port, self._rate = port, rate
        self._contents = cycle(contents)
        self._connections: set[_Connection] = set()
        self._free: list[_Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        # Due times of requests that wait for a free connection.
        self._waiting: deque[float] = deque()
        self._latencies: list[float] = []
        self._statuses: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._from = self._until = math.inf

    async def run(self, connections: int, seconds: float, warm_up: float) -> Result:
        self._loop = asyncio.get_running_loop()
        self._due = time.perf_counter()
        self._from = self._due + warm_up
        self._until = self._from + seconds
        self._end = self._until + _GRACE_S
        for _ in range(connections):
            await self._connect()
        if self._rate is not None:
            self._arrive()
        await asyncio.sleep(self._from - time.perf_counter())
        begun = time.process_time()
        await asyncio.sleep(self._until - time.perf_counter())
        used = (time.process_time() - begun) / seconds
        while self._unanswered() and time.perf_counter() < self._end:
            await asyncio.sleep(0.01)
        self._give_up()
        p50, p99, longest = (_quantile(self._latencies, share) for share in (0.5, 0.99, 1))
        good = sum(count for status, count in self._statuses.items() if status < "300")
        statuses, errors = dict(sorted(self._statuses.items())), dict(self._errors)
        return Result(seconds, good, good / seconds, 1e3 * p50, 1e3 * p99, 1e3 * longest, statuses, errors, used)

    def free(self, connection: "_Connection") -> None:
        """Send the next request on an idle connection."""
        now = time.perf_counter()
        if self._rate is None:
            if now < self._until:
                connection.send(next(self._contents), now)
        elif self._waiting:
            connection.send(next(self._contents), self._waiting.popleft())
        else:
            self._free.append(connection)

    def answered(self, due: float, status: str) -> None:
        """Count an answer: in a closed loop at its arrival, in an open loop at its request's due time."""
        now = time.perf_counter()
        if self._from <= (now if self._rate is None else due) < self._until:
            self._statuses[status] += 1
            if status < "300":
                self._latencies.append(now - due)

    def lost(self, connection: "_Connection") -> None:
        """Count a lost connection and open another."""
        self._connections.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        now = time.perf_counter()
        if connection.busy and now >= self._from:
            self._errors["connection lost"] += 1
        if now < (self._until if self._rate is None else self._end):
            task = self._loop.create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        while time.perf_counter() < self._end:
            try:
                _, connection = await self._loop.create_connection(lambda: _Connection(self), "127.0.0.1", self._port)
            except OSError as error:
                self._errors[type(error).__name__] += 1
                await asyncio.sleep(0.01)
            else:
                self._connections.add(connection)
                return

    def _arrive(self) -> None:
        """Send the requests that have become due."""
        assert self._rate
        now = time.perf_counter()
        while self._due <= min(now, self._until):
            self._waiting.append(self._due)
            self._due += 1 / self._rate
        while self._waiting and self._free:
            self._free.pop().send(next(self._contents), self._waiting.popleft())
        if now < self._until:
            self._loop.call_later(_TICK_S, self._arrive)

    def _unanswered(self) -> list[float]:
        """Return the due times of requests that wait for a connection or an answer."""
        return [one.due for one in self._connections if one.busy] + list(self._waiting)

    def _give_up(self) -> None:
        """Count unanswered requests; in an open loop each counts with its wait since the due time."""
        now = time.perf_counter()
        late = [now - due for due in self._unanswered() if self._from <= due < self._until]
        if late:
            self._errors["unanswered"] += len(late)
        if self._rate is not None:
            self._latencies += late


class _Connection(asyncio.Protocol):
    """A connection that sends one request at a time."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._head = b""
        self._missing_bytes = 0
        self.due = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._client.free(self)

    def send(self, content: bytes, due: float) -> None:
        self.due, self.busy = due, True
        self._transport.write(content)

    def data_received(self, data: bytes) -> None:
        if self._missing_bytes:
            self._missing_bytes -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            head = self._head[:end].lower()
            self._status = head[9:12].decode()
            self._closing = b"\r\nconnection: close" in head
            self._missing_bytes = end + _length(head) - len(self._head)
            self._head = b""
        if self._missing_bytes == 0:
            self.busy = False
            self._client.answered(self.due, self._status)
            if self._closing:
                self._transport.close()
            else:
                self._client.free(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._client.lost(self)


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else math.nan


if __name__ == "__main__":
    typer.run(main)
