"""The collections of benchmarks/search.py: vectors, queries, true neighbours and every program's index, on disk."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from benchmarks.search_peers import D, Peer, chunks, percents
from service import FloatArray, IntArray
from service.encoding.card import read_card
from service.sources import open_source
from service.store import NewItem
from service.store.embedded import EmbeddedStore

# It has D dimensions.
MODEL = Path(__file__).parent.parent / "models" / "cifar10"
QUERIES = 1000
# Selectivities in percent.
FILTERS = (1, 2, 3, 50)
_PER_CENTRE = 200
# The length of the noise, relative to the centres' length of 1.
_NOISE = 0.6
_BLOCK = 50_000
# As many items a commit as in `lookalike store import`.
_GROUP = 1024

R = TypeVar("R")


@dataclass(frozen=True)
class Collection:
    """A folder with vectors, queries and indexes.

    Attributes:
        folder: created when missing.
        exact_limit: the store's setting.
    """

    folder: Path
    exact_limit: int

    @property
    def vectors(self) -> Path:
        """Return the path of a float32 file: (count, D), unit rows."""
        return self.folder / "vectors.f32"

    @property
    def count(self) -> int:
        """Return the number of vectors."""
        return self.vectors.stat().st_size // (4 * D)

    @property
    def queries(self) -> FloatArray:
        """Return (1000, D) unit rows, none of them a stored vector."""
        queries: FloatArray = np.load(self.folder / "queries.npy")
        return queries

    @property
    def store(self) -> Path:
        """Return the store's folder."""
        return self.folder / "store"

    def write(self, blocks: Iterator[FloatArray], queries: FloatArray) -> None:
        """Write vectors and queries, unless they exist."""
        if (self.folder / "queries.npy").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.vectors.open("wb") as file:
            for block in blocks:
                file.write(_unit(block).tobytes())
        np.save(self.folder / "queries.npy", _unit(queries))

    def truth(self, percent: int = 100) -> IntArray:
        """Return the ids of the 10 nearest items that match a filter, for each query, by an exact scan."""
        path = self.folder / f"truth-{percent}.npy"
        if not path.exists():
            self._find_truth()
        found: IntArray = np.load(path)
        return found

    def _find_truth(self) -> None:
        queries = self.queries
        best = {
            percent: (np.empty((QUERIES, 0), np.float32), np.empty((QUERIES, 0), np.int64))
            for percent in (100, *FILTERS)
        }
        for numbers, rows in tqdm(chunks(self.vectors), "true neighbours", leave=False):
            scores = queries @ rows.T
            for percent, (known, ids) in best.items():
                matches = percents(numbers) < percent
                both = np.concatenate([known, scores[:, matches]], 1)
                every = np.concatenate([ids, np.broadcast_to(numbers[matches], (QUERIES, int(matches.sum())))], 1)
                top = np.argpartition(-both, 9, axis=1)[:, :10]
                best[percent] = (np.take_along_axis(both, top, 1), np.take_along_axis(every, top, 1))
        for percent, (_, ids) in best.items():
            np.save(self.folder / f"truth-{percent}.npy", ids)

    def open(self) -> EmbeddedStore:
        """Open the store, and do its background work."""
        store = EmbeddedStore(self.store, read_card(MODEL), D, exact_limit=self.exact_limit)
        store.settle()
        return store

    def fill(self) -> dict[str, float]:
        """Fill the store, unless it exists; return vectors/s, seconds and peak bytes."""
        return self._once("ours", lambda: apart(_fill, self))

    def imported(self) -> dict[str, float]:
        """Run `lookalike store import` from Parquet, once; return seconds and peak bytes.

        The encoder decides the dimension of the store, so each vector keeps only as many of its numbers.
        """
        return self._once("import", self._import)

    def _import(self) -> dict[str, float]:
        with TemporaryDirectory(dir=self.folder) as made:
            parquet = Path(made) / "vectors.parquet"
            dimension = min(D, int(read_card(MODEL).facts["dimension"]))
            schema = pa.schema({"id": pa.string(), "embedding": pa.list_(pa.float32(), dimension)})
            with pq.ParquetWriter(parquet, schema) as file:
                for numbers, rows in chunks(self.vectors):
                    kept = rows[:, :dimension] / np.linalg.norm(rows[:, :dimension], axis=1, keepdims=True)
                    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(kept.ravel()), dimension)
                    file.write_table(pa.table([pa.array(numbers).cast(pa.string()), embeddings], schema))
            return self._lookalike("store", "import", parquet, "--store", Path(made) / "store", "--model", MODEL)

    def indexed(self, data_root: Path) -> dict[str, float]:
        """Run `lookalike index` on `count` pictures, once; return seconds and peak bytes.

        The pictures are MNIST's digits, each with up to 25 shifts.
        """
        return self._once("index", lambda: self._index(data_root))

    def _index(self, data_root: Path) -> dict[str, float]:
        digits = open_source("mnist/train", data_root)
        with TemporaryDirectory(dir=self.folder) as made:
            pictures = Path(made) / "pictures"
            for number in tqdm(range(self.count), "writing pictures", leave=False):
                if not number % 1000:
                    (folder := pictures / f"{number // 1000:04}").mkdir(parents=True)
                shift, which = divmod(number, len(digits))
                pixels = np.asarray(Image.open(BytesIO(digits.entry(which).data)))
                moved = np.roll(pixels, (shift // 5 - 2, shift % 5 - 2), (0, 1))
                Image.fromarray(moved).save(folder / f"{number % 1000:03}.png", compress_level=1)
            return self._lookalike("index", pictures, "--store", Path(made) / "store", "--model", MODEL)

    def _lookalike(self, *arguments: str | Path) -> dict[str, float]:
        command = [Path(sys.executable).with_name("lookalike"), *arguments]
        return apart(_run, command, {"LOOKALIKE_EXACT_LIMIT": str(self.exact_limit)})

    def make(self, peer: Peer) -> dict[str, float]:
        """Build a peer's index, unless it exists; return vectors/s, seconds and peak bytes."""
        return self._once(peer.name, lambda: apart(_make, peer, self.vectors, self.folder / peer.name))

    def opened(self, peer: Peer) -> Peer:
        """Return a peer ready to search; build its index if missing."""
        self.make(peer)
        peer.load(self.folder / peer.name)
        return peer

    def _once(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
        told: dict[str, float] = json.loads(path.read_text())
        return told


def synthetic(folder: Path, count: int, exact_limit: int) -> Collection:
    """Return a collection of clustered vectors, 200 around each centre."""
    rng = np.random.default_rng(0)
    centres = _unit(rng.standard_normal((max(count // _PER_CENTRE, 1), D), np.float32))

    def some(size: int) -> FloatArray:
        noise = rng.standard_normal((size, D), np.float32) * np.float32(_NOISE / D**0.5)
        drawn: FloatArray = centres[rng.integers(0, len(centres), size)] + noise
        return drawn

    collection = Collection(folder, exact_limit)
    queries = some(QUERIES)
    sizes = (min(_BLOCK, count - start) for start in range(0, count, _BLOCK))
    collection.write((some(size) for size in sizes), queries)
    return collection


def item(number: int, vector: FloatArray) -> NewItem:
    """Return an item without a picture."""
    return NewItem(
        str(number), {"percent": int(percents(np.asarray(number)))}, None, "0" * 64, "fp32", vector, b"", None
    )


def held(name: str) -> int:
    """Return a field of /proc/self/status in bytes: VmHWM is the peak memory, RssAnon the current anonymous memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def apart(work: Callable[..., R], *args: Any) -> R:
    """Run work in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _unit(rows: FloatArray) -> FloatArray:
    unit: FloatArray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _fill(collection: Collection) -> dict[str, float]:
    start = time.perf_counter()
    store = collection.open()
    for numbers, rows in chunks(collection.vectors):
        for first in range(0, len(rows), _GROUP):
            some = slice(first, first + _GROUP)
            pairs = zip(numbers[some].tolist(), rows[some], strict=True)
            store.add([item(number, vector) for number, vector in pairs])
    added = time.perf_counter() - start
    store.settle()
    rate = store.count() / added
    store.close()
    told = {"rate": rate, "seconds": time.perf_counter() - start}
    os.sync()
    return told | {"peak": float(held("VmHWM"))}


def _make(peer: Peer, vectors: Path, folder: Path) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    peer.make(vectors, folder)
    seconds = time.perf_counter() - start
    return {"rate": vectors.stat().st_size / (4 * D) / seconds, "seconds": seconds, "peak": float(held("VmHWM"))}


def _run(command: list[str | Path], environment: dict[str, str]) -> dict[str, float]:
    """Run a command. The calling process must be small: Linux reports a child's peak as at least its parent's size."""
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | environment)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0}
