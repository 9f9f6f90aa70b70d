"""The nearest neighbours of a picture, and the label that they vote for."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from service import FloatArray, IntArray, cores

LabelArray = np.ndarray[Any, Any]

# The headline figure: so many neighbours vote, each with the weight exp(cosine / temperature).
HEADLINE_K, HEADLINE_TEMPERATURE = 20, 0.07

# Each thread holds up to so many scores, which bounds its memory at 16 MB.
_SCORES = 2**22
_THREADS = 8
# The votes of so many queries are counted together, which bounds the memory of the counts.
_VOTES = 1000


def vote(labels: LabelArray) -> LabelArray:
    """Return the most frequent label of each row (N, k); of equally frequent ones, the first in sorted order."""
    return weighted_vote(labels, np.ones(labels.shape, np.float32))


def weighted_vote(labels: LabelArray, weights: FloatArray) -> LabelArray:
    """Return the label of the greatest total weight in each row (N, k); of equal ones, the first in sorted order."""
    names, codes = np.unique(labels, return_inverse=True)
    codes, winners = codes.reshape(labels.shape), np.empty(len(labels), np.int64)
    for start in range(0, len(labels), _VOTES):
        block = slice(start, start + _VOTES)
        totals = np.zeros((len(codes[block]), len(names)))
        np.add.at(totals, (np.arange(len(totals))[:, None], codes[block]), weights[block])
        winners[block] = totals.argmax(1)
    return np.asarray(names[winners])


def soft_vote(labels: LabelArray, scores: FloatArray, temperature: float = HEADLINE_TEMPERATURE) -> LabelArray:
    """Return the label that each row of neighbours (N, k) votes for, with weights exp(score / temperature).

    Source: Wu et al., arXiv:1805.01978, section 3.4.
    """
    return weighted_vote(labels, np.exp(scores / np.float32(temperature)))


def headline_accuracy(
    bank: FloatArray, bank_labels: LabelArray, queries: FloatArray, query_labels: LabelArray
) -> float:
    """Return the share of queries that the soft vote of their 20 nearest neighbours labels correctly.

    Args:
        bank, queries: (B, D), (N, D), rows of L2 norm 1. All B vote if there are fewer than 20.
        bank_labels, query_labels: (B,), (N,).

    Cost: as `nearest`.
    """
    scores, positions = nearest(bank, queries, min(HEADLINE_K, len(bank)))
    return float((soft_vote(bank_labels[positions], scores) == query_labels).mean())


def nearest(bank: FloatArray, queries: FloatArray, k: int, name: str = "") -> tuple[FloatArray, IntArray]:
    """Return the k bank rows most like each query, best first, equal ones by position, as the service's index does.

    Args:
        bank, queries: (B, D), (N, D), float32.
        k: 1 <= k <= B.
        name: of the compared set, for the progress bar.

    Returns:
        scores: (N, k), inner products: cosines if all rows have L2 norm 1.
        positions: (N, k) int64.

    Cost: O(N · B · D) on all cores; 16 MB a thread, or the B scores of one query if they are more.
    """

    def search(start: int, stop: int) -> tuple[FloatArray, IntArray]:
        scores = queries[start:stop] @ bank.T  # (n, B)
        positions = np.stack([highest(row, k) for row in scores])
        return np.take_along_axis(scores, positions, 1), positions

    scores, positions = in_blocks(search, len(queries), len(bank), name)
    return scores, positions


def highest(scores: FloatArray, k: int) -> IntArray:
    """Return the positions of the k highest of B scores, best first, equal ones by position."""
    likely = np.arange(len(scores))
    if k < len(scores):
        # The k highest, and all that equal the last of them. A comparison with NaN is False, so NaN ranks as highest.
        likely = np.flatnonzero(~(scores < np.partition(scores, -k)[-k]))
    # Adding 0 makes −0 equal to 0.
    bits = (scores[likely] + np.float32(0)).view(np.int32)
    # One int64 sorts by both: the score's bits, turned so that they fall as it rises, above the position.
    keys = np.where(bits < 0, bits & 0x7FFFFFFF, ~bits).astype(np.int64) << 32 | likely
    keys.sort()
    return keys[:k] & 0xFFFFFFFF


def in_blocks(work: Callable[[int, int], tuple[Any, ...]], count: int, width: int, name: str) -> tuple[Any, ...]:
    """Do work(start, stop) on blocks of `count` queries on all cores, and join each of the arrays that it returns.

    Args:
        work: returns arrays of one row a query.
        count: N queries.
        width: B scores a query; decides how many queries make a block.
        name: for the progress bar.
    """
    rows = max(1, _SCORES // width)
    starts = range(0, count, rows)
    with (
        # A product in every thread of ours is faster than all threads in every product.
        threadpool_limits(1, "blas"),
        ThreadPoolExecutor(min(_THREADS, cores())) as pool,
        tqdm(desc=f"neighbours {name}", total=count, unit=" queries", leave=False, disable=not name) as bar,
    ):
        blocks = []
        for start, block in zip(
            starts, pool.map(lambda start: work(start, min(start + rows, count)), starts), strict=True
        ):
            blocks.append(block)
            bar.update(min(rows, count - start))
    return tuple(np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
