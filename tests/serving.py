"""The real `lookalike serve` in processes of its own, ended for certain."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import MODEL

LOOKALIKE = Path(sys.executable).with_name("lookalike")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path, pictures: str = "", **settings: str) -> Iterator[str]:
    """Serve a store in a folder on a free port until the end of the block; yield the address.

    Args:
        folder: for the store, and for the log, serve.log.
        pictures: a source to index first.
        settings: as text, like environment variables; a name in capitals is one.
    """
    environment = _environment(settings)
    chosen = ["--model", str(MODEL), "--store", str(folder / "store")]
    if pictures:
        index = [str(LOOKALIKE), "index", pictures, *chosen]
        subprocess.run(index, check=True, capture_output=True, env=environment)
    port = free_port()
    command = [str(LOOKALIKE), "serve", *chosen, "--port", str(port)]
    log = folder / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/readyz", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        # Workers have sessions of their own and survive their parent's death: each is ended by its id.
        alive = server.poll() is None
        workers = psutil.Process(server.pid).children(recursive=True) if alive else []
        server.terminate()
        try:
            server.wait(timeout=25)
        except subprocess.TimeoutExpired:
            server.kill()
        for worker in psutil.wait_procs(workers, timeout=5)[1]:
            worker.kill()
    assert server.wait() == 0, log.read_text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still open"


@contextmanager
def killed(folder: Path, **settings: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve as `serving` does; yield the address and what kills every process at once, which the end does anyway."""
    port, log = free_port(), folder / "serve.log"
    command = [str(LOOKALIKE), "serve", "--model", str(MODEL), "--store", str(folder / "store"), "--port", str(port)]
    with log.open("ab") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(settings))
    tree: list[psutil.Process] = []

    def kill() -> None:
        if server.poll() is None:  # else they were killed before
            tree.extend([psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)])
            for process in tree:
                process.suspend()  # so that nobody has a word about another's end
            for process in tree:
                process.kill()
            server.wait()

    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/readyz", server, log)
        yield f"http://127.0.0.1:{port}", kill
    finally:
        kill()
    assert not psutil.wait_procs(tree, timeout=10)[1], "a process of the service outlived it"
    assert len(tree) > 1, "the worker was not among those that were killed"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still open"


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    named = {name if name.isupper() else f"LOOKALIKE_{name.upper()}": value for name, value in settings.items()}
    return {**os.environ, "LOOKALIKE_VARIANT": "fp32", **named}  # the fastest differs from machine to machine


def _wait_until_ready(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:  # refused, reset, or no answer in time
            assert time.monotonic() < deadline, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
