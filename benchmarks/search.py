"""Search in a million vectors against bare FAISS, hnswlib, usearch, LanceDB and Milvus Lite: a table of all targets."""

import http.client
import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import faiss
import numpy as np
import pyarrow.parquet as pq
import typer

from benchmarks.collection import FILTERS, MODEL, QUERIES, Collection, apart, folder_bytes, held, item, synthetic
from benchmarks.search_peers import D, Faiss, Hnswlib, Lancedb, Milvus, Peer, Usearch, chunks
from benchmarks.servers import OURS, running
from service import FloatArray, IntArray
from service.store.embedded import EmbeddedStore
from service.store.filters import Filter, parse_filter
from service.store.snapshot import SNAPSHOT
from tests.ports import free_port

# Programs take turns after so many queries, so that other work on the host slows all of them alike.
_BLOCK = 50
_HTTP_CALLS = 200
_MANY = 64
# Searches per second during changes, far below the store's capacity.
_RATE = 100
_QUIET_S, _PEER_S, _MOST_S = 20, 20, 160
# A service reads the columns of the metadata in its first seconds, beside its requests.
_SETTLING_S = 6
# As many pictures a commit as in POST /images.
_PER_COMMIT = 32
_REMOVERS = 8

Search = Callable[[FloatArray], Any]
"""Finds the 10 nearest items of each row."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: the measured quantity.
        ours, theirs: figures; `theirs` is None when the target is a number.
        peer: the program of `theirs`.
        bar: the target in words; empty for none.
        kept: whether ours reaches the target.
        unit: of both figures.
    """

    what: str
    ours: float
    peer: str = ""
    theirs: float | None = None
    bar: str = ""
    kept: bool | None = None
    unit: str = ""

    def __str__(self) -> str:
        theirs = "" if self.theirs is None else f"{_short(self.theirs)}{self.unit}"
        ratio = "" if not self.theirs else _short(self.ours / self.theirs)
        verdict = "" if self.kept is None else "kept" if self.kept else "**MISSED**"
        cells = (self.what, f"{_short(self.ours)}{self.unit}", self.peer, theirs, ratio, self.bar, verdict)
        return "| " + " | ".join(cells) + " |"


class Changed(NamedTuple):
    """99th percentiles in ms without and during changes, the number of changes, and their seconds."""

    quiet: float
    busy: float
    done: int
    seconds: float


class Part(StrEnum):
    """A part of the table, for --only."""

    INDEX = "index"
    PICTURES = "pictures"
    ENGINE = "engine"
    HTTP = "http"
    FILTER = "filter"
    BYTES = "bytes"
    RESTART = "restart"
    CHURN = "churn"
    REAL = "real"
    SMALL = "small"


