"""Real processes: an accepted request is answered, whichever process is killed."""

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.conftest import MODEL, encoded, scene
from tests.ports import free_port
from tests.serving import LOOKALIKE, running, status_of, wait_until_ready

PHOTO = encoded(scene(500, 375), "JPEG", quality=95)


def embed(address: str, connection: http.client.HTTPConnection | None = None) -> int:
    """Ask once and return the status, on a connection of its own or on a given one."""
    own = connection or http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    own.request("POST", "/embed", PHOTO)
    answer = own.getresponse()
    answer.read()
    return answer.status


class Crowd:
    """Clients that send requests until they are refused, half of them on kept connections."""

    def __init__(self, address: str, size: int = 8) -> None:
        self.address = address
        self.seen: Counter[str] = Counter()
        self.threads = [threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(size)]
        for thread in self.threads:
            thread.start()

    def _ask(self, keeps: bool) -> None:
        kept = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=30)
        with suppress(ConnectionRefusedError):
            while True:
                try:
                    self.seen[str(embed(self.address, kept if keeps else None))] += 1
                except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                    # The server closed an idle connection or one in the accept queue.
                    self.seen["closed"] += 1
                    kept.close()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.slow("starts a service and keeps it under load until it has drained")
def test_sigterm_under_load_loses_no_accepted_request(tmp_path: Path) -> None:
    with running(tmp_path, "--model", str(MODEL), "--no-store") as (server, address, log):
        crowd = Crowd(address)
        host, port = urlsplit(address).netloc.split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PHOTO))
            slow.sendall(PHOTO[:1000])
            time.sleep(1)
            assert status_of(address + "/readyz") == 200
            begun = time.monotonic()
            server.terminate()
            readiness = []
            # The service is unready at once, while it still answers requests.
            while time.monotonic() - begun < 3:
                with suppress(OSError):
                    readiness.append(status_of(address + "/readyz"))
                time.sleep(0.05)
            assert server.poll() is None, log.read_text()
            # A new connection is refused or reset; a request that is coming in is answered.
            with pytest.raises(OSError):
                embed(address)
            slow.sendall(PHOTO[1000:])
            assert slow.recv(100).startswith(b"HTTP/1.1 200")
        assert server.wait(25) == 0, log.read_text()
        crowd.join()
        assert 503 in readiness
        assert readiness.index(503) <= 2, readiness
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        accepted = Counter(str(line["status"]) for line in lines if line.get("path") == "/embed")
        assert set(accepted) == {"200"}
        assert crowd.seen["200"] + 1 == accepted["200"] > 100
        assert "Traceback" not in log.read_text()


@pytest.mark.slow("waits until the draining of a service is given up")
def test_a_request_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    with running(tmp_path, "--model", str(MODEL), "--no-store", body_timeout_s="300") as (server, address, _):
        host, port = urlsplit(address).netloc.split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
            time.sleep(0.3)
            begun = time.monotonic()
            server.terminate()
            assert server.wait(40) == 0
            assert time.monotonic() - begun < 25


@pytest.mark.slow("starts a service and waits until its orphaned worker notices")
def test_a_worker_does_not_outlive_its_parent(tmp_path: Path) -> None:
    with running(tmp_path, "--model", str(MODEL), "--store", str(tmp_path / "store")) as (server, address, _):
        workers = psutil.Process(server.pid).children(recursive=True)
        crowd = Crowd(address, 4)
        time.sleep(0.5)
        server.kill()
        begun = time.monotonic()
        while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
            assert time.monotonic() - begun < 2
            time.sleep(0.02)
        # The clients end because the port is closed.
        crowd.join()
    again = subprocess.run(
        [LOOKALIKE, "index", "digits[:2]", "--model", MODEL, "--store", tmp_path / "store"],
        capture_output=True,
        text=True,
        check=False,
    )
    # The command succeeds only if the store's lock is free.
    assert again.returncode == 0, again.stderr


@pytest.mark.slow("starts two services and waits for their restarted workers")
@pytest.mark.parametrize("flags", [["--store"], ["--no-store", "--workers", "2"]])
def test_a_killed_worker_is_replaced(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, str(tmp_path / "store")] if flags == ["--store"] else flags
    with running(tmp_path, "--model", str(MODEL), *flags) as (server, address, log):
        parent = psutil.Process(server.pid)
        before = {child.pid for child in parent.children()}
        os.kill(max(before), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while {child.pid for child in parent.children()} <= before or len(parent.children()) < len(before):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        wait_until_ready(address, server, log)
        assert embed(address) == 200


def metrics(address: str) -> str:
    return str(urllib.request.urlopen(address + "/metrics").read().decode())


@pytest.mark.slow("starts a service of several workers")
def test_without_a_store_several_workers_embed_and_count_together(tmp_path: Path) -> None:
    with running(tmp_path, "--model", str(MODEL), "--no-store", "--workers", "2") as (_, address, _):
        lanes = 'lookalike_encoder_lanes{model="mnist",provider="CPUExecutionProvider",variant="fp32"}'
        deadline = time.monotonic() + 60
        # Ready means that one of the workers has opened its encoder.
        while f"{lanes} 2.0" not in metrics(address):
            assert time.monotonic() < deadline, metrics(address)
            time.sleep(0.1)
        for _ in range(40):
            # Each request has its own connection, so both workers get some.
            assert embed(address) == 200
        (tmp_path / "another").mkdir()
        with running(tmp_path / "another", "--model", str(MODEL), "--no-store"):
            # BentoML empties its metrics folder when a service starts.
            pass
        for _ in range(4):
            assert 'lookalike_requests_total{method="POST",route="/embed",status="200"} 40.0' in metrics(address)
        assert json.load(urllib.request.urlopen(address + "/info"))["count"] is None
        for path in ("/images", "/images/7"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(address + path)
            assert caught.value.code == 404
            assert json.load(caught.value)["code"] == "no_store"
        assert not (tmp_path / ".lookalike").exists()


def test_several_workers_need_no_store() -> None:
    refused = subprocess.run(
        [LOOKALIKE, "serve", "--workers", "2", "--port", str(free_port())], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    why = "--workers 2 needs --no-store or a Milvus server: a store in a folder has one writer"
    assert refused.stderr == f"lookalike: {why}\n"
