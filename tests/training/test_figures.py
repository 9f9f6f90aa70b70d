"""Figures of embeddings as a whole, against closed forms, plain loops and scikit-learn's own pipeline."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from service import FloatArray
from training import figures
from training.figures import alignment, effective_rank, linear_probe, uniformity


def clouds(count: int, seed: int, kinds: int = 5, dimension: int = 12) -> tuple[FloatArray, NDArray[np.int64]]:
    """Unit rows about `kinds` centres, wide enough that they mix."""
    labels = np.arange(count, dtype=np.int64) % kinds
    centres = np.random.default_rng(0).normal(size=(kinds, dimension))
    rows = centres[labels] + 1.5 * np.random.default_rng(seed).normal(size=(count, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("kinds", [2, 5])
def test_the_probe_is_scikit_learns_on_standardised_columns(kinds: int) -> None:
    (bank, labels), (queries, asked) = clouds(400, 1, kinds), clouds(300, 2, kinds)
    # This column is constant.
    bank[:, 3] = queries[:, 3] = 0.125
    bank[:, 4] *= 1e-3
    queries[:, 4] *= 1e-3
    peer = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(bank.astype(np.float64), labels)
    expected = peer.score(queries.astype(np.float64), asked)
    assert 1 / kinds + 0.1 < expected < 0.95
    assert linear_probe(bank, labels, queries, asked) == pytest.approx(expected, abs=1.5 / 300)


def test_the_probe_tells_what_a_line_can_and_no_more() -> None:
    bank, labels = clouds(200, 1)
    # The bank lacks these labels.
    assert linear_probe(bank, labels, bank, labels + 5) == 0
    corners = np.tile(np.array([[0, 0], [1, 1], [0, 1], [1, 0]], np.float32), (50, 1))
    # This is XOR.
    assert linear_probe(corners, np.tile([0, 0, 1, 1], 50), corners, np.tile([0, 0, 1, 1], 50)) <= 0.75
    assert linear_probe(corners, np.tile([0, 1, 0, 1], 50), corners, np.tile([0, 1, 0, 1], 50)) == 1


def test_alignment_is_the_mean_over_all_pairs_of_a_label() -> None:
    rows, labels = clouds(60, 3)
    # The classes have several sizes, among them one row.
    labels[:7] = [9, 9, 9, 9, 9, 8, 7]
    squares = [
        float(((rows[i].astype(np.float64) - rows[j]) ** 2).sum())
        for i in range(60)
        for j in range(60)
        if i != j and labels[i] == labels[j]
    ]
    assert alignment(rows, labels) == pytest.approx(np.mean(squares), rel=1e-9)


def test_alignment_in_closed_form() -> None:
    row = np.full((1, 4), 0.5, np.float32)
    assert alignment(np.repeat(row, 8, 0), np.zeros(8, np.int64)) == 0
    assert alignment(np.concatenate([row, -row]), np.zeros(2, np.int64)) == pytest.approx(4)
    assert alignment(np.eye(6, dtype=np.float32), np.zeros(6, np.int64)) == pytest.approx(2)
    assert alignment(np.eye(6, dtype=np.float32), np.arange(6)) is None


@pytest.mark.parametrize("block", [1, 7, 60, 1024])
def test_uniformity_is_the_mean_over_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_BLOCK", block)
    rows = clouds(60, 3)[0]
    squares = [float(((rows[i].astype(np.float64) - rows[j]) ** 2).sum()) for i in range(60) for j in range(i)]
    expected = np.log(np.mean(np.exp(-2 * np.array(squares))))
    assert uniformity(rows) == pytest.approx(expected, rel=1e-5)


def test_uniformity_in_closed_form() -> None:
    assert uniformity(np.repeat(np.full((1, 4), 0.5, np.float32), 8, 0)) == pytest.approx(0, abs=1e-6)
    assert uniformity(np.eye(6, dtype=np.float32)) == pytest.approx(-4)
    assert uniformity(np.array([[1, 0], [-1, 0]], np.float32)) == pytest.approx(-8)


@pytest.mark.parametrize(("count", "dimension"), [(50, 6), (6, 50), (9, 9)])
@pytest.mark.parametrize("block", [4, 1024])
def test_the_effective_rank_is_of_numpys_singular_values(
    count: int, dimension: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_BLOCK", block)
    rows = clouds(count, 4, dimension=dimension)[0]
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(rows) == pytest.approx(np.prod(shares**-shares), rel=1e-6)


def test_the_effective_rank_in_closed_form() -> None:
    assert effective_rank(np.eye(7, dtype=np.float32)) == pytest.approx(7)
    assert effective_rank(np.tile(np.eye(7, dtype=np.float32), (5, 1))) == pytest.approx(7)
    assert effective_rank(np.repeat(np.full((1, 4), 0.5, np.float32), 9, 0)) == pytest.approx(1, abs=1e-4)
    collapsed = np.eye(7, dtype=np.float32)[[0, 1, 1, 0, 0, 1, 0, 1]]
    assert effective_rank(collapsed) == pytest.approx(2, abs=1e-4)


def test_the_order_of_rows_changes_nothing() -> None:
    (bank, labels), (queries, asked) = clouds(300, 1), clouds(200, 2)
    mixed, turned = np.random.default_rng(5).permutation(300), np.random.default_rng(6).permutation(200)
    assert linear_probe(bank[mixed], labels[mixed], queries, asked) == pytest.approx(
        linear_probe(bank, labels, queries, asked), abs=1.5 / 200
    )
    assert alignment(queries[turned], asked[turned]) == pytest.approx(alignment(queries, asked), rel=1e-9)
    assert uniformity(queries[turned]) == pytest.approx(uniformity(queries), rel=1e-5)
    assert effective_rank(bank[mixed]) == pytest.approx(effective_rank(bank), rel=1e-9)
