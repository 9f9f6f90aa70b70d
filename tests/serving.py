"""The real `lookalike serve` in processes of its own, ended for certain."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

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
    chosen = ["--model", str(MODEL), "--store", str(folder / "store")]
    if pictures:
        index = [str(LOOKALIKE), "index", pictures, *chosen]
        subprocess.run(index, check=True, capture_output=True, env=_environment(settings))
    with running(folder, *chosen, **settings) as (server, address, log):
        yield address
        server.terminate()
        assert server.wait(25) == 0, log.read_text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", urlsplit(address).port or 0)) != 0, f"{address} is still open"


@contextmanager
def running(folder: Path, *flags: str, **settings: str) -> Iterator[tuple["subprocess.Popen[bytes]", str, Path]]:
    """Run `lookalike serve` on a free port; yield its process, its address and its log once it is ready.

    At the end of the block no process of it is left, however it ended.
    """
    port = free_port()
    log = folder / "serve.log"
    with log.open("wb") as output:
        command = [str(LOOKALIKE), "serve", *flags, "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(settings))
    tree = []
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, log)
        # Workers have sessions of their own and may survive their parent's death: each is ended by its id.
        tree = psutil.Process(server.pid).children(recursive=True)
        yield server, f"http://127.0.0.1:{port}", log
    finally:
        if server.poll() is None:
            tree += psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
        for worker in psutil.wait_procs(tree, timeout=5)[1]:
            worker.kill()


@contextmanager
def killed(folder: Path, **settings: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve the store in a folder; yield the address and what kills every process at once, as the end does."""
    tree: list[psutil.Process] = []
    chosen = ["--model", str(MODEL), "--store", str(folder / "store")]
    with running(folder, *chosen, **settings) as (server, address, _):

        def kill() -> None:
            if server.poll() is None:  # else they were killed before
                tree.extend([psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)])
                for process in tree:
                    process.suspend()  # so that nobody has a word about another's end
                for process in tree:
                    process.kill()
                server.wait()

        try:
            yield address, kill
        finally:
            kill()
    assert not psutil.wait_procs(tree, timeout=10)[1], "a process of the service outlived it"
    assert len(tree) > 1, "the worker was not among those that were killed"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", urlsplit(address).port or 0)) != 0, f"{address} is still open"


def status_of(url: str) -> int:
    """Return the status of a GET. Raises OSError without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def wait_until_ready(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return as soon as /readyz answers 200."""
    deadline = time.monotonic() + 60
    while True:
        with suppress(OSError):  # refused, reset, or no answer in time
            if status_of(f"{address}/readyz") == 200:
                return
        assert time.monotonic() < deadline, log.read_text()
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    named = {name if name.isupper() else f"LOOKALIKE_{name.upper()}": value for name, value in settings.items()}
    return {**os.environ, "LOOKALIKE_VARIANT": "fp32", **named}  # the fastest differs from machine to machine
