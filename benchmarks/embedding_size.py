"""The cost of an embedding's dimensions: memory and disk of an item, and search time, at 1,280, 512 and 256.

    python -m benchmarks.embedding_size

Items are random unit vectors without pictures. Memory is the growth of a separate process that opens the store and
searches. The lower limit is the vectors alone, 4 bytes a number.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from service import FloatArray
from service.encoding.card import Card, square_preprocessing
from service.store import NewItem
from service.store.embedded import EmbeddedStore

_DIMENSIONS = (1280, 512, 256)
_BATCH, _SEARCHES, _K = 1000, 50, 10


def main(
    count: Annotated[int, typer.Option(help="Items in the store.")] = 50_000,
    opened: Annotated[str, typer.Option(hidden=True)] = "",
    dimension: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Print the table."""
    if opened:
        print(json.dumps(_open(Path(opened), dimension)))
        return
    # Imported late because torch would add to the memory of the measuring process.
    from benchmarks.machine import describe

    print(describe())
    print(f"{count} items, exact search, k = {_K}")
    print(
        "| dimensions | vectors alone, bytes an item | memory, bytes an item | disk, bytes an item | search p50, ms |"
    )
    print("|---|---|---|---|---|")
    for size in _DIMENSIONS:
        with tempfile.TemporaryDirectory() as work:
            _fill(Path(work) / "store", size, count)
            disk = sum(path.stat().st_size for path in (Path(work) / "store").rglob("*") if path.is_file())
            command = [sys.executable, "-m", "benchmarks.embedding_size", "--opened", f"{work}/store"]
            done = subprocess.run([*command, "--dimension", str(size)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
        memory = found["bytes"] / count
        print(f"| {size} | {4 * size} | {memory:.0f} | {disk / count:.0f} | {found['p50_ms']:.2f} |", flush=True)


def _card() -> Card:
    return Card(Path("toy"), "toy", "f" * 64, b"", square_preprocessing(8), {})


def _item(number: int, row: FloatArray) -> NewItem:
    return NewItem(f"{number:07}", {}, None, f"{number:064x}", "fp32", row, b"", None)


def _fill(folder: Path, dimension: int, count: int) -> None:
    store = EmbeddedStore(folder, _card(), dimension)
    random = np.random.default_rng(0)
    for start in range(0, count, _BATCH):
        rows = random.normal(size=(_BATCH, dimension)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        store.add([_item(start + n, row) for n, row in enumerate(rows)])
    store.settle()
    store.close()


def _open(folder: Path, dimension: int) -> dict[str, float]:
    """Open a store and search it; return the growth in bytes and the median search time."""
    process = psutil.Process()
    before = process.memory_info().rss
    store = EmbeddedStore(folder, _card(), dimension)
    random = np.random.default_rng(1)
    taken = []
    for _ in range(_SEARCHES):
        query = random.normal(size=(1, dimension)).astype(np.float32)
        query /= np.linalg.norm(query)
        start = time.perf_counter()
        store.search(query, _K)
        taken.append(time.perf_counter() - start)
    after = process.memory_info().rss
    store.close()
    return {"bytes": after - before, "p50_ms": 1000 * float(np.median(taken))}


if __name__ == "__main__":
    typer.run(main)
