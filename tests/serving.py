"""Run the real `lookalike serve` in a process tree of its own, and make sure that no process of it is left."""

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
from tests.ports import free_port

LOOKALIKE = Path(sys.executable).with_name("lookalike")


@contextmanager
def serving(folder: Path, pictures: str = "", encoder: Path = MODEL, **settings: str) -> Iterator[str]:
    """Serve the store in a folder on a free port until the block ends; yield the address.

    Args:
        folder: holds the store and the log, serve.log.
        pictures: a source to index before serving; "" for none.
        encoder: its model folder.
        settings: environment variables as text. A name in lower case gets the prefix LOOKALIKE_.
    """
    chosen = ["--model", str(encoder), "--store", str(folder / "store")]
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
    """Run `lookalike serve` on a free port, or on port="…"; yield process, address and log once it is ready.

    When the block ends, every process of the service is ended too, even after a failure.
    """
    port = int(settings.get("port") or free_port())
    log = folder / "serve.log"
    with log.open("wb") as output:
        command = [str(LOOKALIKE), "serve", *flags, "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(settings))
    tree = []
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, log)
        # Workers run in sessions of their own and may survive their parent, so each is ended by its id.
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
    """Serve the store in a folder; yield the address and a function that kills all processes at once.

    The processes are killed when the block ends, too.
    """
    tree: list[psutil.Process] = []
    chosen = ["--model", str(MODEL), "--store", str(folder / "store")]
    with running(folder, *chosen, **settings) as (server, address, _):

        def kill() -> None:
            # A second call finds nothing to kill.
            if server.poll() is None:
                tree.extend([psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)])
                # All are stopped first, so that no process can react to the death of another.
                for process in tree:
                    process.suspend()
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
    """Return the HTTP status of a GET request. Raises OSError if no answer comes."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def wait_until_ready(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until /readyz answers 200. Fails after 180 s, or when the server ends, with its log."""
    # A start takes seconds on an idle machine, and a minute beside other work.
    deadline = time.monotonic() + 180
    while True:
        # The connection is refused or reset while the service starts.
        with suppress(OSError):
            if status_of(f"{address}/readyz") == 200:
                return
        assert time.monotonic() < deadline, log.read_text()
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    named = {name if name.isupper() else f"LOOKALIKE_{name.upper()}": value for name, value in settings.items()}
    # The fastest variant differs from machine to machine.
    return {**os.environ, "LOOKALIKE_VARIANT": "fp32", **named}
