"""The load client of the benchmarks, against a server whose answers are known."""

import asyncio
import socketserver
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from benchmarks import load

_SLOW_S = 0.02


class _Server(socketserver.ThreadingTCPServer):
    """Takes 20 ms for each request, one after another; every fourth is refused, every tenth gets no answer."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.turn, self.numbers = threading.Lock(), count(1)
        self.bodies: list[bytes] = []


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        while head := self.rfile.readline():
            length = 0
            while (line := self.rfile.readline()) != b"\r\n":
                length = int(line.split()[1]) if line.startswith(b"Content-Length") else length
            body = self.rfile.read(length)
            assert head.startswith(b"POST /embed ")
            with self.server.turn:
                self.server.bodies.append(body)
                time.sleep(_SLOW_S)
                number = next(self.server.numbers)
            if number % 10 == 0:
                return
            status = b"429 Too Many" if number % 4 == 0 else b"200 OK"
            self.wfile.write(b"HTTP/1.1 %b\r\ncontent-length: 70000\r\n\r\n" % status + bytes(70_000))


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def requests(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(load.raw("/embed", file.name.encode() * 200_000))
    return files


@pytest.mark.slow("measures the benchmarks' load generator against the clock for two seconds")
def test_a_closed_loop_counts_answers_by_status_and_what_got_none(server: _Server, requests: list[Path]) -> None:
    result = load.run(server.server_address[1], requests, connections=2, seconds=2, warm_up=0.2)
    answers = sum(result.statuses.values())
    assert set(result.statuses) == {"200", "429"}
    # 70 of 90 answers are good.
    assert result.good == result.statuses["200"] == pytest.approx(0.78 * answers, abs=4)
    assert result.errors["connection lost"] == pytest.approx(answers / 9, abs=4)
    assert 0.5 * 2 / _SLOW_S < answers < 2 / _SLOW_S
    assert 1e3 * _SLOW_S <= result.p50_ms <= result.p99_ms <= result.longest_ms
    assert {body[:1] for body in server.bodies} == {b"a", b"b"}
    assert {len(body) for body in server.bodies} == {200_000}


@pytest.mark.slow("measures the benchmarks' load generator against the clock for two seconds")
def test_an_open_loop_counts_from_when_a_request_was_due(server: _Server, requests: list[Path]) -> None:
    """The rate is twice the server's: each request waits for all before it, whether or not it was sent."""
    result = load.run(server.server_address[1], requests, connections=2, seconds=2, warm_up=0, rate=2 / _SLOW_S)
    # Without the queue it would be 20 ms.
    assert 1500 < result.longest_ms < 3000
    assert 600 < result.p50_ms < 1400
    assert result.good + result.statuses["429"] + result.errors["connection lost"] == pytest.approx(200, abs=2)


def test_ask_returns_the_status_and_leaves_the_connection_usable(server: _Server, requests: list[Path]) -> None:
    async def ask_twice() -> list[str]:
        connection = await asyncio.open_connection("127.0.0.1", server.server_address[1])
        statuses = [await load.ask(*connection, requests[0].read_bytes()) for _ in range(4)]
        connection[1].close()
        return statuses

    assert asyncio.run(ask_twice()) == ["200", "200", "200", "429"]
