"""The approximate index: its measured recall, checked by a second, slower measurement."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from service import FloatArray, IntArray
from service.store import snapshot
from service.store.embedded import EmbeddedStore
from service.store.faiss_index import AllowedKeys, FaissIndex
from service.store.filters import parse_filter
from service.store.ivf_training import train
from service.store.snapshot import SNAPSHOT
from tests.service.store.test_embedded import card, item

D = 32


def clustered(count: int, seed: int = 0, clusters: int = 60, spread: float = 0.5) -> FloatArray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(clusters, D))
    vectors = centres[rng.integers(0, clusters, count)] + spread * rng.normal(size=(count, D))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


VECTORS = clustered(6000)


def fill(store: EmbeddedStore, vectors: FloatArray, start: int = 0) -> None:
    store.add([item(f"p{start + n}", vector, third=(start + n) % 3) for n, vector in enumerate(vectors)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 6,000 clustered vectors with an approximate index."""
    folder = tmp_path_factory.mktemp("approximate") / "store"
    store = EmbeddedStore(folder, card(), D, exact_limit=1000)
    fill(store, VECTORS)
    store.settle()
    assert store.partition is not None
    store.close()
    return folder


def recall(store: EmbeddedStore, vectors: FloatArray, queries: FloatArray, where: int | None = None) -> float:
    """The share of plain NumPy's ten nearest that the store finds."""
    scores = queries @ vectors.T
    if where is not None:
        scores[:, np.arange(len(vectors)) % 3 != where] = -2
    found = store.search(queries, 10, None if where is None else parse_filter({"third": where}))
    true = np.argsort(-scores, axis=1)[:, :10]
    hits = [len({f"p{n}" for n in row} & {hit.id for hit in own}) for row, own in zip(true, found, strict=True)]
    return sum(hits) / 10 / len(queries)


def test_recall_is_what_was_measured_and_scores_are_exact(folder: Path) -> None:
    store = EmbeddedStore(folder, card(), D, exact_limit=1000)
    partition = store.partition
    # The partition was read from the snapshot.
    assert partition is not None
    assert partition.recall >= 0.99
    # A search probes only some of the lists.
    assert partition.nprobe < len(partition.centroids)
    queries = clustered(300, seed=1)
    assert recall(store, VECTORS, queries) >= 0.985
    for hit in store.search(queries[:1], 10)[0]:
        assert abs(hit.score - float(queries[0] @ VECTORS[int(hit.id[1:])])) < 1e-6
    store.close()


@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_filtered_search_finds_as_much(folder: Path, third: int) -> None:
    store = EmbeddedStore(folder, card(), D, exact_limit=1000)
    assert recall(store, VECTORS, clustered(100, seed=2), third) >= 0.985
    store.close()


