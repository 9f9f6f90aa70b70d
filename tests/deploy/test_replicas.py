"""Replicas behind a real nginx with deploy/nginx.conf: what one of them loses, another one or a later try answers."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from service import FloatArray
from service.client import Client, ServiceError, Upload
from service.http.guard import _READING_POSTS
from tests.conftest import MODEL, encoded, missing, scene
from tests.ports import free_port
from tests.serving import running, serving, status_of

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"

# What Debian's nginx.conf has around conf.d/, with every file in one folder.
_MAIN = """
user root;
daemon off;
pid nginx.pid;
error_log error.log;
events {}
http {
    log_format replicas '$request_method $uri $status $upstream_status';
    access_log access.log replicas;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include lookalike.conf;
}
"""


@contextmanager
def nginx(folder: Path, replicas: Sequence[int]) -> Iterator[str]:
    """Run nginx with deploy/nginx.conf in front of the replicas at two ports; yield its address."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        missing("no nginx: install Debian's package nginx")
    port = free_port()
    written = CONF.read_text()
    for ours, theirs in (("listen 80;", f"listen 127.0.0.1:{port};"), *zip(("3001", "3002"), replicas, strict=True)):
        assert written.count(ours) == 1
        written = written.replace(ours, str(theirs))
    (folder / "lookalike.conf").write_text(written)
    (folder / "nginx.conf").write_text(_MAIN)
    with (folder / "nginx.log").open("wb") as log:
        server = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"], stdout=log, stderr=log)
    try:
        until(lambda: _listens(port) or server.poll() is not None)
        assert server.poll() is None, (folder / "nginx.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until a condition holds. Fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
        with nginx(tmp_path, quitters.ports) as address:
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
        server, self.address, self._log = self._stack.enter_context(running(self._folder, *flags, port=str(self.port)))
        self._tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]

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
        address = stack.enter_context(nginx(tmp_path, [first.port, second.port]))
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


@pytest.mark.slow("starts a service")
def test_changes_of_a_store_pass(tmp_path: Path) -> None:
    with serving(tmp_path) as direct:
        port = int(direct.rpartition(":")[2])
        with nginx(tmp_path, [port, port]) as address, Client(address) as client:
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
