"""The label that a picture's nearest neighbours vote for."""

from typing import Any

import numpy as np

from service import FloatArray, IntArray

LabelArray = np.ndarray[Any, Any]


def vote(labels: LabelArray) -> LabelArray:
    """Return the commonest label of each row (N, k); of equally common ones, the first in sorted order."""
    return weighted_vote(labels, np.ones(labels.shape, np.float32))


def weighted_vote(labels: LabelArray, weights: FloatArray) -> LabelArray:
    """Return the label of each row (N, k) whose weights sum to most; of equal ones, the first in sorted order."""
    names, codes = np.unique(labels, return_inverse=True)
    totals = np.zeros((len(labels), len(names)))
    np.add.at(totals, (np.arange(len(labels))[:, None], codes.reshape(labels.shape)), weights)
    return np.asarray(names[totals.argmax(1)])


def headline_accuracy(
    bank: FloatArray, bank_labels: LabelArray, queries: FloatArray, query_labels: LabelArray
) -> float:
    """Return the share of queries that 20 neighbours name rightly, their votes weighted by exp(cosine / 0.07).

    Source: Wu et al., arXiv:1805.01978, section 3.4.

    Args:
        bank, queries: (B, D), (N, D), rows of L2 norm 1; all B vote where there are fewer than 20.
        bank_labels, query_labels: (B,), (N,).

    Cost: O(N · B · D), a (1000, B) matrix.
    """
    k, right = min(20, len(bank)), 0
    for start in range(0, len(queries), 1000):
        scores = queries[start : start + 1000] @ bank.T  # (n, B)
        nearest: IntArray = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(scores, nearest, 1) / 0.07)
        right += int((weighted_vote(bank_labels[nearest], weights) == query_labels[start : start + 1000]).sum())
    return right / len(queries)
