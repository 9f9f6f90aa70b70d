"""The measured servers: commands, requests, and context managers that start and end them."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from benchmarks.load import form, raw
from service.encoding.card import VARIANTS, read_card
from tests.ports import free_port

_BIN = Path(sys.executable).parent
_UVICORN = (
    f"{sys.executable} -m uvicorn --loop uvloop --http httptools --no-access-log --log-level warning --port {{port}} "
)


@dataclass(frozen=True)
class Server:
    """One way to embed pictures over HTTP.

    Attributes:
        name: its name in tables.
        command: contains {port}.
        ready: a path that answers 200 once the server is ready.
        ask: makes a request from the bytes of a picture.
        environment: additional environment variables.
    """

    name: str
    command: str
    ready: str
    ask: Callable[[bytes], bytes]
    environment: dict[str, str] = field(default_factory=dict)


_raw = partial(raw, "/embed")
_SERVE = f"{_BIN}/lookalike serve --port {{port}}"
_ONNXRUNTIME = {"LOOKALIKE_RUNTIME": "onnxruntime"}
OURS = Server("Lookalike, `lookalike serve`", _SERVE, "/readyz", _raw, _ONNXRUNTIME)
# Runtime and variant by measurement, on this processor and on one whose OpenVINO may use fewer instructions.
_MEASURED = {"LOOKALIKE_RUNTIME": "auto", "LOOKALIKE_VARIANT": "auto"}
MEASURED = Server("Lookalike, runtime by measurement", _SERVE, "/readyz", _raw, _MEASURED)
WITHOUT_AMX = tuple(
    replace(MEASURED, name=f"{MEASURED.name}, {called}", environment=_MEASURED | {"ONEDNN_MAX_CPU_ISA": most})
    for called, most in (("no AMX", "AVX512_CORE_VNNI"), ("AVX2", "AVX2"))
)
_FASTAPI = _UVICORN + "benchmarks.peers.fastapi_pool:app"
BARE = Server("Lookalike, bare uvicorn", _UVICORN + "benchmarks.bare:guarded", "/info", _raw, _ONNXRUNTIME)
PEERS = (
    Server("plain FastAPI, thread pool", _FASTAPI, "/health", _raw),
    Server(
        "LitServe, batch 16",
        f"{sys.executable} -m benchmarks.peers.litserve_peer",
        "/health",
        lambda photo: form("/embed", "image", [photo]),
    ),
    Server(
        "BentoML, typed pictures, batchable",
        f"{_BIN}/bentoml serve benchmarks.peers.bentoml_batchable:Peer --port {{port}}",
        "/readyz",
        lambda photo: form("/embed", "pictures", [photo]),
    ),
)
# The fastest configuration of any peer found on two cores: two processes, each with one inference thread a request.
TUNED = Server("FastAPI tuned: 2 processes", f"{_FASTAPI} --workers 2", "/health", _raw, {"PEER_THREADS": "1"})


@contextmanager
def serving(server: Server, model: Path, variant: str, folder: Path, patience_s: float = 60) -> Iterator[int]:
    """Run a server with a variant of an encoder until the end of the block; yield its port.

    Args:
        server: the server to run.
        model: a model folder.
        variant: a variant in that folder.
        folder: for the store and the log.
        patience_s: the time limit for becoming ready.
    """
    port = free_port()
    environment = {
        "LOOKALIKE_MODEL": str(model),
        "LOOKALIKE_VARIANT": variant,
        "LOOKALIKE_STORE": str(folder / "store"),
        "PEER_MODEL": str(model / VARIANTS[variant]),
        "PEER_SIDE": str(read_card(model).preprocessing.side),
        "PEER_PORT": str(port),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    command = server.command.format(port=port).split()
    ready = f"http://127.0.0.1:{port}{server.ready}"
    with running(command, ready, environment | server.environment, folder / "log", patience_s):
        yield port


@contextmanager
def running(
    command: Sequence[str], ready: str, environment: dict[str, str], log: Path, patience_s: float = 60
) -> Iterator[psutil.Process]:
    """Run a server until the end of the block; yield its first process once it is ready. All its processes end.

    Args:
        command: the server's command.
        ready: a URL that answers 200 once the server is ready.
        environment: added to our own.
        log: a file for its output.
        patience_s: the time limit for becoming ready.

    Raises:
        RuntimeError: the server ended or was not ready in time; the message contains its log.
    """
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
    first = psutil.Process(server.pid)
    tree = [first]
    try:
        _wait_until_ready(server, ready, log, patience_s)
        # Workers may outlive a parent that dies, so their ids are needed before.
        tree += first.children(recursive=True)
        yield first
    finally:
        if server.poll() is None:
            tree += [process for process in first.children(recursive=True) if process not in tree]
            server.terminate()
        psutil.wait_procs([first], timeout=20)
        for process in psutil.wait_procs(tree, timeout=2)[1]:
            process.kill()
        server.wait()


def processor_s(pid: int) -> npt.NDArray[np.float64]:
    """Return the processor time so far of a process and all below it: (2,), main threads and all others."""
    root = psutil.Process(pid)
    times = np.zeros(2)
    for one in (root, *root.children(recursive=True)):
        for thread in one.threads():
            # The event loop runs in the main thread, whose id is that of its process.
            times[int(thread.id != one.pid)] += thread.user_time + thread.system_time
    return times


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not become ready:\n{log.read_text()}") from None
        time.sleep(0.2)
