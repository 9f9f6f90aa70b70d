"""`lookalike serve` in processes of its own, for as long as something is measured."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MODEL = Path(__file__).parent.parent / "models" / "mnist"
_LOOKALIKE = Path(sys.executable).with_name("lookalike")


@contextmanager
def serving(store: Path, log: Path, told: dict[str, str], patience_s: float = 60) -> Iterator[int]:
    """Run `lookalike serve`; yield its port once it is ready. No process of it stays.

    Args:
        store: its folder; made when it is not there.
        log: file for what the service says.
        told: LOOKALIKE_* variables.
        patience_s: time to become ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [str(_LOOKALIKE), "serve", "--model", str(MODEL), "--store", str(store), "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=os.environ | told, stdout=output, stderr=output, start_new_session=True)
    tree = [psutil.Process(server.pid)]
    try:
        _wait_until_ready(server, port, log, patience_s)
        tree += tree[0].children(recursive=True)  # noted now: the worker outlives a parent that dies
        yield port
    finally:
        if server.poll() is None:
            tree += [process for process in tree[0].children(recursive=True) if process not in tree]
            server.terminate()
        for process in psutil.wait_procs(tree, timeout=20)[1]:
            process.kill()
        server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not become ready:\n{log.read_text()}") from None
        time.sleep(0.2)
