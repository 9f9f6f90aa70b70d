"""nt_xent against the paper's equation in plain NumPy, a peer library, closed forms, and two known wrong forms."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor
from torch.nn import functional as F

from training.losses import nt_xent

SIZES = [(2, 3, 1.0), (3, 5, 0.5), (16, 8, 0.2), (33, 128, 0.07)]  # N, P, τ


def pair(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(count, width, generator=generator)
    return z1, z1 + 0.5 * torch.randn(count, width, generator=generator)


def equation_1(z1: NDArray[Any], z2: NDArray[Any], temperature: float) -> float:
    """Chen et al., arXiv:2002.05709, equation 1 and algorithm 1, as printed: views 2k−1 and 2k are of picture k."""
    z = np.empty((2 * len(z1), z1.shape[1]))
    z[0::2], z[1::2] = z1, z2

    def sim(i: int, j: int) -> float:
        return float(z[i] @ z[j] / (np.linalg.norm(z[i]) * np.linalg.norm(z[j])))

    def ell(i: int, j: int) -> float:
        others = sum(math.exp(sim(i, k) / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(sim(i, j) / temperature) / others)

    return sum(ell(k, k + 1) + ell(k + 1, k) for k in range(0, len(z), 2)) / len(z)


@pytest.mark.parametrize(("count", "width", "temperature"), SIZES)
def test_is_equation_1(count: int, width: int, temperature: float) -> None:
    z1, z2 = pair(count, width)
    expected = equation_1(z1.double().numpy(), z2.double().numpy(), temperature)
    assert float(nt_xent(z1, z2, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("count", "width", "temperature"), SIZES)
def test_agrees_with_pytorch_metric_learning(count: int, width: int, temperature: float) -> None:
    z1, z2 = pair(count, width, seed=1)
    labels = torch.arange(count).repeat(2)
    peer = NTXentLoss(temperature=temperature)(torch.cat([z1, z2]), labels)
    assert float(nt_xent(z1, z2, temperature)) == pytest.approx(float(peer), rel=1e-5)


@pytest.mark.parametrize("count", [2, 7, 64])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_identical_embeddings_cost_the_log_of_the_other_views(count: int, temperature: float) -> None:
    z = torch.ones(count, 5)
    assert float(nt_xent(z, z, temperature)) == pytest.approx(math.log(2 * count - 1), rel=1e-5)


def test_perfect_embeddings_cost_what_is_left_of_the_softmax() -> None:
    count, temperature = 6, 0.5
    z = torch.eye(count)  # the positive at cosine 1, the 2N − 2 negatives at cosine 0
    expected = math.log(1 + (2 * count - 2) * math.exp(-1 / temperature))
    assert float(nt_xent(z, z, temperature)) == pytest.approx(expected, rel=1e-5)


def test_gradient_is_that_of_equation_1() -> None:
    z1, z2 = pair(3, 4)
    z1.requires_grad_()
    z2.requires_grad_()
    nt_xent(z1, z2, 0.5).backward()  # type: ignore[no-untyped-call]
    both = np.stack([z1.detach().double().numpy(), z2.detach().double().numpy()])

    def loss_at(both: NDArray[Any]) -> float:
        return equation_1(both[0], both[1], 0.5)

    expected = np.zeros_like(both)
    for position in np.ndindex(both.shape):
        step = np.zeros_like(both)
        step[position] = 1e-5
        expected[position] = (loss_at(both + step) - loss_at(both - step)) / 2e-5
    assert z1.grad is not None
    assert z2.grad is not None
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(np.stack([z1.grad.numpy(), z2.grad.numpy()]), expected, atol=2e-6)


def test_order_of_the_pictures_does_not_matter_and_pairing_does() -> None:
    z1, z2 = pair(9, 6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    expected = float(nt_xent(z1, z2, 0.3))
    assert float(nt_xent(z1[order], z2[order], 0.3)) == pytest.approx(expected, rel=1e-5)
    assert float(nt_xent(z2, z1, 0.3)) == pytest.approx(expected, rel=1e-5)
    assert float(nt_xent(z1, z2.roll(1, 0), 0.3)) > expected + 0.1


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e15])
def test_length_of_the_embeddings_does_not_matter(scale: float) -> None:
    z1, z2 = pair(8, 16)
    lengths = 0.5 + torch.rand(8, 1, generator=torch.Generator().manual_seed(0))
    expected = float(nt_xent(z1, z2, 0.2))
    assert float(nt_xent(z1 * scale * lengths, z2 * scale, 0.2)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32_whatever_comes_in(dtype: torch.dtype, scale: float, autocast: bool) -> None:
    z1, z2 = ((scale * z).to(dtype) for z in pair(8, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = nt_xent(z1, z2, 0.2)
    assert loss.dtype == torch.float32
    expected = equation_1(z1.double().numpy(), z2.double().numpy(), 0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e37])
def test_stays_finite_with_its_gradient_at_the_ends_of_float32(scale: float) -> None:
    z1, z2 = (z * scale for z in pair(8, 16))
    z1.requires_grad_()
    loss = nt_xent(z1, z2, 0.01)
    loss.backward()  # type: ignore[no-untyped-call]
    assert z1.grad is not None
    assert bool(loss.isfinite())
    assert bool(z1.grad.isfinite().all())


def test_argmax_of_a_label_mask_finds_the_masked_diagonal_and_ours_does_not() -> None:
    """The first well-known wrong form: of the two marks in a row of the mask, argmax takes the first one."""

    def theirs(z1: Tensor, z2: Tensor) -> float:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        labels = torch.arange(len(z1)).repeat(2)
        same = (labels[:, None] == labels[None, :]).float()  # (2N, 2N), the diagonal marked too
        similarity = (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e15)
        return float(F.cross_entropy(similarity, same.argmax(1)))

    good, poor = (torch.eye(8), torch.eye(8)), (torch.eye(8), torch.eye(8).roll(1, 0))
    assert theirs(*good) == pytest.approx(0.5e15, rel=1e-3)  # the upper half of the rows, at 1e15 each
    assert theirs(*good) == theirs(*poor)
    assert float(nt_xent(*good, 0.5)) < float(nt_xent(*poor, 0.5)) - 1


def test_log_sigmoid_of_all_similarities_rewards_collapse_and_ours_does_not() -> None:
    """The second: every pair, positive or negative, is pulled together."""

    def theirs(z1: Tensor, z2: Tensor) -> float:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        return float(F.logsigmoid(-(z @ z.T)).mean())

    apart, collapsed = (torch.eye(8), torch.eye(8)), (torch.ones(8, 8), torch.ones(8, 8))
    assert theirs(*collapsed) < theirs(*apart)
    assert float(nt_xent(*collapsed, 0.5)) > float(nt_xent(*apart, 0.5)) + 0.5
