"""What a service needs: memory and processor time by encoder and by number of items. For docs/operations.md, "Sizing".

    python -m benchmarks.sizing

Memory is the PSS of all processes of the service. That of items is the anonymous part alone: the rest is pages of the
catalog, which the kernel drops when memory is short. Processor time is that of all processes, too. Other work on the
machine makes threads wait for each other, and some of that is processor time: the least of several turns is printed.
Items have clustered vectors, 200 around each centre in 64 of the dimensions, and neither pictures nor metadata.
"""

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import psutil
import typer

from benchmarks import load
from benchmarks.photos import photos
from benchmarks.servers import OURS, running
from service import FloatArray
from service.encoding.card import read_card
from service.encoding.pretrained import default_encoder
from service.store import NewItem
from service.store.embedded import EmbeddedStore
from tests.ports import free_port

_MNIST, _CIFAR = Path("models/mnist"), Path("models/cifar10")
_CLIENTS, _SEARCHERS, _K, _QUERIES = 16, 4, 10, 64
_PER_CENTRE, _INNER, _NOISE = 200, 64, 0.6
# Items a commit, as in `lookalike store import`.
_GROUP = 1000
_EVERY_S, _SETTLED_S = 0.5, 3
_TURNS, _FEW = 3, 1000

R = TypeVar("R")


class Kind(NamedTuple):
    """A kind of store.

    Attributes:
        model: the encoder of its service.
        dimension: of that encoder.
        vector_type: of vectors on disk.
        scanned: "all" if a search scans all items, as below `exact_limit`, or "a part", as above it.
    """

    model: Path
    dimension: int
    vector_type: str
    scanned: str


class Load(NamedTuple):
    """A service's memory in MB after its start and at its largest under load, and the least processor ms a request.

    `anonymous_mb` is what of its memory under load belongs to no file.
    """

    start_mb: float
    most_mb: float
    anonymous_mb: float
    request_ms: float


def main(
    count: Annotated[int, typer.Option(min=10_000, help="Items of a store.")] = 100_000,
    seconds: Annotated[float, typer.Option(min=1, help="Length of a turn.")] = 5,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps ResNet-18 for the next run.")] = None,
) -> None:
    """Print two tables."""
    photos_encoder = default_encoder()
    # The type of vectors on disk does not change the index, so one of the slow builds is enough.
    kinds = [
        Kind(_CIFAR, 256, "float32", "all"),
        Kind(photos_encoder, 1280, "float32", "all"),
        Kind(photos_encoder, 1280, "float16", "all"),
        Kind(_CIFAR, 256, "float32", "a part"),
        Kind(photos_encoder, 1280, "float32", "a part"),
    ]
    with TemporaryDirectory() as made:
        resnet18 = _apart(_resnet18, work or Path(made))
        print(f"\n{_apart(_describe)}; variant fp32\n")
        _print_encoders({"the default": photos_encoder, "models/mnist": _MNIST, "ResNet-18, 224 px": resnet18}, seconds)
        _print_stores(kinds, count, seconds)


def _apart(work: Callable[..., R], *args: Any) -> R:
    """Run work in a new process, whose memory does not stay in this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def _resnet18(folder: Path) -> Path:
    # Imported late, and in a process of its own, because torch would add to the memory of the measuring process.
    from benchmarks.encoders import build

    return build("resnet18", folder)


def _describe() -> str:
    from benchmarks.machine import describe

    return describe()


# Encoders -----------------------------------------------------------------------------------------


def _print_encoders(encoders: dict[str, Path], seconds: float) -> None:
    print(f"POST /embed of a JPEG of 500×375 by {_CLIENTS} clients; the store is empty:\n")
    print("| encoder | MB after the start | MB under load | processor ms a request | requests/s a core |")
    print("|---|---:|---:|---:|---:|")
    requests = [load.raw("/embed", photo) for photo in photos()]
    for name, model in encoders.items():
        with TemporaryDirectory() as made:
            found = _measure(model, Path(made) / "store", requests, _CLIENTS, seconds)
        print(f"| {name} | {found.start_mb:.0f} | {found.most_mb:.0f} ", end="")
        print(f"| {found.request_ms:.1f} | {1000 / found.request_ms:.0f} |", flush=True)


# Stores -------------------------------------------------------------------------------------------


def _print_stores(kinds: Sequence[Kind], count: int, seconds: float) -> None:
    print(f"\n{count:,} items, POST /search by a vector, k = {_K}, by {_SEARCHERS} clients. ", end="")
    print("Memory is without that of 1,000 items:\n")
    print(
        "| dimensions, on disk | a search scans | MB a million | MB a million on disk | processor ms a search ", end=""
    )
    print("| processor s to build | MB while building |\n|---|---|---:|---:|---:|---:|---:|")
    few: dict[Path, float] = {}
    for kind in kinds:
        requests, limit = _searches(kind, count), count if kind.scanned == "all" else count // 2
        with TemporaryDirectory() as made:
            # A store of a few items shows what does not grow with them.
            if kind.model not in few:
                _apart(_fill, kind, _FEW, _FEW, Path(made) / "few")
                few[kind.model] = _measure(kind.model, Path(made) / "few", requests, _SEARCHERS, 1).anonymous_mb
            store = Path(made) / "store"
            built_s, peak = _apart(_fill, kind, count, limit, store)
            disk = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
            found = _measure(kind.model, store, requests, _SEARCHERS, seconds, limit)
        memory_mb = (found.anonymous_mb - few[kind.model]) / (count - _FEW) * 1e6
        print(
            f"| {kind.dimension:,}, {kind.vector_type} | {kind.scanned} | {memory_mb:.0f} | {disk / count:.0f} ", end=""
        )
        print(f"| {found.request_ms:.1f} | {built_s:.0f} | {peak / 1e6:.0f} |", flush=True)


def _searches(kind: Kind, count: int) -> list[bytes]:
    """Return searches by vectors that are none of the store's, of its clusters."""
    rows = _drawn(_clusters(kind, count), _QUERIES, np.random.default_rng(1))
    asks = [json.dumps({"vector": row.tolist(), "k": _K}).encode() for row in rows]
    return [load.request("/search", "application/json", ask) for ask in asks]


