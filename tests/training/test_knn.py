"""Votes against plain loops, and the headline figure against scikit-learn's k-NN."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from service import FloatArray
from training.knn import headline_accuracy, vote, weighted_vote

Rows = list[list[tuple[str, int]]]


@st.composite
def ballots(draw: st.DrawFn) -> Rows:
    """Rows of one length, each a list of a label and its weight; whole weights, so that ties are ties."""
    k = draw(st.integers(1, 8))
    ballot = st.tuples(st.sampled_from(["a", "b", "10", "9", ""]), st.integers(0, 5))
    return draw(st.lists(st.lists(ballot, min_size=k, max_size=k), min_size=1, max_size=6))


def test_a_vote_goes_to_the_majority_and_a_tie_to_the_first_label() -> None:
    labels = np.array(
        [
            ["b", "b", "a", "c", "b"],
            ["c", "b", "c", "b", "a"],  # two of b, two of c
            ["d", "c", "b", "a", "e"],  # all once
            ["e", "e", "d", "d", "e"],
            ["10", "9", "9", "10", "a"],  # sorted as text
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
        # A label that only other rows have weighs nothing here, and ties with one of weight 0.
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
