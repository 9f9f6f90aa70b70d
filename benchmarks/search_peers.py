"""Other programs for vector search by inner product, behind one interface; ids are row numbers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import lancedb
import numpy as np
import pyarrow as pa
from usearch.index import Index as UsearchIndex

from service import FloatArray, IntArray
from service.store import snapshot

D = 256
_CHUNK = 20_000
_THREADS = 2


def chunks(vectors: Path) -> Iterator[tuple[IntArray, FloatArray]]:
    """Yield row numbers (N,) and rows (N, D) of a float32 file. A memory map would count as memory in use."""
    start = 0
    with vectors.open("rb") as file:
        while len(rows := np.fromfile(file, "<f4", _CHUNK * D).reshape(-1, D)):
            yield np.arange(start, start + len(rows), dtype=np.int64), rows
            start += len(rows)


def percents(numbers: IntArray) -> IntArray:
    """Return the filtered field of each row: an integer from 0 to 99, each on 1 % of the rows."""
    mixed: IntArray = (numbers * 2_654_435_761 >> 7) % 100
    return mixed


class Peer(ABC):
    """A search program with an adjustable effort.

    Attributes:
        name: its name in the table.
        efforts: values of its search parameter, such as nprobe, in ascending order.
    """

    name: str
    efforts: tuple[int, ...]

    @abstractmethod
    def make(self, vectors: Path, folder: Path) -> None:
        """Index a file of vectors into a folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Load the index that `make` wrote."""

    @abstractmethod
    def search(self, queries: FloatArray, effort: int, below: int | None = None) -> IntArray:
        """Return the ids of the 10 nearest rows (N, 10), padded with −1.

        Args:
            queries: (N, D).
            effort: one of `efforts`.
            below: keep only rows with a smaller percent. Only for programs with filters that need no call per row.
        """


class Faiss(Peer):
    """FAISS with the lists, quantiser ranges and nprobe of a store's own index; no catalog, no re-ranking."""

    name = "faiss"

    def __init__(self, store: Path) -> None:
        facts, arrays = snapshot.read(store / snapshot.SNAPSHOT)
        self._centroids, self._ranges = arrays["centroids"], arrays["ranges"]
        self.probes = int(facts["probes"])
        steps = (step * self.probes for step in (1, 2, 4, 8, 16, 32))
        self.efforts = tuple(step for step in steps if step <= len(self._centroids))

    def empty(self) -> Any:
        """Return an index without vectors."""
        coarse = faiss.IndexFlatIP(D)
        coarse.add(self._centroids)
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(coarse, D, len(self._centroids), kind, faiss.METRIC_INNER_PRODUCT, True)
        faiss.copy_array_to_vector(self._ranges, index.sq.trained)
        index.is_trained = True
        # FAISS keeps only a pointer, so Python must own the quantiser.
        self._coarse = coarse
        return index

    def make(self, vectors: Path, folder: Path) -> None:
        index = self.empty()
        for numbers, rows in chunks(vectors):
            index.add_with_ids(rows, numbers)
        faiss.write_index(index, str(folder / "index.faiss"))

    def load(self, folder: Path) -> None:
        self.index: Any = faiss.read_index(str(folder / "index.faiss"))
        self._filters: dict[int, Any] = {}

    def search(self, queries: FloatArray, effort: int, below: int | None = None) -> IntArray:
        parameters: Any = faiss.SearchParametersIVF(nprobe=effort)  # type: ignore[call-arg]
        if below is not None:
            parameters.sel = self._filter(below)
        found: IntArray = self.index.search(queries, 10, params=parameters)[1]
        return found

    def _filter(self, below: int) -> Any:
        if below not in self._filters:
            matches = percents(np.arange(self.index.ntotal, dtype=np.int64)) < below
            self._bits = np.packbits(matches, bitorder="little")
            self._filters[below] = faiss.IDSelectorBitmap(self._bits)  # type: ignore[call-arg, arg-type]
        return self._filters[below]