# Of the hundred vectors in each of sixty clusters, fifty or six match the filter.
@pytest.mark.parametrize("step", [2, 16])
def test_lists_that_cannot_hold_the_nearest_are_passed_over(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if more matched than get an index of their own.
    monkeypatch.setattr("service.store.faiss_index._MOST_ALONE", 0)
    facts, arrays = snapshot.read(folder / SNAPSHOT)
    queries, keys = clustered(50, seed=5), np.arange(1, len(VECTORS) + 1, step)
    among = AllowedKeys.of(keys)
    true = keys[np.argsort(-(queries @ VECTORS[keys - 1].T), axis=1)[:, :10]]
    stats: Any = faiss.cvar
    looked_at, found = [], []
    for reach in (-2.0, facts["reach"], 2.0):
        index = FaissIndex.of_arrays(D, facts | {"probes": 1, "reach": reach}, arrays)
        stats.indexIVF_stats.reset()
        candidates = [index.candidates(query[None], 10, among)[0] for query in queries]
        looked_at.append(stats.indexIVF_stats.ndis)
        found.append(np.mean([np.isin(row, own).mean() for row, own in zip(true, candidates, strict=True)]))
        together = index.candidates(queries, 10, among)
        assert all(np.array_equal(np.sort(a), np.sort(b)) for a, b in zip(candidates, together, strict=True))
    assert looked_at[0] < looked_at[1] < looked_at[2] / 2
    assert found[0] < found[1] == found[2] > 0.99


def test_few_that_match_have_an_index_of_their_own(folder: Path) -> None:
    facts, arrays = snapshot.read(folder / SNAPSHOT)
    index = FaissIndex.of_arrays(D, facts | {"probes": 1}, arrays)
    # Of each cluster six, so the ten nearest lie in several; then 300 of one part of the keys, and none.
    for keys in (np.arange(1, len(VECTORS) + 1, 16), np.arange(1000, 1300), np.arange(10**6, 10**6 + 300)):
        among, queries = AllowedKeys.of(keys), clustered(50, seed=5)
        there = keys[keys <= len(VECTORS)]
        true = there[np.argsort(-(queries @ VECTORS[there - 1].T), axis=1)[:, :10]]
        candidates = index.candidates(queries, 10, among)
        assert among.placement is not None and among.placement.alone is not None
        assert len(among.placement.alone) == len(there)
        assert np.isin(np.concatenate(candidates), there).all()
        assert (
            np.mean([np.isin(row, own).mean() for row, own in zip(true, candidates, strict=True) if len(row)] or 1)
            > 0.99
        )


@pytest.mark.parametrize("reach", [None, "1", float("nan"), 3.0, -3.0])
def test_without_a_reach_that_can_be_no_list_is_passed_over(folder: Path, reach: object) -> None:
    facts, arrays = snapshot.read(folder / SNAPSHOT)
    partition = FaissIndex.of_arrays(D, facts | {"reach": reach}, arrays).partition
    assert partition is not None and partition.reach == 2


def test_a_filtered_search_looks_at_as_many_as_its_recall_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if more matched than get an index of their own.
    monkeypatch.setattr("service.store.faiss_index._MOST_ALONE", 0)
    # The measurement doubles the number of candidates from this one on.
    monkeypatch.setattr("service.store.ivf_training.MIN_FILTERED_SCAN", 25)
    rows, queries, keys = clustered(6000, 0, 300, 0.3), clustered(300, 6, 300, 0.3), np.arange(6000)
    index = train(lambda some: iter([(keys, rows) if some is None else (some, rows[some])]), keys, D, bool)
    assert index is not None and index.partition is not None
    measured = index.partition.filtered_scan
    # Four of a cluster's twenty vectors match the filter.
    chosen = np.flatnonzero(np.random.default_rng(8).random(6000) < 0.2)
    true = chosen[np.argsort(-(queries @ rows[chosen].T), axis=1)[:, :10]]
    found = []
    for seen in (25, measured):
        index.partition = replace(index.partition, filtered_scan=seen)
        candidates = index.candidates(queries, 10, AllowedKeys.of(chosen))
        found.append(np.mean([np.isin(row, own).mean() for row, own in zip(true, candidates, strict=True)]))
    assert 25 < measured < len(chosen)
    assert found[0] < 0.98 and found[1] > 0.99


@pytest.mark.parametrize(("told", "seen"), [(20_000, 20_000), (None, 10_000), (1.5, 10_000), (-1, 10_000)])
def test_a_snapshot_tells_how_many_a_filtered_search_looks_at(folder: Path, told: object, seen: int) -> None:
    facts, arrays = snapshot.read(folder / SNAPSHOT)
    partition = FaissIndex.of_arrays(D, facts | {"seen": told}, arrays).partition
    assert partition is not None and partition.filtered_scan == seen


def test_what_is_added_replaced_and_removed_is_seen_at_once(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path, card(), D, exact_limit=1000)
    fill(store, VECTORS[:3000])
    store.settle()
    assert store.partition is not None
    fresh = clustered(50, seed=3)
    for n, vector in enumerate(fresh):
        store.remove(f"p{n}")
        store.add([item(f"new{n}", vector), item(f"p{n + 1000}", vector)])
        assert [hit.id for hit in store.search(vector[None], 2)[0]] == [f"p{n + 1000}", f"new{n}"]
        assert store.search(VECTORS[n : n + 1], 1)[0][0].id != f"p{n}"
    assert store.count() == 3000
    assert len(store._live.index.keys()) == 3000
    store.close()
    store = EmbeddedStore(tmp_path, card(), D, exact_limit=1000)
    assert store.partition is not None
    assert [hits[0].id for hits in store.search(fresh, 1)] == [f"p{n + 1000}" for n in range(50)]
    store.close()


@pytest.mark.slow("trains an index several times")
def test_it_is_made_anew_when_the_store_has_grown_or_shrunk(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path, card(), D, exact_limit=1000)
    fill(store, VECTORS[:1000])
    store.settle()
    assert store.partition is None
    fill(store, VECTORS[1000:2000], 1000)
    store.settle()
    first = store.partition
    assert first is not None and first.count == 2000
    fill(store, VECTORS[2000:3900], 2000)
    store.settle()
    # The index is kept until the store has doubled.
    assert store.partition is first
    fill(store, VECTORS[3900:4100], 3900)
    store.settle()
    second = store.partition
    assert second is not None and second.count == 4100
    for n in range(500, 4100):
        store.remove(f"p{n}")
    store.settle()
    assert store.partition is None
    assert recall(store, VECTORS[:500], clustered(20, seed=4)) == 1
    store.close()


def test_it_is_made_in_the_background_while_changes_go_on(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path, card(), D, exact_limit=1000)
    fill(store, VECTORS[:4000])
    started = threading.Thread(target=store.settle)
    started.start()
    for n in range(4000, 4300):
        fill(store, VECTORS[n : n + 1], n)
        store.remove(f"p{n - 4000}")
    started.join()
    assert store.partition is not None
    found = store.search(VECTORS[300:4300], 1)
    assert np.mean([hits[0].id == f"p{n}" for n, hits in enumerate(found, 300)]) > 0.99
    assert all(hits[0].id != f"p{n}" for n, hits in enumerate(store.search(VECTORS[:300], 1)))
    assert np.array_equal(store._live.index.keys(), store._reader.keys())
    store.close()


def noise(count: int) -> FloatArray:
    """Vectors without structure, in so many dimensions that no few lists hold the nearest neighbours."""
    vectors = np.random.default_rng(6).normal(size=(count, 512)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.mark.slow("trains an index several times")
def test_what_cannot_be_approximated_is_looked_at_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vectors = noise(1500)
    store = EmbeddedStore(tmp_path, card(), 512, exact_limit=1000)
    fill(store, vectors)
    store.settle()
    assert store.partition is None
    assert "misses too many: all are looked at" in caplog.records[-1].getMessage()
    assert recall(store, vectors, vectors[:200]) == 1
    store.settle()
    # Training is not tried again before the store has doubled.
    assert len(caplog.records) == 1
    store.close()


@pytest.mark.slow("tries all numbers of probes twice")
def test_nothing_is_found_where_the_recall_is_not_reached() -> None:
    keys, rows = np.arange(2000), noise(2000)

    def vectors(among: IntArray | None) -> "list[tuple[IntArray, FloatArray]]":
        chosen = keys if among is None else among
        return [(chosen, rows[chosen])]

    assert train(lambda among: iter(vectors(among)), keys, 512, lambda: False) is None
    assert train(lambda among: iter(vectors(among)), keys, 512, lambda: True) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("probes", 0), ("probes", 10**6), ("spare", 0), ("spare", "2"), ("built", 0), ("probes", True)],
)
def test_a_partition_that_cannot_be_is_refused(folder: Path, name: str, value: object) -> None:
    facts, arrays = snapshot.read(folder / SNAPSHOT)
    FaissIndex.of_arrays(D, facts, arrays)
    with pytest.raises(ValueError, match="its probes are not those of an index"):
        FaissIndex.of_arrays(D, facts | {name: value}, arrays)
    for array in ("centroids", "ranges"):
        with pytest.raises(ValueError, match=f"its {array} are not those"):
            FaissIndex.of_arrays(D, facts, arrays | {array: arrays[array] * np.float32(np.nan)})
