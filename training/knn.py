"""Figures of neighbours: the labels that they vote for, and how well a query's own label is ranked."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service import FloatArray, IntArray
from service.encoding.voting import HEADLINE_K, HEADLINE_TEMPERATURE, highest, in_blocks, soft_vote, vote
from training.overlap import NO_OVERLAP, Overlap

DoubleArray = NDArray[np.float64]

# The figure weighted_k200 needs the most neighbours.
MOST_K = 200
_NO_POSITIONS: IntArray = np.empty(0, np.int64)
_SOFT_K200_TEMPERATURE = 0.1


class Neighbours(NamedTuple):
    """The bank pictures most like each of N queries, and how well the query's own label leads the whole ranking.

    R is the number of bank pictures of the query's label; a query with R = 0 has NaN in both figures.

    Attributes:
        positions: (N, K) in the bank, most alike first.
        scores: (N, K) cosine.
        average_precision: (N,) over the first R: Σ precision at each that has the label, over R.
        r_precision: (N,) the share of the first R that has the label.
    """

    positions: IntArray
    scores: FloatArray
    average_precision: DoubleArray
    r_precision: DoubleArray


def find_neighbours(
    bank: FloatArray,
    bank_labels: IntArray,
    queries: FloatArray,
    query_labels: IntArray,
    k: int,
    name: str = "",
    overlap: Overlap = NO_OVERLAP,
) -> Neighbours:
    """Rank the bank for every query.

    Args:
        bank, queries: (B, D), (N, D), rows of L2 norm 1, or 0.
        bank_labels, query_labels: (B,), (N,), integers from 0.
        k: neighbours to return for each query; fewer if the bank has fewer beside a query itself.
        name: of the ranked set, for the progress bar.
        overlap: the queries that the bank holds too; these pictures of the bank are not their neighbours.

    Cost: as voting.nearest, and O(N · R log R).
    Source: Musgrave et al., A metric learning reality check, arXiv:2003.08505, section 3.2: MAP@R and R-precision.
    """
    k = min(k, len(bank) - max(map(len, overlap.values()), default=0))
    counts = np.bincount(bank_labels, minlength=int(query_labels.max()) + 1)

    def rank(start: int, stop: int) -> tuple[Any, ...]:
        scores = queries[start:stop] @ bank.T  # (n, B)
        positions = np.empty((stop - start, k), np.int64)
        average, share = np.full((2, stop - start), np.nan)
        for row, label in enumerate(query_labels[start:stop]):
            # R in the paper.
            own = overlap.get(start + row, _NO_POSITIONS)
            scores[row, own] = -np.inf
            relevant = counts[label] - (bank_labels[own] == label).sum()
            first = highest(scores[row], max(k, relevant))
            positions[row] = first[:k]
            if relevant:
                # Ranks of the pictures with the label count from 1, as in precision at k.
                places = np.flatnonzero(bank_labels[first[:relevant]] == label) + 1
                average[row] = (np.arange(1, len(places) + 1) / places).sum() / relevant
                share[row] = len(places) / relevant
        return positions, np.clip(np.take_along_axis(scores, positions, 1), -1, 1), average, share

    return Neighbours(*in_blocks(rank, len(queries), len(bank), name))


def neighbour_figures(
    found: Neighbours, bank_labels: IntArray, query_labels: IntArray
) -> tuple[dict[str, float | None], IntArray]:
    """Return the figures of neighbours, and the label (N,) that the soft vote of 20 gives each query.

    k5 and k10 are the share of queries that the majority of 5 and 10 labels correctly; weighted_k20 and weighted_k200
    weigh votes by exp(cosine / T), T being 0.07 and 0.1; recall_at_k is the share with a neighbour of their label
    among k; map_at_r and r_precision are means over the queries whose label the bank has. A query whose label it does
    not have counts as wrong everywhere else.

    Args:
        found: 20 neighbours of each query or more; with fewer than 200, weighted_k200 is None.
        bank_labels, query_labels: as in find_neighbours.

    Source: Wu et al., arXiv:1805.01978, section 3.4: the soft vote.
    """
    labels = bank_labels[found.positions]  # (N, K)
    right = labels == query_labels[:, None]

    def softly(k: int, temperature: float) -> IntArray:
        return soft_vote(labels[:, :k], found.scores[:, :k], temperature)

    def accuracy(predicted: IntArray) -> float:
        return float((predicted == query_labels).mean())

    def mean(values: DoubleArray) -> float | None:
        known = values[np.isfinite(values)]
        return float(known.mean()) if len(known) else None

    headline = softly(HEADLINE_K, HEADLINE_TEMPERATURE)
    figures = {
        "weighted_k20": accuracy(headline),
        "weighted_k200": accuracy(softly(MOST_K, _SOFT_K200_TEMPERATURE)) if labels.shape[1] >= MOST_K else None,
        "k5": accuracy(vote(labels[:, :5])),
        "k10": accuracy(vote(labels[:, :10])),
        **{f"recall_at_{k}": float(right[:, :k].any(1).mean()) for k in (1, 5, 10)},
        "map_at_r": mean(found.average_precision),
        "r_precision": mean(found.r_precision),
    }
    return figures, headline
