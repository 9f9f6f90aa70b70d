"""Figures of all embeddings together: linear separability, and the distribution on the sphere."""

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from service import FloatArray, IntArray

_BLOCK = 1024
_PROBE_STEPS = 100


def linear_probe(
    bank: FloatArray, bank_labels: IntArray, queries: FloatArray, query_labels: IntArray, name: str = ""
) -> float:
    """Return the share of queries that a linear classifier trained on the bank's rows labels correctly.

    The classifier is scikit-learn's multinomial logistic regression, C = 1, at most 100 steps of L-BFGS from 0,
    on columns of mean 0 and deviation 1 over the bank; a constant column becomes 0.

    Args:
        bank, queries: (B, D), (N, D), float32.
        bank_labels, query_labels: (B,), (N,); the bank has two labels or more.
        name: of the classified set, for the progress bar.

    Cost: O(steps · B · D · classes); one copy of the bank.
    """
    deviation, mean = (part.numpy() for part in torch.std_mean(torch.from_numpy(bank), 0, correction=0))
    deviation[deviation < 1e-6] = np.inf
    probe = LogisticRegression(max_iter=_PROBE_STEPS, random_state=0)
    with (
        warnings.catch_warnings(),
        # The products are so narrow that two threads take longer than one.
        threadpool_limits(1, "blas"),
        tqdm(desc=f"linear probe {name}", unit=" steps", leave=False) as bar,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        standardised = bank - mean
        standardised /= deviation
        # A confident softmax leaves numbers near 1e-40, which take a CPU twice the time.
        torch.set_flush_denormal(True)
        probe.set_callbacks(_Steps(bar)).fit(standardised, bank_labels)
        torch.set_flush_denormal(False)
    return float((probe.predict((queries - mean) / deviation) == query_labels).mean())


def alignment(rows: FloatArray, labels: IntArray) -> float | None:
    """Return the mean squared distance of positives: all pairs of rows (N, D) with one label, 0 to 4.

    The paper's positives are two views of a picture; here they are two pictures of a label. None if no two rows share a
    label.

    Cost: O(N · D): a label's pairs have Σ|x − y|² = 2 n Σ|x|² − 2 |Σx|².
    Source: Wang & Isola, arXiv:2005.10242, equation 4, α = 2.
    """
    distances, pairs = 0.0, 0
    for label in np.unique(labels):
        own = rows[labels == label].astype(np.float64)
        distances += 2 * (len(own) * (own**2).sum() - (own.sum(0) ** 2).sum())
        pairs += len(own) * (len(own) - 1)
    return max(0.0, float(distances) / pairs) if pairs else None


def uniformity(rows: FloatArray) -> float:
    """Return log of the mean of exp(−2 |x − y|²) over all pairs of rows (N, D), N >= 2: 0 for one point, to −4.

    Cost: O(N² · D), in blocks.
    Source: Wang & Isola, arXiv:2005.10242, equation 5, t = 2.
    """
    squares = (rows**2).sum(1)
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = squares[block, None] + squares - 2 * (rows[block] @ rows.T)  # (n, N)
        # A row and itself are no pair.
        np.fill_diagonal(distances[:, start:], np.inf)
        total += float(np.exp(-2 * distances).sum(dtype=np.float64))
    return float(np.log(total / (len(rows) * (len(rows) - 1))))


def effective_rank(rows: FloatArray) -> float:
    """Return exp of the entropy of the singular values of rows (N, D), as shares of their sum: 1 to min(N, D).

    Cost: O(N · D · min(N, D)), in float64 blocks.
    Source: RankMe, Garrido et al., arXiv:2210.02885, equation 1; Roy & Vetterli 2007.
    """
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.T
    gram = np.zeros((tall.shape[1],) * 2)
    for start in range(0, len(tall), _BLOCK):
        block = tall[start : start + _BLOCK].astype(np.float64)
        gram += block.T @ block
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


class _Steps:
    """Callback of scikit-learn that advances a progress bar with every step of L-BFGS."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar

    def setup(self, *_: Any, **__: Any) -> None: ...

    def teardown(self, *_: Any, **__: Any) -> None: ...

    def on_fit_task_begin(self, *_: Any, **__: Any) -> None: ...

    def on_fit_task_end(self, *_: Any, **__: Any) -> None:
        self._bar.update()