def main(
    work: Annotated[Path, typer.Option(help="Folder for vectors and indexes; existing ones are reused.")],
    count: Annotated[int, typer.Option(min=20_000, help="Number of vectors.")] = 1_000_000,
    only: Annotated[list[Part] | None, typer.Option(help="Part of the table to measure; repeatable.")] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            envvar="LOOKALIKE_TEST_DATA",
            help="Folder with MNIST/raw and cifar10-jpeg/*.zip, for `real` and `pictures`.",
        ),
    ] = None,
) -> None:
    """Print the table. Exit code 1 when a target is missed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    collection = synthetic(work / f"synthetic-{count}", count, exact_limit=min(100_000, count // 2))
    parts: dict[Part, Callable[[], list[Row]]] = {
        Part.INDEX: lambda: _index(collection),
        Part.PICTURES: lambda: _pictures(collection, data_root),
        Part.ENGINE: lambda: _engine(collection, [Hnswlib(), Usearch(), Lancedb()], f"{count:,} synthetic"),
        Part.FILTER: lambda: _filtered(collection),
        Part.HTTP: lambda: _http(collection),
        Part.BYTES: lambda: _bytes(collection),
        Part.RESTART: lambda: _restart(collection),
        Part.CHURN: lambda: _churn(collection),
        Part.REAL: lambda: _real(work, data_root),
        Part.SMALL: lambda: _engine(_small(work), [Milvus()], "20,000 synthetic"),
    }
    collection.fill()
    rows = [row for part, measure in parts.items() if not only or part in only for row in measure()]
    # Imported late because torch would add to the memory of the measuring processes.
    from benchmarks.machine import describe

    print(f"\n{describe()}\n\n| what | Lookalike | peer | its figure | ours / its | bar | |")
    print("|---|---:|---|---:|---:|---|---|", *rows, sep="\n")
    raise typer.Exit(1 if any(row.kept is False for row in rows) else 0)


# Parts ------------------------------------------------------------------------------------------


def _index(collection: Collection) -> list[Row]:
    """Measure bulk adds and their memory."""
    ours, imported = collection.fill(), collection.imported()
    rows = [
        Row("bulk add, vectors/s", ours["rate"], bar="≥ 20,000", kept=ours["rate"] >= 20_000),
        Row("indexing, s, until all work is done", ours["seconds"]),
        _peak("indexing", ours, collection),
        _peak("`lookalike store import`", imported, collection),
    ]
    for peer in (Faiss(collection.store), Hnswlib(), Usearch(), Lancedb()):
        theirs = collection.make(peer)
        trained = ", lists given" if isinstance(peer, Faiss) else ""
        rows += [
            Row("indexing, s", ours["seconds"], peer.name + trained, theirs["seconds"]),
            Row("indexing, peak memory, MB", ours["peak"] / 1e6, peer.name, theirs["peak"] / 1e6),
        ]
    return rows


def _pictures(collection: Collection, data_root: Path | None) -> list[Row]:
    """Measure the memory of `lookalike index`, including decoders and encoder."""
    if data_root is None:
        logging.warning("no pictures to index: --data-root or LOOKALIKE_TEST_DATA names no folder of them")
        return []
    told, what = collection.indexed(data_root), "`lookalike index`"
    return [Row(f"{what}, pictures/s", collection.count / told["seconds"]), _peak(what, told, collection)]


def _peak(what: str, told: dict[str, float], collection: Collection) -> Row:
    most_bytes = 2 * 4 * D * collection.count
    # With fewer vectors the process's fixed memory dominates.
    kept = told["peak"] <= most_bytes if collection.count >= 1_000_000 else None
    return Row(f"{what}, peak memory, MB", told["peak"] / 1e6, bar=f"≤ {most_bytes / 1e6:,.0f}", kept=kept)


def _engine(collection: Collection, peers: list[Peer], what: str) -> list[Row]:
    """Measure recall and p50 of single queries."""
    collection.fill()
    queries, truth = collection.queries, collection.truth()
    with closing(collection.open()) as store:
        searches: dict[str, Search] = {"ours": lambda some: _ids(store, some)}
        approximate = collection.count > collection.exact_limit
        for peer in [Faiss(collection.store), *peers] if approximate else peers:
            collection.opened(peer)
            bare = isinstance(peer, Faiss)
            searches[peer.name] = _steady(peer, peer.efforts[0] if bare else _enough(peer, queries, truth))
        recalls = {name: _recall(_one_by_one(search, queries), truth) for name, search in searches.items()}
        times = _take_turns(searches, queries)
    mine, took = recalls.pop("ours"), times.pop("ours")
    rows = [Row(f"recall@10, {what}", mine, bar="≥ 0.99", kept=mine >= 0.99)]
    rows += [Row(f"recall@10, {what}", mine, name, recall) for name, recall in recalls.items()]
    if collection.count >= 100_000:
        rows += [Row(f"p50 of a query, {what}", took, bar="≤ 1 ms", kept=took <= 1, unit=" ms")]
    for name, other in times.items():
        bar, kept = ("≤ 2.5 ×", took <= 2.5 * other) if name == Faiss.name else ("", None)
        rows += [Row(f"p50 of a query, {what}", took, name, other, bar, kept, " ms")]
    return rows


def _filtered(collection: Collection) -> list[Row]:
    """Measure recall and p50 of single queries with and without a filter."""
    queries, rows = collection.queries, []
    bare, lance = Faiss(collection.store), Lancedb()
    peers = [collection.opened(peer) for peer in (bare, lance)]
    with closing(collection.open()) as store:
        for percent in FILTERS:
            where, truth = parse_filter({"percent": {"$lt": percent}}), collection.truth(percent)
            start = time.perf_counter()
            _ids(store, queries[:1], where)
            first = time.perf_counter() - start
            searches: dict[str, Search] = {
                "ours": lambda some, where=where: _ids(store, some, where),  # type: ignore[misc]
                "ours unfiltered": lambda some: _ids(store, some),
            }
            for peer in peers:
                searches[peer.name] = _steady(peer, _enough(peer, queries, truth, percent), percent)
            recall = _recall(_one_by_one(searches["ours"], queries), truth)
            times = _take_turns(searches, queries)
            took, plain = times.pop("ours"), times.pop("ours unfiltered")
            what = f"p50, filter that matches {percent} %"
            rows += [
                Row(f"recall@10, filter that matches {percent} %", recall, bar="≥ 0.99", kept=recall >= 0.99),
                Row(what, took, "ours, no filter", plain, "≤ 4 ×", took <= 4 * plain, " ms"),
                *(Row(what, took, name, other, unit=" ms") for name, other in times.items()),
                Row(
                    f"first query with a filter that matches {percent} %",
                    first,
                    bar="≤ 0.1 s",
                    kept=first <= 0.1,
                    unit=" s",
                ),
            ]
    return rows


def _http(collection: Collection) -> list[Row]:
    """Measure POST /search by vector, one at a time and 64 in a call."""
    queries, bare = collection.queries, Faiss(collection.store)
    collection.opened(bare)
    with closing(collection.open()) as store:
        engine = _take_turns({"ours": lambda some: _ids(store, some)}, queries)["ours"]
    asks = [json.dumps({"vector": query.tolist(), "k": 10}).encode() for query in queries]
    lots = [queries[start : start + _MANY] for start in range(0, QUERIES - _MANY, _MANY)]
    many = [json.dumps({"queries": [{"vector": query.tolist()} for query in lot], "k": 10}).encode() for lot in lots]
    files = []
    for lot in lots:
        np.save(buffer := io.BytesIO(), lot)
        files.append(buffer.getvalue())
    with _serving(collection) as port:
        time.sleep(_SETTLING_S)
        client = http.client.HTTPConnection("127.0.0.1", port)
        one = _median([_post(client, asks[number % len(asks)]) for number in range(20 + _HTTP_CALLS * 5)][20:])
        calls = []
        for number in range(_HTTP_CALLS):
            which = number % len(lots)
            bare_ms = _clocked(_steady(bare, bare.probes), lots[which])
            calls.append((_post(client, many[which]), _post(client, files[which], "application/x-npy"), bare_ms))
        client.close()
    ours, arrays, theirs = (_MANY / _median([each[which] for each in calls[10:]]) * 1000 for which in range(3))
    return [
        Row("HTTP /search, c = 1, p50", one, "ours, engine", engine, "≤ 2.5 ×", one <= 2.5 * engine, " ms"),
        Row("HTTP /search, 64 in a call, queries/s", ours, "faiss", theirs),
        Row("the same as a NumPy file", arrays, "faiss", theirs, "≥ 0.5 ×", arrays >= 0.5 * theirs),
    ]


def _bytes(collection: Collection) -> list[Row]:
    """Measure the bytes of a vector on disk and in memory."""
    count = collection.count
    disk, memory = folder_bytes(collection.store) / count, apart(_memory_of_ours, collection) / count
    rows = [
        Row("bytes a vector on disk", disk),
        Row("bytes a vector in memory", memory, bar="≤ 400", kept=memory <= 400),
    ]
    for peer in (Faiss(collection.store), Hnswlib(), Usearch(), Lancedb()):
        collection.make(peer)
        theirs = apart(_memory_of, peer, collection) / count
        rows += [
            Row("bytes a vector on disk", disk, peer.name, folder_bytes(collection.folder / peer.name) / count),
            Row("bytes a vector in memory", memory, peer.name, theirs),
        ]
    return rows


def _restart(collection: Collection) -> list[Row]:
    """Measure the seconds from the command to /readyz, with and without a snapshot."""
    ready = []
    snapshot, aside = collection.store / SNAPSHOT, collection.store / "aside"
    for present in (True, False):
        if not present:
            snapshot.rename(aside)
        try:
            start = time.perf_counter()
            with _serving(collection):
                ready.append(time.perf_counter() - start)
        finally:
            if not present:
                aside.replace(snapshot)
    collection.make(bare := Faiss(collection.store))
    start = time.perf_counter()
    collection.opened(bare)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    flat = faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for _, rows in chunks(collection.vectors):
        flat.add(rows)
    rebuilt = time.perf_counter() - start
    return [
        Row(
            "ready after restart, from snapshot", ready[0], "faiss, read_index", loaded, "≤ 10 s", ready[0] <= 10, " s"
        ),
        Row(
            "ready after restart, exact index rebuilt", ready[1], "faiss, add", rebuilt, "≤ 60 s", ready[1] <= 60, " s"
        ),
    ]


def _churn(collection: Collection) -> list[Row]:
    """Measure searches during adds and deletes."""
    changes = min(100_000, collection.count // 10)
    copy = replace(collection, folder=collection.folder / "changing")
    shutil.rmtree(copy.folder, ignore_errors=True)
    copy.folder.mkdir()
    for name in ("vectors.f32", "queries.npy"):
        (copy.folder / name).hardlink_to(collection.folder / name)
    shutil.copytree(collection.store, copy.store)
    quiet, busy, done, seconds = apart(_change_ours, copy, changes)
    shutil.rmtree(copy.folder)
    bare = Faiss(collection.store)
    collection.make(bare)
    their_quiet, their_busy, their_done, their_seconds = apart(_change_faiss, bare, collection)
    what, ratio = f"{changes:,} adds + {changes:,} deletes", busy / quiet
    kept = ratio <= 3 and done == 2 * changes
    rates = done / seconds, their_done / their_seconds
    return [
        Row(f"search p99 during {what}", busy, "ours, quiet", quiet, "≤ 3 ×", kept, " ms"),
        Row("search p99 during changes / quiet", ratio, "faiss, a lock", their_busy / their_quiet),
        Row(f"changes/s, {done:,} done", rates[0], "faiss, a lock, in memory", rates[1]),
    ]


def _real(work: Path, data_root: Path | None) -> list[Row]:
    """Like `_engine`, on the embeddings of two data sets: training pictures are stored, test pictures are queries."""
    from service.jobs.embed import embed_source
    from service.settings import Settings
    from service.sources import open_source

    if data_root is None:
        logging.warning("no real embeddings: --data-root or LOOKALIKE_TEST_DATA names no folder of pictures")
        return []
    rows = []
    for name, source, what in (
        ("mnist", "mnist/{}", "mnist/train"),
        ("cifar10", f"{data_root}/cifar10-jpeg/{{}}.zip", "CIFAR-10 (JPEG copy), train"),
    ):
        collection = Collection(work / name, 1000)
        if not collection.folder.exists():
            read = []
            for half in ("train", "test"):
                out = work / f"{name}-{half}"
                embed_source(open_source(source.format(half), data_root), MODEL.parent / name, out, Settings())
                column = pq.read_table(out, columns=["embedding"])["embedding"].combine_chunks()
                read.append(np.asarray(column.flatten(), np.float32).reshape(-1, D))
            collection.write(iter([read[0]]), read[1][:QUERIES])
        rows += _engine(collection, [Hnswlib()], what)
    return rows


def _small(work: Path) -> Collection:
    """Return a collection so small that the store scans it exactly."""
    return synthetic(work / "small", 20_000, exact_limit=100_000)


# Searching and timing ---------------------------------------------------------------------------


def _ids(store: EmbeddedStore, queries: FloatArray, where: Filter | None = None) -> IntArray:
    found = store.search(queries, 10, where)
    return np.asarray([[int(hit.id) for hit in hits] for hits in found], np.int64)


def _steady(peer: Peer, effort: int, below: int | None = None) -> Search:
    return lambda queries: peer.search(queries, effort, below)


def _enough(peer: Peer, queries: FloatArray, truth: IntArray, below: int | None = None) -> int:
    """Return the least effort with recall of 0.99 or more, else the largest effort."""
    good = (each for each in peer.efforts if _recall(peer.search(queries, each, below), truth) >= 0.99)
    return next(good, peer.efforts[-1])


def _recall(found: IntArray, truth: IntArray) -> float:
    return float(np.mean([np.isin(own, row).mean() for own, row in zip(truth, found, strict=True)]))


def _one_by_one(search: Search, queries: FloatArray) -> IntArray:
    return np.concatenate([search(query[None]) for query in queries])


def _take_turns(searches: dict[str, Search], queries: FloatArray) -> dict[str, float]:
    """Return the median milliseconds of a query for each program."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    for start in range(0, len(queries), _BLOCK):
        for name, search in searches.items():
            # An untimed query wakes threads and caches after another program's turn.
            search(queries[start : start + 1])
            times[name] += (_clocked(search, query[None]) for query in queries[start : start + _BLOCK])
    return {name: _median(each) for name, each in times.items()}


