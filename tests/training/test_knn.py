"""Votes and rankings against plain loops, figures against scikit-learn's k-NN and pytorch-metric-learning."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.neighbors import KNeighborsClassifier

from service import FloatArray
from service.encoding import voting
from service.encoding.voting import headline_accuracy, highest, nearest, vote, weighted_vote
from training.knn import find_neighbours, neighbour_figures

Rows = list[list[tuple[str, int]]]


@st.composite
def ballots(draw: st.DrawFn) -> Rows:
    """Rows of one length, each a list of labels with weights; whole weights make ties exact."""
    k = draw(st.integers(1, 8))
    ballot = st.tuples(st.sampled_from(["a", "b", "10", "9", ""]), st.integers(0, 5))
    return draw(st.lists(st.lists(ballot, min_size=k, max_size=k), min_size=1, max_size=6))


def test_a_vote_goes_to_the_majority_and_a_tie_to_the_first_label() -> None:
    labels = np.array(
        [
            ["b", "b", "a", "c", "b"],
            # Two neighbours vote b, two vote c.
            ["c", "b", "c", "b", "a"],
            # Each label has one vote.
            ["d", "c", "b", "a", "e"],
            ["e", "e", "d", "d", "e"],
            # Labels sort as text.
            ["10", "9", "9", "10", "a"],
        ]
    )
    assert vote(labels).tolist() == ["b", "b", "a", "e", "10"]


@settings(max_examples=50, deadline=None)
@given(ballots())
def test_a_vote_is_a_count(rows: Rows) -> None:
    labels = np.array([[label for label, _ in row] for row in rows])
    expected = []
    for row in labels.tolist():
        counts = Counter(row)
        expected.append(min(counts, key=lambda label: (-counts[label], label)))
    assert vote(labels).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(ballots())
def test_a_weighted_vote_is_a_sum(rows: Rows) -> None:
    labels = np.array([[label for label, _ in row] for row in rows])
    weights = np.array([[weight for _, weight in row] for row in rows], np.float32)
    expected = []
    for row in rows:
        # A label absent from this row weighs nothing and ties with a label of weight 0.
        totals = dict.fromkeys(np.unique(labels).tolist(), 0)
        for label, weight in row:
            totals[label] += weight
        expected.append(min(totals, key=lambda label: (-totals[label], label)))
    assert weighted_vote(labels, weights).tolist() == expected


def test_one_heavy_vote_beats_many_light_ones() -> None:
    labels = np.array([[1, 2, 2, 2], [1, 2, 2, 2]])
    weights = np.array([[3.5, 1, 1, 1], [2.5, 1, 1, 1]], np.float32)
    assert weighted_vote(labels, weights).tolist() == [1, 2]


def clouds(count: int, seed: int, kinds: int = 5) -> tuple[FloatArray, NDArray[np.int64]]:
    """Unit rows about `kinds` centres, wide enough that neighbours disagree."""
    labels = np.arange(count, dtype=np.int64) % kinds
    centres = np.random.default_rng(0).normal(size=(kinds, 12))
    rows = centres[labels] + 1.5 * np.random.default_rng(seed).normal(size=(count, 12))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def sklearns(bank: FloatArray, labels: NDArray[np.int64], queries: FloatArray, asked: NDArray[np.int64]) -> float:
    """Wu et al., arXiv:1805.01978: exp(cosine / 0.07), here over exp(1 / 0.07), which changes no vote."""
    peer = KNeighborsClassifier(
        n_neighbors=min(20, len(bank)), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    return float(peer.fit(bank, labels).score(queries, asked))


@pytest.mark.parametrize("bank_size", [1, 7, 19, 20, 21, 400])
def test_the_headline_figure_is_scikit_learns(bank_size: int) -> None:
    bank, labels = clouds(bank_size, seed=1)
    queries, asked = clouds(300, seed=2)
    expected = sklearns(bank, labels, queries, asked)
    assert bank_size == 1 or 0.2 < expected < 0.95
    assert headline_accuracy(bank, labels, queries, asked) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2300])
def test_the_headline_figure_is_of_all_queries(count: int) -> None:
    bank, labels = clouds(200, seed=1)
    queries, asked = clouds(count, seed=2)
    expected = sklearns(bank, labels, queries, asked)
    assert headline_accuracy(bank, labels, queries, asked) == pytest.approx(expected, abs=1e-12)


def test_near_neighbours_outvote_the_many() -> None:
    angles = np.array([0.1, 0.1, *[1.2] * 18])
    bank = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    labels = np.array([1, 1, *[2] * 18])
    query = np.array([[1, 0]], np.float32)
    assert headline_accuracy(bank, labels, query, np.array([1])) == 1
    assert vote(labels[None]).tolist() == [2]


def test_the_twenty_first_neighbour_has_no_vote() -> None:
    angles = np.array([*[0.5] * 20, *[0.51] * 500])
    bank = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    labels = np.array([1] * 20 + [2] * 500)
    assert headline_accuracy(bank, labels, np.array([[1, 0]], np.float32), np.array([1])) == 1


def measured(
    bank: FloatArray, labels: NDArray[np.int64], queries: FloatArray, asked: NDArray[np.int64]
) -> dict[str, float | None]:
    return neighbour_figures(find_neighbours(bank, labels, queries, asked, 200), labels, asked)[0]


@pytest.mark.parametrize("scores", [1, 700, 2**22])
@pytest.mark.parametrize("k", [1, 5, 299, 300])
def test_nearest_is_the_order_of_all_products(k: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voting, "_SCORES", scores)
    bank, queries = clouds(300, seed=1)[0], clouds(40, seed=2)[0]
    products = queries.astype(np.float64) @ bank.T.astype(np.float64)
    expected = np.argsort(-products, axis=1)[:, :k]
    found, positions = nearest(bank, queries, k)
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_allclose(found, np.take_along_axis(products, expected, 1), atol=1e-6)


def test_equal_scores_go_by_position() -> None:
    scores = np.array([-0.0, -1, 0.5, 0, 1, 0.5, -1, 0.5, -0.25], np.float32)
    expected = [4, 2, 5, 7, 0, 3, 8, 1, 6]
    for k in range(1, 10):
        assert nearest(scores[:, None], np.ones((1, 1), np.float32), k)[1].tolist() == [expected[:k]]
        # A product is never −0, but these scores contain it.
        assert highest(scores, k).tolist() == expected[:k]


def test_rankings_are_pytorch_metric_learnings() -> None:
    (bank, labels), (queries, asked) = clouds(500, seed=1), clouds(200, seed=2)
    # The classes have several sizes.
    labels[:90] = 0
    # The bank lacks this class, and both implementations leave it out.
    asked[:20] = 7
    # No query has this class.
    labels[90:95] = 8
    peer = AccuracyCalculator(
        include=("mean_average_precision_at_r", "r_precision", "precision_at_1"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
    )
    expected = peer.get_accuracy(queries, asked, bank, labels)
    found = measured(bank, labels, queries, asked)
    assert 0.1 < expected["mean_average_precision_at_r"] < expected["r_precision"] < 0.9
    assert found["map_at_r"] == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)
    assert found["r_precision"] == pytest.approx(expected["r_precision"], abs=1e-6)
    assert found["recall_at_1"] == pytest.approx(expected["precision_at_1"] * 180 / 200, abs=1e-6)


def test_figures_of_neighbours_are_slow_loops() -> None:
    (bank, labels), (queries, asked) = clouds(250, seed=1), clouds(60, seed=2)
    precisions, shares, recalls = [], [], {1: 0, 5: 0, 10: 0}
    for query, label in zip(queries.astype(np.float64), asked, strict=True):
        ranked = sorted(range(250), key=lambda at: -float(bank[at] @ query))
        same = [bool(labels[at] == label) for at in ranked]
        r = int((labels == label).sum())
        precisions.append(sum(sum(same[: at + 1]) / (at + 1) for at in range(r) if same[at]) / r)
        shares.append(sum(same[:r]) / r)
        for k in recalls:
            recalls[k] += any(same[:k])
    found = measured(bank, labels, queries, asked)
    assert found["map_at_r"] == pytest.approx(np.mean(precisions), abs=1e-9)
    assert found["r_precision"] == pytest.approx(np.mean(shares), abs=1e-9)
    for k, right in recalls.items():
        assert found[f"recall_at_{k}"] == pytest.approx(right / 60)


def test_votes_are_scikit_learns() -> None:
    (bank, labels), (queries, asked) = clouds(400, seed=1), clouds(300, seed=2)
    found = measured(bank, labels, queries, asked)
    assert found["weighted_k20"] == headline_accuracy(bank, labels, queries, asked)
    for key, k, weights in (
        ("k5", 5, "uniform"),
        ("k10", 10, "uniform"),
        ("weighted_k20", 20, lambda d: np.exp((1 - d) / 0.07)),
        ("weighted_k200", 200, lambda d: np.exp((1 - d) / 0.1)),
    ):
        peer = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute", weights=weights)
        assert found[key] == pytest.approx(peer.fit(bank, labels).score(queries, asked), abs=1e-12), key
    # The figures are not one number four times.
    assert len({found[key] for key in ("k5", "k10", "weighted_k20", "weighted_k200")}) >= 3


def test_the_predictions_are_the_headlines() -> None:
    (bank, labels), (queries, asked) = clouds(400, seed=1), clouds(2300, seed=2)
    found = find_neighbours(bank, labels, queries, asked, 20)
    figures, predicted = neighbour_figures(found, labels, asked)
    expected = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank, labels)
    np.testing.assert_array_equal(predicted, expected.predict(queries))
    # Only 20 neighbours are known.
    assert figures["weighted_k200"] is None
    assert found.positions.shape == found.scores.shape == (2300, 20)


def test_blocks_and_the_order_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (bank, labels), (queries, asked) = clouds(400, seed=1), clouds(150, seed=2)
    whole = measured(bank, labels, queries, asked)
    mixed, turned = np.random.default_rng(3).permutation(400), np.random.default_rng(4).permutation(150)
    assert measured(bank[mixed], labels[mixed], queries[turned], asked[turned]) == pytest.approx(whole)
    # Two queries are scored at once.
    monkeypatch.setattr(voting, "_SCORES", 1000)
    monkeypatch.setattr(voting, "_VOTES", 7)
    assert measured(bank, labels, queries, asked) == pytest.approx(whole)


def test_labels_that_the_bank_lacks_are_wrong_answers_only() -> None:
    (bank, labels), (queries, _) = clouds(300, seed=1), clouds(50, seed=2)
    found = measured(bank, labels, queries, np.full(50, 6))
    assert found["map_at_r"] is found["r_precision"] is None
    assert {value for key, value in found.items() if not key.startswith(("map", "r_p"))} == {0.0}


def test_bank_and_queries_that_are_one_set_are_leave_one_out_loops() -> None:
    """Every query is ranked in the bank without it, by plain loops and by pytorch-metric-learning."""
    bank, labels = clouds(250, seed=1)
    overlap = {at: np.array([at]) for at in range(250)}
    found = find_neighbours(bank, labels, bank, labels, 300, overlap=overlap)
    assert found.positions.shape == (250, 249)
    for at in range(0, 250, 25):
        others = np.delete(np.arange(250), at)
        alone = find_neighbours(bank[others], labels[others], bank[at : at + 1], labels[at : at + 1], 249)
        np.testing.assert_array_equal(found.positions[at], others[alone.positions[0]])
        assert found.average_precision[at] == pytest.approx(alone.average_precision[0])
        assert found.r_precision[at] == pytest.approx(alone.r_precision[0])
    peer = AccuracyCalculator(
        include=("mean_average_precision_at_r",), k="max_bin_count", knn_func=CustomKNN(CosineSimilarity())
    ).get_accuracy(bank, labels, bank, labels, ref_includes_query=True)
    figures = neighbour_figures(found, labels, labels)[0]
    assert figures["map_at_r"] == pytest.approx(peer["mean_average_precision_at_r"], abs=1e-6)
