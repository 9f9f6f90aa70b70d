"""Pairs above a threshold, compared with all scores in plain NumPy."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import FloatArray, IntArray
from service.errors import InvalidRequest
from service.store import near_pairs as module
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from service.store.maintenance import load_index
from service.store.near_pairs import Pairs, near_pairs
from tests.service.store.test_embedded import card, item, unit
from tests.service.store.test_ivf_training import D, clustered


def fill(folder: Path, vectors: FloatArray, exact_limit: int = 100_000) -> None:
    with closing(EmbeddedStore(folder, card(), vectors.shape[1], exact_limit=exact_limit)) as store:
        store.add([item(f"p{n}", vector) for n, vector in enumerate(vectors)])
        store.settle()
        assert (store.partition is None) == (exact_limit >= len(vectors))


def search(folder: Path, threshold: float, earlier: Pairs | None = None) -> Pairs:
    with closing(CatalogReader(folder)) as reader:
        loaded = load_index(folder, reader, read_only=True)
        return near_pairs(loaded.index, reader, threshold, reader.keys(), loaded.sequence, earlier)


def expected(vectors: FloatArray, threshold: float) -> set[tuple[int, int]]:
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    return {(a + 1, b + 1) for a, b in zip(*np.nonzero(np.triu(scores >= threshold, 1)), strict=True)}


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    assert (pairs.first < pairs.second).all()
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert len(found) == len(pairs.first)
    return found


def test_an_exact_index_gives_every_pair_and_no_other(tmp_path: Path) -> None:
    vectors = np.concatenate([clustered(400, spread=0.8), unit(100, D, seed=3)])
    fill(tmp_path, vectors)
    for threshold in (0.3, 0.5, 0.6):
        pairs = search(tmp_path, threshold)
        wanted = expected(vectors, threshold)
        assert len(wanted) > 10
        assert as_set(pairs) == wanted
        scores = np.einsum("nd,nd->n", vectors[pairs.first - 1], vectors[pairs.second - 1])
        assert np.allclose(pairs.scores, scores, atol=1e-6)


def test_an_approximate_index_gives_as_many_as_its_recall(tmp_path: Path) -> None:
    vectors = clustered(5000, spread=0.7)
    copies = vectors[:500] + 0.05 * unit(500, D, seed=5)
    vectors = np.concatenate([vectors, copies / np.linalg.norm(copies, axis=1, keepdims=True)]).astype(np.float32)
    fill(tmp_path, vectors, exact_limit=1000)
    found, wanted = as_set(search(tmp_path, 0.98)), expected(vectors, 0.98)
    assert {(n, 5000 + n) for n in range(1, 501)} <= wanted
    assert found <= wanted
    assert len(found) >= 0.99 * len(wanted)


def test_after_changes_only_these_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(300, spread=0.9)
    fill(tmp_path, vectors)
    before = search(tmp_path, 0.7)
    with closing(EmbeddedStore(tmp_path, card(), D)) as store:
        store.remove("p7")
        # Beside another, and a new one beside that.
        store.add([item("p9", vectors[20]), item("new", vectors[20])])
    before.save(tmp_path / "pairs.npz")
    searched: list[int] = []
    real = module._above

    def above(rows: IntArray, *rest: Any) -> Any:
        searched.extend(rows.tolist())
        return real(rows, *rest)

    monkeypatch.setattr(module, "_above", above)
    after = search(tmp_path, 0.7, Pairs.load(tmp_path / "pairs.npz"))
    assert set(searched) == {10, 301}
    afresh = search(tmp_path, 0.7)
    assert as_set(after) == as_set(afresh) != as_set(before)
    assert {(10, 21), (21, 301), (10, 301)} <= as_set(after)
    assert not any(8 in pair for pair in as_set(after))
    assert after.sequence == afresh.sequence > before.sequence


def test_many_copies_keep_a_bounded_number_of_pairs(tmp_path: Path) -> None:
    vectors = np.repeat(unit(1, D), 600, axis=0)
    fill(tmp_path, vectors)
    pairs = search(tmp_path, 0.9)
    assert 600 <= len(pairs.first) <= 600 * 50


def test_a_threshold_that_joins_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, np.repeat(unit(1, D), 100, axis=0))
    monkeypatch.setattr(module, "_MOST_PAIRS", 1000)
    with pytest.raises(InvalidRequest, match="choose a higher one"):
        search(tmp_path, 0.1)
