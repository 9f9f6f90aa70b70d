"""Replicas behind a real nginx with deploy/nginx.conf: what one of them loses, another one or a later try answers."""

import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from service import FloatArray
from service.client import Client, ServiceError, Upload
from service.http.guard import _READING_POSTS
from tests.conftest import MODEL, encoded, scene
from tests.deploy.proxies import nginx, until
from tests.ports import free_port
from tests.serving import running, serving, status_of


@contextmanager
def in_front(folder: Path, replicas: Sequence[int]) -> Iterator[str]:
    """Run nginx with deploy/nginx.conf in front of the replicas at two ports; yield its address."""
    port = free_port()
    changes = {"listen 80;": f"listen 127.0.0.1:{port};"}
    changes |= {f"127.0.0.1:{3001 + number}": f"127.0.0.1:{replica}" for number, replica in enumerate(replicas)}
    with nginx(folder, "nginx.conf", port, changes):
        yield f"http://127.0.0.1:{port}"


# What nginx sends again, with replicas that read a request and hang up ------------------------------


class Quitters:
    """Two replicas that hang up after a request.

    Attributes:
        seen: how many of each request came, both replicas together.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.ports = [int(one.getsockname()[1]) for one in self._sockets]
        for listener in self._sockets:
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                request = " ".join(lines.readline().decode().split(" ")[:2])
                length = 0
                while (line := lines.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line[15:])
                lines.read(length)
                self.seen[request] += 1

    def close(self) -> None:
        for listener in self._sockets:
            # Without a shutdown, the thread would stay in accept().
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@pytest.mark.parametrize(
    "request_line",
    [
        *(f"POST {path} 2" for path in _READING_POSTS),
        "GET /images 2",
        "GET /images/a%2Fb 2",
        "PUT /images/a%2Fb 2",
        "DELETE /images/a%2Fb 2",
        "POST /images 1",
        "POST /images/moves 1",
        "PATCH /images/a%2Fb 1",
        "DELETE /images?filter=%7B%7D&expect=3 1",
    ],
)
def test_only_what_may_come_twice_is_sent_again(request_line: str, tmp_path: Path) -> None:
    method, path, times = request_line.split()
    quitters = Quitters()
    try:
        with in_front(tmp_path, quitters.ports) as address:
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
            connection.request(method, path, b"" if method in ("GET", "DELETE") else b"{}")
            assert connection.getresponse().status == 502
            connection.close()
    finally:
        quitters.close()
    assert quitters.seen == {f"{method} {path}": int(times)}


# Real replicas ------------------------------------------------------------------------------------


class Replica:
    """A service without a store, which can be killed and started again at the same port."""

    def __init__(self, folder: Path, workers: int) -> None:
        folder.mkdir()
        self.port, self._workers = free_port(), workers
        self._folder, self._stack = folder, ExitStack()
        self._tree: list[psutil.Process] = []
        self.start()

    def start(self) -> None:
        flags = ["--model", str(MODEL), "--no-store", "--workers", str(self._workers)]
        self._server, self.address, self._log = self._stack.enter_context(
            running(self._folder, *flags, port=str(self.port))
        )
        self._tree = [psutil.Process(self._server.pid), *psutil.Process(self._server.pid).children(recursive=True)]

    def answered(self) -> int:
        """Return how many pictures it has embedded since its start, by its log."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return sum(line.get("path") == "/embed" and line["status"] == 200 for line in lines)

    def suspend(self) -> None:
        for process in self._tree:
            process.suspend()

    def kill(self) -> None:
        """Kill -9 all its processes, and wait for their end."""
        self.suspend()
        for process in self._tree:
            process.kill()
        self.close()

    def close(self) -> None:
        self._stack.close()

    def restart(self) -> None:
        """End it by SIGTERM, start it again, and wait until it is ready."""
        self.close()
        assert self._server.returncode == 0
        self.start()


class Crowd:
    """Threads that embed pictures by one client until they are told to stop.

    Attributes:
        answered: how many requests were.
        wrong: errors, and pictures with an embedding that is not theirs.
    """

    def __init__(self, client: Client, pictures: Sequence[bytes], expected: FloatArray, size: int = 8) -> None:
        self.answered, self.wrong = 0, list[str]()
        self._client, self._pictures, self._expected = client, pictures, expected
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(size)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                embeddings = self._client.embed([self._pictures[number]])
            except Exception as error:
                self.wrong.append(repr(error))
                return
            # A batch with other pictures may change the last bits.
            if embeddings.shape != (1, 128) or not np.allclose(embeddings[0], self._expected[number], atol=1e-5):
                self.wrong.append(f"picture {number}")
            with self._lock:
                self.answered += 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