def _clocked(search: Search, queries: FloatArray) -> float:
    start = time.perf_counter()
    search(queries)
    return (time.perf_counter() - start) * 1000


def _post(client: http.client.HTTPConnection, body: bytes, kind: str = "application/json") -> float:
    """Return the milliseconds of a search over HTTP."""
    start = time.perf_counter()
    client.request("POST", "/search", body, {"Content-Type": kind})
    answer = client.getresponse()
    content = answer.read()
    took = (time.perf_counter() - start) * 1000
    if answer.status != 200:
        raise RuntimeError(content.decode())
    return took


@contextmanager
def _serving(collection: Collection) -> Iterator[int]:
    port = free_port()
    told = {
        "LOOKALIKE_EXACT_LIMIT": str(collection.exact_limit),
        "LOOKALIKE_MODEL": str(MODEL),
        "LOOKALIKE_STORE": str(collection.store),
    }
    command, ready = OURS.command.format(port=port).split(), f"http://127.0.0.1:{port}{OURS.ready}"
    with running(command, ready, told, collection.folder / "service.log", patience_s=300):
        yield port


def _median(times: list[float]) -> float:
    return float(np.median(times))


def _short(figure: float) -> str:
    if figure >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}" if figure >= 1.1 else f"{figure:.3f}"


