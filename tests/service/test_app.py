"""The real process: ready when searchable, gone when told, its store free again."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import MODEL
from tests.serving import LOOKALIKE, free_port


def get(address: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_service_starts_empty_answers_and_stops_cleanly(stop: signal.Signals, tmp_path: Path) -> None:
    port, store = free_port(), tmp_path / "new" / "store"
    log = tmp_path / "log"
    with log.open("w") as output:
        command: list[str | Path] = [LOOKALIKE, "serve", "--model", MODEL, "--store", store, "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + 60
    while get(f"http://127.0.0.1:{port}/readyz")[0] != 200:
        assert time.monotonic() < deadline, log.read_text()
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    assert b'"count":0' in get(f"http://127.0.0.1:{port}/info")[1]
    status, metrics = get(f"http://127.0.0.1:{port}/metrics")
    assert status == 200
    assert b'lookalike_requests_total{method="GET",route="/info",status="200"} 1.0' in metrics
    assert get(f"http://127.0.0.1:{port}/images/nobody/content")[0] == 404
    metrics = get(f"http://127.0.0.1:{port}/metrics")[1]
    assert b'lookalike_requests_total{method="GET",route="/images/{id}/content",status="404"} 1.0' in metrics
    os.killpg(server.pid, stop)  # as a terminal's Ctrl-C does, and as a supervisor does
    assert server.wait(20) == 0, log.read_text()
    text = log.read_text()
    assert f"Lookalike on http://127.0.0.1:{port}" in text
    assert "Traceback" not in text
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the port is still open"
    again = subprocess.run(
        [LOOKALIKE, "index", "digits[:2]", "--store", store], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
