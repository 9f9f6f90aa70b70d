"""Neighbours: the pictures nearest to a picture, the label that they vote for, and how well they are ranked."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from service import FloatArray, IntArray, cores
from service.encoding.voting import weighted_vote

DoubleArray = NDArray[np.float64]

_SCORES = 2**22  # at once in a thread
_THREADS = 8  # at most
_VOTES = 1000  # queries whose votes are counted together


class Neighbours(NamedTuple):
    """The bank's pictures most like each of N queries, and how well the query's own label leads the whole ranking.

    R is the number of the bank's pictures of the query's label; a query with R = 0 has nan twice.
    """

    positions: IntArray  # (N, K) in the bank, most alike first
    scores: FloatArray  # (N, K) cosine
    average_precision: DoubleArray  # (N,) over the first R: Σ precision at each that is of the label, over R
    r_precision: DoubleArray  # (N,) the share of the first R that is of the label


def nearest(bank: FloatArray, queries: FloatArray, k: int, name: str = "") -> tuple[FloatArray, IntArray]:
    """Return the k bank rows most like each query, best first, equal ones by position: as the service's index does.

    Args:
        bank, queries: (B, D), (N, D).
        k: 1 <= k <= B.
        name: of what is compared, for the bar.

    Returns:
        scores: (N, k), inner products: cosines of rows of L2 norm 1.
        positions: (N, k) int64.

    Cost: O(N · B · D) on all cores; 16 MB a thread, or B numbers of a query where that is more.
    """

    def search(start: int, stop: int) -> tuple[FloatArray, IntArray]:
        scores = queries[start:stop] @ bank.T  # (n, B)
        positions = np.stack([_first(row, k) for row in scores])
        return np.take_along_axis(scores, positions, 1), positions

    scores, positions = _in_blocks(search, len(queries), max(1, _SCORES // len(bank)), name)
    return scores, positions


def find_neighbours(
    bank: FloatArray, bank_labels: IntArray, queries: FloatArray, query_labels: IntArray, k: int, name: str = ""
) -> Neighbours:
    """Rank the bank for every query.

    Args:
        bank, queries: (B, D), (N, D), rows of L2 norm 1, or 0.
        bank_labels, query_labels: (B,), (N,), whole numbers from 0.
        k: neighbours to return of each query; all B where there are fewer.
        name: of what is ranked, for the bar.

    Cost: as `nearest`, and O(N · R log R).
    Source: Musgrave et al., A metric learning reality check, arXiv:2003.08505, section 3.2: MAP@R and R-precision.
    """
    k = min(k, len(bank))
    counts = np.bincount(bank_labels, minlength=int(query_labels.max()) + 1)

    def rank(start: int, stop: int) -> tuple[Any, ...]:
        scores = queries[start:stop] @ bank.T  # (n, B)
        positions = np.empty((stop - start, k), np.int64)
        average, share = np.full((2, stop - start), np.nan)
        for row, label in enumerate(query_labels[start:stop]):
            relevant = counts[label]  # R
            first = _first(scores[row], max(k, relevant))
            positions[row] = first[:k]
            if relevant:
                places = np.flatnonzero(bank_labels[first[:relevant]] == label) + 1  # of the label, from 1
                average[row] = (np.arange(1, len(places) + 1) / places).sum() / relevant
                share[row] = len(places) / relevant
        return positions, np.clip(np.take_along_axis(scores, positions, 1), -1, 1), average, share

    return Neighbours(*_in_blocks(rank, len(queries), max(1, _SCORES // len(bank)), name))


def _first(scores: FloatArray, k: int) -> IntArray:
    """The positions of the k highest of B scores, best first, equal ones by position."""
    likely = np.arange(len(scores))
    if k < len(scores):
        likely = np.flatnonzero(scores >= np.partition(scores, -k)[-k])  # k, and those equal to the last of them
    bits = (scores[likely] + np.float32(0)).view(np.int32)  # −0 becomes 0
    # The scores as whole numbers that fall as they rise; beneath them the position. Sorted as one int64.
    keys = np.where(bits < 0, bits & 0x7FFFFFFF, ~bits).astype(np.int64) << 32 | likely
    keys.sort()
    return keys[:k] & 0xFFFFFFFF


def _in_blocks(work: Callable[[int, int], tuple[Any, ...]], count: int, rows: int, name: str) -> tuple[Any, ...]:
    """Do the work on so many rows at a time, on all cores; return each of its arrays in one piece."""
    starts = range(0, count, rows)
    with (
        threadpool_limits(1, "blas"),  # a product in every thread of ours, rather than all threads in every product
        ThreadPoolExecutor(min(_THREADS, cores())) as pool,
        tqdm(desc=f"neighbours {name}", total=count, unit=" queries", leave=False) as bar,
    ):
        blocks = []
        for start, block in zip(
            starts, pool.map(lambda start: work(start, min(start + rows, count)), starts), strict=True
        ):
            blocks.append(block)
            bar.update(min(rows, count - start))
    return tuple(np.concatenate(arrays) for arrays in zip(*blocks, strict=True))


def neighbour_figures(
    found: Neighbours, bank_labels: IntArray, query_labels: IntArray
) -> tuple[dict[str, float | None], IntArray]:
    """Return the figures that neighbours give, and the label (N,) that the weighted vote of 20 gives each query.

    k5 and k10 are the share of queries that the majority of so many names rightly; weighted_k20 and weighted_k200
    weigh votes by exp(cosine / T), T being 0.07 and 0.1; recall_at_k is the share with one of their label
    among k; map_at_r and r_precision are means over the queries whose label the bank has. A label that it does
    not have is a wrong answer everywhere else.

    Args:
        found: 20 neighbours of each query or more; with fewer than 200, weighted_k200 is None.
        bank_labels, query_labels: as in find_neighbours.

    Source: Wu et al., arXiv:1805.01978, section 3.4: the weighted vote.
    """
    labels = bank_labels[found.positions]  # (N, K)
    right = labels == query_labels[:, None]

    def voted(k: int, temperature: float | None = None) -> IntArray:
        weights = np.ones_like(found.scores[:, :k])
        if temperature:
            weights = np.exp(found.scores[:, :k] / np.float32(temperature))
        blocks = (slice(start, start + _VOTES) for start in range(0, len(labels), _VOTES))
        return np.concatenate([weighted_vote(labels[block, :k], weights[block]) for block in blocks])

    def accuracy(predicted: IntArray) -> float:
        return float((predicted == query_labels).mean())

    def mean(values: DoubleArray) -> float | None:
        known = values[np.isfinite(values)]
        return float(known.mean()) if len(known) else None

    headline = voted(20, 0.07)
    figures = {
        "weighted_k20": accuracy(headline),
        "weighted_k200": accuracy(voted(200, 0.1)) if labels.shape[1] >= 200 else None,
        "k5": accuracy(voted(5)),
        "k10": accuracy(voted(10)),
        **{f"recall_at_{k}": float(right[:, :k].any(1).mean()) for k in (1, 5, 10)},
        "map_at_r": mean(found.average_precision),
        "r_precision": mean(found.r_precision),
    }
    return figures, headline