# Run in separate processes ----------------------------------------------------------------------


def _memory_of_ours(collection: Collection) -> float:
    before = held("RssAnon")
    with closing(collection.open()) as store:
        for query in collection.queries:
            _ids(store, query[None])
        return held("RssAnon") - before


def _memory_of(peer: Peer, collection: Collection) -> float:
    before = held("RssAnon")
    peer.load(collection.folder / peer.name)
    for query in collection.queries:
        peer.search(query[None], peer.efforts[-1])
    return held("RssAnon") - before


def _change_ours(collection: Collection, changes: int) -> Changed:
    """Search while one client adds 32 items a commit and eight delete single items, as fast as they can."""
    with closing(collection.open()) as store:
        items = [item(collection.count + number, row) for number, row in enumerate(_first(collection, changes))]

        def adding() -> Iterator[int]:
            for start in range(0, changes, _PER_COMMIT):
                yield len(store.add(items[start : start + _PER_COMMIT]))

        def removing(first: int) -> Iterator[int]:
            for number in range(first, changes, _REMOVERS):
                yield int(store.remove(str(number)))

        jobs = [adding(), *(removing(first) for first in range(_REMOVERS))]
        return _beside(lambda some: _ids(store, some), collection.queries, jobs, _MOST_S)


def _change_faiss(bare: Faiss, collection: Collection) -> Changed:
    """Do the same with FAISS in memory, under one lock."""
    bare.load(collection.folder / bare.name)
    rows, lock = _first(collection, 20_000), threading.Lock()

    def adding() -> Iterator[int]:
        for start in range(0, len(rows), _PER_COMMIT):
            some = rows[start : start + _PER_COMMIT]
            with lock:
                bare.index.add_with_ids(some, np.arange(start, start + len(some)) + collection.count)
            yield len(some)

    def removing() -> Iterator[int]:
        for number in range(len(rows)):
            with lock:
                bare.index.remove_ids(np.asarray([number]))
            yield 1

    def search(queries: FloatArray) -> IntArray:
        with lock:
            return bare.search(queries, bare.probes)

    return _beside(search, collection.queries, [adding(), removing()], _PEER_S)