def _clusters(kind: Kind, count: int) -> tuple[FloatArray, FloatArray]:
    """Return the centres (L, 64), unit rows, and orthonormal rows (64, D) that bring them into the store's space."""
    rng = np.random.default_rng(0)
    centres = _unit(rng.standard_normal((count // _PER_CENTRE, _INNER), np.float32))
    return centres, np.linalg.qr(rng.standard_normal((kind.dimension, _INNER), np.float32))[0].T


def _drawn(clusters: tuple[FloatArray, FloatArray], count: int, rng: np.random.Generator) -> FloatArray:
    centres, directions = clusters
    noise = rng.standard_normal((count, _INNER), np.float32) * np.float32(_NOISE / _INNER**0.5)
    return _unit((centres[rng.integers(0, len(centres), count)] + noise) @ directions)


def _unit(rows: FloatArray) -> FloatArray:
    unit: FloatArray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _fill(kind: Kind, count: int, exact_limit: int, folder: Path) -> tuple[float, int]:
    """Make a store; return its processor seconds, those of drawing vectors left out, and its peak memory in bytes."""
    clusters, rng, drawing = _clusters(kind, count), np.random.default_rng(2), 0.0
    before = time.process_time()
    card = read_card(kind.model)
    store = EmbeddedStore(folder, card, kind.dimension, exact_limit=exact_limit, vector_type=kind.vector_type)
    for first in range(0, count, _GROUP):
        start = time.process_time()
        rows = _drawn(clusters, min(_GROUP, count - first), rng)
        drawing += time.process_time() - start
        store.add([_item(first + number, row) for number, row in enumerate(rows)])
    store.settle()
    store.close()
    return time.process_time() - before - drawing, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _item(number: int, vector: FloatArray) -> NewItem:
    return NewItem(f"{number:07}", {}, None, f"{number:064x}", "fp32", vector, b"", None)


# Measuring ----------------------------------------------------------------------------------------


def _measure(
    model: Path, store: Path, requests: Sequence[bytes], clients: int, seconds: float, exact_limit: int = 100_000
) -> Load:
    """Serve a store, send requests, and return what the service took."""
    with TemporaryDirectory() as made, _served(model, store, Path(made), exact_limit) as (port, service):
        start = _memory(service)
        files = [Path(made) / f"request-{number}" for number in range(len(requests))]
        for file, request in zip(files, requests, strict=True):
            file.write_bytes(request)
        load.run(port, files, clients, 1)
        times = []
        with _watched(service) as most:
            for _ in range(_TURNS):
                before = _processor_s(service)
                result = load.run(port, files, clients, seconds, warm_up=0)
                if result.statuses.keys() != {"200"} or result.errors:
                    raise RuntimeError(f"not every request was answered with 200: {result}")
                # The last request of each client is answered after the turn, and load.run waits for it.
                times.append((_processor_s(service) - before) / (result.good + clients))
        anonymous = _memory(service, "Pss_Anon")
    return Load(start / 1e6, max(most) / 1e6, anonymous / 1e6, 1000 * min(times))


@contextmanager
def _served(model: Path, store: Path, folder: Path, exact_limit: int) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    environment = {"LOOKALIKE_MODEL": str(model), "LOOKALIKE_STORE": str(store), "LOOKALIKE_VARIANT": "fp32"}
    environment["LOOKALIKE_EXACT_LIMIT"] = str(exact_limit)
    ready = f"http://127.0.0.1:{port}{OURS.ready}"
    with running(OURS.command.format(port=port).split(), ready, environment, folder / "log", 180) as service:
        # What the start has put off is done by then.
        time.sleep(_SETTLED_S)
        yield port, service


@contextmanager
def _watched(service: psutil.Process) -> Iterator[list[int]]:
    """Yield a list that grows by the service's memory in bytes, until the end of the block."""
    found, ended = [_memory(service)], threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY_S):
            found.append(_memory(service))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _memory(service: psutil.Process, field: str = "Pss") -> int:
    """Return the sum of a field of the kernel's smaps_rollup, in bytes."""
    processes = (service, *service.children(recursive=True))
    texts = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in processes]
    return sum(int(text.split(f"{field}:")[1].split()[0]) * 1024 for text in texts)


def _processor_s(service: psutil.Process) -> float:
    times = [process.cpu_times() for process in (service, *service.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


if __name__ == "__main__":
    typer.run(main)