class Hnswlib(Peer):
    """hnswlib: a graph over float32."""

    name = "hnswlib"
    efforts = (16, 32, 64, 128, 256, 512)

    def make(self, vectors: Path, folder: Path) -> None:
        index = hnswlib.Index("ip", D)
        index.init_index(vectors.stat().st_size // (4 * D), M=16, ef_construction=200)
        for numbers, rows in chunks(vectors):
            index.add_items(rows, numbers, num_threads=_THREADS)
        index.save_index(str(folder / "index.hnsw"))

    def load(self, folder: Path) -> None:
        self._index = hnswlib.Index("ip", D)
        self._index.load_index(str(folder / "index.hnsw"))

    def search(self, queries: FloatArray, effort: int, below: int | None = None) -> IntArray:
        assert below is None
        self._index.set_ef(effort)
        return np.asarray(self._index.knn_query(queries, 10)[0], np.int64)


class Usearch(Peer):
    """usearch: a graph over float16."""

    name = "usearch"
    efforts = (16, 32, 64, 128, 256, 512)

    def _empty(self) -> Any:
        return UsearchIndex(ndim=D, metric="ip", dtype="f16", connectivity=16, expansion_add=128)

    def make(self, vectors: Path, folder: Path) -> None:
        index = self._empty()
        for numbers, rows in chunks(vectors):
            index.add(numbers.astype(np.uint64), rows, threads=_THREADS)
        index.save(str(folder / "index.usearch"))

    def load(self, folder: Path) -> None:
        self._index = self._empty()
        self._index.load(str(folder / "index.usearch"))

    def search(self, queries: FloatArray, effort: int, below: int | None = None) -> IntArray:
        assert below is None
        self._index.expansion_search = effort
        return np.asarray(self._index.search(queries, 10).keys, np.int64).reshape(len(queries), 10)


class Lancedb(Peer):
    """LanceDB: IVF lists of 8-bit codes in files; the best 20 are re-ranked by the vectors."""

    name = "lancedb"
    efforts = (2, 4, 8, 16, 32, 64, 128)

    def make(self, vectors: Path, folder: Path) -> None:
        vector = pa.list_(pa.float32(), D)
        schema = pa.schema([("id", pa.int64()), ("percent", pa.int64()), ("vector", vector)])

        def batches() -> Iterator[pa.RecordBatch]:
            for numbers, rows in chunks(vectors):
                arrays = [pa.array(numbers), pa.array(percents(numbers))]
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D))
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)

        table = lancedb.connect(folder).create_table("vectors", batches(), schema, mode="overwrite")
        lists = max(int((vectors.stat().st_size // (4 * D)) ** 0.5), 1)
        table.create_index("dot", num_partitions=lists, index_type="IVF_SQ")
        table.create_scalar_index("percent", index_type="BITMAP")

    def load(self, folder: Path) -> None:
        self._table = lancedb.connect(folder).open_table("vectors")

    def search(self, queries: FloatArray, effort: int, below: int | None = None) -> IntArray:
        return np.stack([self._one(query, effort, below) for query in queries])

    def _one(self, query: FloatArray, effort: int, below: int | None) -> IntArray:
        # LanceDB declares the general query builder, which lacks the methods below.
        asked: Any = self._table.search(query)
        asked = asked.distance_type("dot").nprobes(effort).refine_factor(2).limit(10)
        if below is not None:
            asked = asked.where(f"percent < {below}", prefilter=True)
        ids = asked.select(["id", "_distance"]).to_arrow()["id"].to_numpy()
        return np.concatenate([ids, np.full(10 - len(ids), -1)])


class Milvus(Peer):
    """Milvus Lite: the Milvus API over a file, for small collections."""

    name = "milvus-lite"
    efforts = (1,)

    def make(self, vectors: Path, folder: Path) -> None:
        client = self._client(folder)
        client.create_collection("vectors", dimension=D, metric_type="IP")
        for numbers, rows in chunks(vectors):
            for start in range(0, len(rows), 1000):
                part = slice(start, start + 1000)
                both = zip(numbers[part].tolist(), rows[part].tolist(), strict=True)
                client.insert("vectors", [{"id": number, "vector": row} for number, row in both])
        client.close()

    def load(self, folder: Path) -> None:
        self._opened = self._client(folder)
        self._opened.load_collection("vectors")

    def search(self, queries: FloatArray, effort: int, below: int | None = None) -> IntArray:
        assert effort and below is None
        found = self._opened.search("vectors", queries.tolist(), limit=10)
        return np.asarray([[hit["id"] for hit in hits] for hits in found], np.int64)

    def _client(self, folder: Path) -> Any:
        # Imported late: Milvus Lite runs a server of its own.
        from pymilvus import MilvusClient

        return MilvusClient(str(folder / "milvus.db"))