def _first(collection: Collection, count: int) -> FloatArray:
    return np.fromfile(collection.vectors, "<f4", count * D).reshape(-1, D)


def _beside(search: Search, queries: FloatArray, jobs: list[Iterator[int]], most_s: float) -> Changed:
    """Search at a steady rate, first alone and then beside jobs, which yield the number of their changes."""
    stopped, done = threading.Event(), [0] * len(jobs)

    def work(number: int) -> None:
        for more in jobs[number]:
            done[number] += more
            if stopped.is_set():
                return

    def ask_steadily(seconds: float, unless: Callable[[], bool]) -> float:
        """Return the 99th percentile in ms, counted from the due times: a stall counts for every search it delays."""
        times: list[float] = []
        begun = due = time.perf_counter()
        while due < begun + seconds and not unless():
            time.sleep(max(due - time.perf_counter(), 0))
            search(queries[len(times) % len(queries)][None])
            times.append(time.perf_counter() - due)
            due += 1 / _RATE
        return float(np.percentile(times, 99)) * 1000

    ask_steadily(2, lambda: False)
    quiet = ask_steadily(_QUIET_S, lambda: False)
    with ThreadPoolExecutor(len(jobs)) as pool:
        start = time.perf_counter()
        working = [pool.submit(work, number) for number in range(len(jobs))]
        busy = ask_steadily(most_s, lambda: all(each.done() for each in working))
        stopped.set()
        for each in working:
            each.result()
        return Changed(quiet, busy, sum(done), time.perf_counter() - start)


if __name__ == "__main__":
    typer.run(main)