@pytest.mark.slow("starts two services twice")
def test_killed_replicas_cost_no_request(tmp_path: Path) -> None:
    pictures = [encoded(scene(seed=number)) for number in range(8)]
    with ExitStack() as stack:
        first = Replica(tmp_path / "first", workers=1)
        stack.callback(first.close)
        second = Replica(tmp_path / "second", workers=2)
        stack.callback(second.close)
        with Client(first.address) as direct:
            expected = direct.embed(pictures)
        # No embedding passes for another one.
        assert (expected @ expected.T - np.eye(8)).max() < 0.999
        address = stack.enter_context(in_front(tmp_path, [first.port, second.port]))
        crowd = Crowd(stack.enter_context(Client(address, patience_s=120)), pictures, expected)
        stack.callback(crowd.stop)

        def lines(status: str) -> int:
            return (tmp_path / "access.log").read_text().count(f"POST /embed {status}\n")

        def going_on(count: int, *replicas: Replica) -> None:
            """Wait until each replica has answered some more, and nothing was wrong."""
            enough = [(replica, replica.answered() + count) for replica in replicas]
            until(lambda: bool(crowd.wrong) or all(replica.answered() >= least for replica, least in enough))
            assert crowd.wrong == []

        going_on(30, first, second)
        # A suspended replica accepts requests and cannot answer them, so its death loses some for certain.
        second.suspend()
        going_on(30, first)
        assert lines("200 502, 200") == 0
        second.kill()
        going_on(30, first)
        # nginx has sent these to the other replica.
        assert lines("200 502, 200") > 0
        assert lines("502 502") == 0

        first.kill()
        # No replica is left, so the client itself has to try again.
        until(lambda: bool(crowd.wrong) or lines("502 502") > 0)
        answered = crowd.answered
        first.start()
        second.start()
        going_on(30, first, second)
        assert crowd.answered >= answered + 60

        # An end by SIGTERM is not even noticed by the client.
        before = lines("502 502")
        first.close()
        going_on(30, second)
        crowd.stop()
        assert crowd.wrong == []
        assert lines("502 502") == before
        assert status_of(f"{address}/readyz") == 200


class Steady:
    """Requests at a fixed rate, each on a connection of its own, however long the earlier ones take.

    Attributes:
        answers: how many requests ended with each status, or with the name of an error.
        sent: how many were sent, by time.monotonic() of each.
    """

    def __init__(self, address: str, picture: bytes, rate: float) -> None:
        self.answers, self.sent = Counter[int | str](), list[float]()
        self._address, self._picture, self._rate = address.removeprefix("http://"), picture, rate
        self._stop = threading.Event()
        # As many as wait for an answer at the slowest moment.
        self._threads = ThreadPoolExecutor(512)
        self._clock = threading.Thread(target=self._send)
        self._clock.start()

    def _send(self) -> None:
        begin = time.monotonic()
        while not self._stop.wait(max(0, begin + len(self.sent) / self._rate - time.monotonic())):
            self.sent.append(time.monotonic())
            self._threads.submit(self._ask)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=75)
        try:
            connection.request("POST", "/embed", self._picture, {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            body = answer.read()
            whole = answer.status != 200 or len(json.loads(body)["embeddings"]) == 1
            self.answers[answer.status if whole else "no embedding"] += 1
        except Exception as error:
            self.answers[type(error).__name__] += 1
        finally:
            connection.close()

    def stop(self) -> None:
        """Send no more, and wait for all answers."""
        self._stop.set()
        self._clock.join()
        self._threads.shutdown()


@pytest.mark.slow("starts two services twice")
def test_a_rolling_restart_costs_no_request(tmp_path: Path, data_root: Path) -> None:
    photo = next((data_root / "photos").glob("*.JPEG")).read_bytes()
    with ExitStack() as stack:
        replicas = [Replica(tmp_path / name, workers=1) for name in ("first", "second")]
        for replica in replicas:
            stack.callback(replica.close)
        steady = Steady(stack.enter_context(in_front(tmp_path, [one.port for one in replicas])), photo, rate=50)
        stack.callback(steady.stop)
        # A replica that has started counts from 0. For 5 s after it has refused a connection, nginx sends it nothing;
        # until then the other one must not go.
        for after in (*replicas, None):
            until(lambda: all(one.answered() >= 50 for one in replicas))
            if after is not None:
                after.restart()
        steady.stop()
        assert steady.answers == {200: len(steady.sent)}
        # The rate was kept, so the replicas were under load while they restarted.
        assert len(steady.sent) / (steady.sent[-1] - steady.sent[0]) > 45


@pytest.mark.slow("starts a service")
def test_changes_of_a_store_pass(tmp_path: Path) -> None:
    with serving(tmp_path) as direct:
        port = int(direct.rpartition(":")[2])
        with in_front(tmp_path, [port, port]) as address, Client(address) as client:
            picture = encoded(scene())
            # 10 MB is the limit of a picture, and none of nginx.
            uploads = [Upload("a/\u00fc %2F.png", picture, {"n": 1}), Upload("large", bytes(9_999_999))]
            done = list(client.add([*uploads, *(Upload(f"{n}.png", picture) for n in range(40))]))
            assert [one.error.code for one in done if isinstance(one.error, ServiceError)] == ["unsupported_format"]
            assert client.content("a/\u00fc %2F.png") == picture
            assert client.patch("a/\u00fc %2F.png", {"n": 2}).metadata == {"n": 2}
            with pytest.raises(ServiceError) as refused:
                client.delete_matching({}, expect=40)
            assert refused.value.code == "count_mismatch"
            assert client.delete_matching({"n": 2}, expect=1) == 1
            assert client.delete("0.png")
            assert client.count() == 39
