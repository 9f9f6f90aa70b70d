"""Every loss against its paper's equation in plain NumPy loops, closed forms, peer libraries, and known wrong forms."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity
from lightly.loss import NTXentLoss as LightlyNTXentLoss
from lightly.loss import VICRegLoss as LightlyVICRegLoss
from numpy.typing import NDArray
from pytorch_metric_learning.losses import ContrastiveLoss, NTXentLoss, SupConLoss, TripletMarginLoss, VICRegLoss
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import DoNothingReducer, MeanReducer
from torch import Tensor
from torch.nn import functional as F

from training.losses import (
    Mining,
    barlow_twins,
    clip,
    dino,
    info_nce,
    margin_contrast,
    negative_cosine,
    nt_xent,
    siglip,
    sinkhorn_center,
    supcon,
    triplet,
    vicreg,
)

Array = NDArray[Any]

SIZES = [(2, 3), (3, 5), (16, 8), (20, 33)]  # N, P


# The papers, one loop a sum.


def cosine(u: Array, v: Array) -> float:
    return float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


def distance(u: Array, v: Array) -> float:
    return float(np.linalg.norm(u / np.linalg.norm(u) - v / np.linalg.norm(v)))


def nt_xent_form(z: Array, temperature: float) -> float:
    """Chen et al., arXiv:2002.05709, equation 1, ℓ(i, j) averaged over all positive pairs (i, j)."""
    views, count = z.shape[:2]
    places = [(v, n) for n in range(count) for v in range(views)]

    def ell(i: tuple[int, int], j: tuple[int, int]) -> float:
        others = sum(math.exp(cosine(z[i], z[k]) / temperature) for k in places if k != i)
        return -math.log(math.exp(cosine(z[i], z[j]) / temperature) / others)

    return float(np.mean([ell(i, j) for i in places for j in places if i != j and i[1] == j[1]]))


def supcon_form(z: Array, labels: list[int], temperature: float) -> float:
    """Khosla et al., arXiv:2004.11362, equation 2, the mean over the anchors i with |P(i)| > 0 instead of the sum."""
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        below = sum(math.exp(cosine(z[i], z[a]) / temperature) for a in others)
        if positives:
            above = [math.exp(cosine(z[i], z[p]) / temperature) for p in positives]
            losses.append(-sum(math.log(one / below) for one in above) / len(positives))
    return float(np.mean(losses)) if losses else 0.0


def info_nce_form(q: Array, k: Array, negatives: Array, temperature: float, allowed: Array | None = None) -> float:
    """He et al., arXiv:1911.05722, equation 1."""
    losses = []
    for n in range(len(q)):
        above = below = math.exp(cosine(q[n], k[n]) / temperature)
        for m in range(len(negatives)):
            if allowed is None or allowed[n, m]:
                below += math.exp(cosine(q[n], negatives[m]) / temperature)
        losses.append(-math.log(above / below))
    return float(np.mean(losses))


def negative_cosine_form(p: Array, z: Array) -> float:
    """Chen and He, arXiv:2011.10566, equation 1."""
    return float(np.mean([-cosine(p[n], z[n]) for n in range(len(p))]))


def dino_form(student: Array, teacher: Array, center: Array, of_student: float, of_teacher: float) -> float:
    """Caron et al., arXiv:2104.14294, equation 3 with the softmax of equation 1 and the centre of algorithm 1."""

    def softmax(outputs: Array, temperature: float) -> list[float]:
        powers = [math.exp(output / temperature) for output in outputs]
        return [power / sum(powers) for power in powers]

    losses = []
    for t in range(len(teacher)):
        for s in range(len(student)):
            for n in range(student.shape[1]):
                p_t, p_s = softmax(teacher[t, n] - center, of_teacher), softmax(student[s, n], of_student)
                if s != t:
                    losses.append(-sum(p_t[k] * math.log(p_s[k]) for k in range(len(center))))
    return float(np.mean(losses))


def barlow_twins_form(z_a: Array, z_b: Array, lambd: float) -> float:
    """Zbontar et al., arXiv:2103.03230, equations 1 and 2; no ε in the paper, 1e-5 of the variance in its code."""
    loss = 0.0
    for i in range(z_a.shape[1]):
        for j in range(z_a.shape[1]):
            a, b = z_a[:, i] - z_a[:, i].mean(), z_b[:, j] - z_b[:, j].mean()
            c = float((a * b).sum() / (math.sqrt((a * a).sum()) * math.sqrt((b * b).sum())))
            loss += (1 - c) ** 2 if i == j else lambd * c**2
    return loss


def vicreg_form(z_a: Array, z_b: Array, lambd: float, mu: float, nu: float) -> float:
    """Bardes et al., arXiv:2105.04906, equations 1 to 6, with the halves and means of the authors' code."""
    count, width = z_a.shape
    invariance = sum(float((z_a[n] - z_b[n]) @ (z_a[n] - z_b[n])) for n in range(count)) / (count * width)
    variance, covariance = 0.0, 0.0
    for z in (z_a, z_b):
        for i in range(width):
            of_i = z[:, i] - z[:, i].mean()
            variance += max(0.0, 1 - math.sqrt(float(of_i @ of_i) / (count - 1) + 1e-4)) / width / 2
            for j in range(width):
                of_j = z[:, j] - z[:, j].mean()
                if i != j:
                    covariance += float((of_i @ of_j) / (count - 1)) ** 2 / width
    return float(lambd * invariance + mu * variance + nu * covariance)


def clip_form(images: Array, texts: Array, scale: float, groups: list[int]) -> float:
    """Radford et al., arXiv:2103.00020, figure 3; of several positives Yang et al., arXiv:2204.03610, equation 4."""

    def one_side(queries: Array, others: Array) -> float:
        losses = []
        for n in range(len(queries)):
            powers = [math.exp(scale * cosine(queries[n], others[m])) for m in range(len(others))]
            positives = [m for m in range(len(others)) if groups[m] == groups[n]]
            losses.append(-sum(math.log(powers[m] / sum(powers)) for m in positives) / len(positives))
        return float(np.mean(losses))

    return (one_side(images, texts) + one_side(texts, images)) / 2


def siglip_form(images: Array, texts: Array, scale: float, bias: float, groups: list[int]) -> float:
    """Zhai et al., arXiv:2303.15343, equation 1."""
    loss = 0.0
    for i in range(len(images)):
        for j in range(len(texts)):
            z = 1 if groups[i] == groups[j] else -1
            loss -= math.log(1 / (1 + math.exp(z * (-scale * cosine(images[i], texts[j]) - bias))))
    return loss / len(images)


def triplet_form(z: Array, labels: list[int], margin: float, mining: Mining) -> float:
    """Hermans et al., arXiv:1703.07737, equation 5, or Schroff et al., arXiv:1503.03832, section 3.2."""
    losses = []
    for a in range(len(z)):
        positives = [distance(z[a], z[p]) for p in range(len(z)) if p != a and labels[p] == labels[a]]
        negatives = [distance(z[a], z[n]) for n in range(len(z)) if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        if mining == "hard":
            losses.append(max(0.0, max(positives) - min(negatives) + margin))
        else:
            for positive in positives:
                chosen = min((n for n in negatives if n > positive), default=max(negatives))
                losses.append(max(0.0, positive - chosen + margin))
    return float(np.mean(losses)) if losses else 0.0


def margin_contrast_form(z: Array, labels: list[int], margin: float) -> float:
    """Hadsell et al., 2006, equation 4, like and unlike pairs averaged by themselves."""
    like, unlike = [], []
    for i in range(len(z)):
        for j in range(i):
            d = distance(z[i], z[j])
            if labels[i] == labels[j]:
                like.append(d**2 / 2)
            else:
                unlike.append(max(0.0, margin - d) ** 2 / 2)
    return (float(np.mean(like)) if like else 0.0) + (float(np.mean(unlike)) if unlike else 0.0)


# Each loss and its paper as functions of one array, so that one test covers all of them.


class Case(NamedTuple):
    """A loss on one array z of `shape`, its paper's form on the same, and whether the length of a row matters to it."""

    ours: Callable[[Tensor], Tensor]
    paper: Callable[[Array], float]
    shape: tuple[int, ...]
    scale_free: bool = True


def labels_of(count: int) -> list[int]:
    """Two or three labels in turn; the last row has a label of its own."""
    return [n % (3 if count > 4 else 2) for n in range(count - 1)] + [7]


def allowed_of(queries: int, negatives: int) -> Tensor:
    """About half of the negatives; no negative for the first query, all for the last one."""
    allowed = torch.rand(queries, negatives, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[0], allowed[-1] = False, True
    return allowed


def case(name: str, count: int, width: int) -> Case:
    rows = (2 * count, width)
    labels, numbers = labels_of(2 * count), torch.tensor(labels_of(2 * count))
    allowed = allowed_of(count, 2 * count)
    target = spread((count, width), seed=9)
    teacher, center = spread((2, count, width), seed=9), 0.1 * noise(width, seed=8)
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    alone, alike = torch.arange(count), torch.arange(count) // 2
    cases = {
        "clip": lambda: Case(
            lambda z: clip(z[0], z[1], scale, alone),
            lambda z: clip_form(z[0], z[1], 5.0, alone.tolist()),
            (2, count, width),
        ),
        "clip in groups": lambda: Case(
            lambda z: clip(z[0], z[1], scale, alike),
            lambda z: clip_form(z[0], z[1], 5.0, alike.tolist()),
            (2, count, width),
        ),
        "siglip": lambda: Case(
            lambda z: siglip(z[0], z[1], scale, bias, alone),
            lambda z: siglip_form(z[0], z[1], 5.0, -2.0, alone.tolist()),
            (2, count, width),
        ),
        "siglip in groups": lambda: Case(
            lambda z: siglip(z[0], z[1], scale, bias, alike),
            lambda z: siglip_form(z[0], z[1], 5.0, -2.0, alike.tolist()),
            (2, count, width),
        ),
        "nt_xent of 2 views": lambda: Case(
            lambda z: nt_xent(z, 0.5), lambda z: nt_xent_form(z, 0.5), (2, count, width)
        ),
        "nt_xent of 4 views": lambda: Case(
            lambda z: nt_xent(z, 0.2), lambda z: nt_xent_form(z, 0.2), (4, count, width)
        ),
        "supcon": lambda: Case(lambda z: supcon(z, numbers, 0.1), lambda z: supcon_form(z, labels, 0.1), rows),
        "info_nce": lambda: Case(
            lambda z: info_nce(z[0], z[1], z[2:].flatten(0, 1), 0.2),
            lambda z: info_nce_form(z[0], z[1], z[2:].reshape(-1, width), 0.2),
            (4, count, width),
        ),
        "info_nce of some negatives": lambda: Case(
            lambda z: info_nce(z[0], z[1], z[2:].flatten(0, 1), 0.2, allowed),
            lambda z: info_nce_form(z[0], z[1], z[2:].reshape(-1, width), 0.2, allowed.numpy()),
            (4, count, width),
        ),
        "negative_cosine": lambda: Case(
            lambda p: negative_cosine(p, target),
            lambda p: negative_cosine_form(p, target.double().numpy()),
            (count, width),
        ),
        "dino": lambda: Case(
            lambda z: dino(z, teacher, center, 0.5, 0.3),
            lambda z: dino_form(z, teacher.double().numpy(), center.double().numpy(), 0.5, 0.3),
            (5, count, width),
            scale_free=False,
        ),
        "barlow_twins": lambda: Case(
            lambda z: barlow_twins(z[0], z[1], 0.05),
            lambda z: barlow_twins_form(z[0], z[1], 0.05),
            (2, count, width),
            scale_free=False,
        ),
        "vicreg": lambda: Case(
            lambda z: vicreg(z[0], z[1], 25.0, 15.0, 1.5),
            lambda z: vicreg_form(z[0], z[1], 25.0, 15.0, 1.5),
            (2, count, width),
            scale_free=False,
        ),
        "triplet, hard": lambda: Case(
            lambda z: triplet(z, numbers, 0.5, "hard"), lambda z: triplet_form(z, labels, 0.5, "hard"), rows
        ),
        "triplet, semi-hard": lambda: Case(
            lambda z: triplet(z, numbers, 0.5, "semi-hard"), lambda z: triplet_form(z, labels, 0.5, "semi-hard"), rows
        ),
        "margin_contrast": lambda: Case(
            lambda z: margin_contrast(z, numbers, 1.2), lambda z: margin_contrast_form(z, labels, 1.2), rows
        ),
    }
    return cases[name]()


CASES = (
    "nt_xent of 2 views",
    "nt_xent of 4 views",
    "supcon",
    "info_nce",
    "info_nce of some negatives",
    "negative_cosine",
    "dino",
    "barlow_twins",
    "vicreg",
    "triplet, hard",
    "triplet, semi-hard",
    "margin_contrast",
    "clip",
    "clip in groups",
    "siglip",
    "siglip in groups",
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Rows that are related but not alike, like a picture's views after some training."""
    return noise(*shape[-2:], seed=seed) + 0.5 * noise(*shape, seed=seed + 1)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return loss_and_gradient(loss, z)[1]


def loss_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(leaf)
    # As in the loop, this is outside of autocast.
    backward(value)
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def central_differences(form: Callable[[Array], float], z: Array, step: float = 1e-5) -> Array:
    slopes = np.zeros_like(z)
    for place in np.ndindex(z.shape):
        nudge = np.zeros_like(z)
        nudge[place] = step
        slopes[place] = (form(z + nudge) - form(z - nudge)) / (2 * step)
    return slopes


@pytest.mark.parametrize(("count", "width"), SIZES)
@pytest.mark.parametrize("name", CASES)
def test_each_loss_is_its_papers_equation(name: str, count: int, width: int) -> None:
    ours, paper, shape, _ = case(name, count, width)
    z = spread(shape)
    expected = paper(z.double().numpy())
    assert expected != 0
    # Barlow Twins: its ε, absent from the paper.
    assert float(ours(z)) == pytest.approx(expected, rel=2e-4 if name == "barlow_twins" else 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_is_that_of_its_papers_equation(name: str) -> None:
    ours, paper, shape, _ = case(name, 3, 3)
    z = spread(shape, seed=3)
    expected = central_differences(paper, z.double().numpy())
    largest = float(np.abs(expected).max())
    assert largest > 0.01
    np.testing.assert_allclose(gradient(ours, z).numpy(), expected, atol=2e-4 * largest)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e15])
@pytest.mark.parametrize("name", [name for name in CASES if case(name, 2, 2).scale_free])
def test_length_of_the_embeddings_does_not_matter(name: str, scale: float) -> None:
    ours, _, shape, _ = case(name, 8, 16)
    z = spread(shape)
    lengths = 0.5 + torch.rand(*shape[:-1], 1, generator=torch.Generator().manual_seed(0))
    assert float(ours(z * scale * lengths)) == pytest.approx(float(ours(z)), rel=1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_each_loss_computes_in_float32_whatever_comes_in(
    name: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    ours, paper, shape, _ = case(name, 8, 16)
    z = spread(shape).to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = ours(z)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert torch.equal(loss, ours(z.float()))
    assert float(loss) == pytest.approx(paper(z.double().numpy()), rel=2e-4 if name == "barlow_twins" else 2e-5)


# These are the limits of float16.
LARGEST, SMALLEST = 65504.0, 6e-8


def extreme(kind: str, shape: tuple[int, ...]) -> Tensor:
    signs = noise(*shape).sign()
    # Each kind has a row in turn, and so has an ordinary one.
    if kind == "mixed":
        kinds = torch.tensor([LARGEST, 0.0, SMALLEST, 1.0])
        return signs * kinds[torch.arange(math.prod(shape[:-1])) % 4].reshape(*shape[:-1], 1)
    return signs * {"largest": LARGEST, "smallest": SMALLEST, "zeros": 0.0}[kind]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["largest", "smallest", "zeros", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_each_loss_and_gradient_is_finite_at_the_ends_of_float16(name: str, kind: str, dtype: torch.dtype) -> None:
    ours, _, shape, _ = case(name, 6, 8)
    z = extreme(kind, shape).to(dtype)
    loss, slope = loss_and_gradient(ours, z, autocast=True)
    assert bool(loss.isfinite())
    # float16 cannot hold the slope of a normalised row of 6e-8, nor VICReg's at 65504. There the slope of float32 is
    # rounded to infinity, and only there.
    assert torch.equal(slope, gradient(ours, z.float()).to(dtype))
    assert dtype == torch.float16 or bool(slope.isfinite().all())
    assert not bool(slope.isnan().any())


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e37])
@pytest.mark.parametrize("name", [name for name in CASES if case(name, 2, 2).scale_free])
def test_each_normalised_loss_is_finite_at_the_ends_of_float32(name: str, scale: float) -> None:
    ours, _, shape, _ = case(name, 8, 16)
    z = spread(shape) * scale
    assert bool(ours(z).isfinite())
    assert bool(gradient(ours, z).isfinite().all())


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_is_finite_where_all_embeddings_are_one(name: str) -> None:
    ours, _, shape, _ = case(name, 6, 8)
    assert bool(gradient(ours, torch.ones(shape)).isfinite().all())


# Closed forms.


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 2]])
def test_identical_embeddings_cost_clip_the_log_of_the_batch(groups: list[int]) -> None:
    ones = torch.ones(6, 8)
    assert float(clip(ones, ones, torch.tensor(7.0), torch.tensor(groups))) == pytest.approx(math.log(6), rel=1e-6)


def test_perfect_pairs_cost_clip_what_is_left_of_the_softmax() -> None:
    axes = torch.eye(6)
    expected = math.log(1 + 5 * math.exp(-3))
    assert float(clip(axes, axes, torch.tensor(3.0), torch.arange(6))) == pytest.approx(expected, rel=1e-5)


def test_texts_that_say_the_same_cost_clip_no_more_than_the_log_of_their_number() -> None:
    """As negatives of one another they would cost the log of their number and keep pulling apart what is alike."""
    axes, groups = torch.eye(3).repeat_interleave(2, 0), torch.arange(3).repeat_interleave(2)
    expected = math.log(2) + math.log(1 + 2 * math.exp(-20.0))
    assert float(clip(axes, axes, torch.tensor(20.0), groups)) == pytest.approx(expected, rel=1e-5)
    slope = gradient(lambda z: clip(z, axes, torch.tensor(20.0), groups), axes)
    assert float(slope.abs().max()) < 1e-6


def test_identical_embeddings_cost_siglip_its_sigmoids() -> None:
    ones, bias = torch.ones(6, 8), -4.0
    log_sigmoid = [-math.log(1 + math.exp(-logit)) for logit in (7 + bias, -(7 + bias))]
    expected = -log_sigmoid[0] - 5 * log_sigmoid[1]
    assert float(siglip(ones, ones, torch.tensor(7.0), torch.tensor(bias), torch.arange(6))) == pytest.approx(expected)


@pytest.mark.parametrize("learnt", ["scale", "bias"])
def test_temperature_and_bias_have_the_gradient_of_their_equation(learnt: str) -> None:
    z, groups = spread((2, 5, 8)), torch.tensor([0, 1, 1, 2, 3])
    scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    images, texts = z.double().numpy()
    names = groups.tolist()

    def at(nudge: float) -> float:
        by_scale, by_bias = (nudge, 0.0) if learnt == "scale" else (0.0, nudge)
        return siglip_form(images, texts, 5.0 + by_scale, -2.0 + by_bias, names)

    backward(siglip(z[0], z[1], scale, bias, groups))
    slope = scale.grad if learnt == "scale" else bias.grad
    assert slope is not None
    assert float(slope) == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-3)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_clip_is_transformers(count: int, width: int) -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts = F.normalize(spread((2, count, width)), dim=2)
    expected = image_text_contrastive_loss(9.0 * texts @ images.T)
    assert float(clip(images, texts, torch.tensor(9.0), torch.arange(count))) == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_siglip_is_transformers(count: int, width: int) -> None:
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": width * 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    config = SiglipConfig(
        text_config=small | {"vocab_size": 80, "max_position_embeddings": 8},
        vision_config=small | {"image_size": 8, "patch_size": 4},
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    model.logit_scale.data.fill_(math.log(6.0))
    model.logit_bias.data.fill_(-3.0)
    with torch.no_grad():
        given = {"input_ids": torch.randint(0, 80, (count, 8)), "pixel_values": torch.randn(count, 3, 8, 8)}
        found = model(**given, return_loss=True)
    ours = siglip(found.image_embeds, found.text_embeds, torch.tensor(6.0), torch.tensor(-3.0), torch.arange(count))
    assert float(ours) == pytest.approx(float(found.loss), rel=1e-4)


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("count", [2, 7, 64])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_identical_embeddings_cost_nt_xent_the_log_of_the_other_views(
    views: int, count: int, temperature: float
) -> None:
    loss = nt_xent(torch.ones(views, count, 5), temperature)
    assert float(loss) == pytest.approx(math.log(views * count - 1), rel=1e-5)


@pytest.mark.parametrize("views", [2, 3])
def test_perfect_embeddings_cost_nt_xent_what_is_left_of_the_softmax(views: int) -> None:
    count, temperature = 6, 0.5
    # Positives have cosine 1, negatives cosine 0.
    z = torch.eye(count).expand(views, -1, -1)
    expected = math.log(views - 1 + (views * count - views) * math.exp(-1 / temperature))
    assert float(nt_xent(z, temperature)) == pytest.approx(expected, rel=1e-5)


def test_identical_embeddings_cost_supcon_the_log_of_the_other_rows() -> None:
    assert float(supcon(torch.ones(9, 4), torch.tensor(labels_of(9)), 0.1)) == pytest.approx(math.log(8), rel=1e-5)


def test_perfect_embeddings_cost_supcon_the_log_of_the_positives() -> None:
    labels = torch.arange(4).repeat(5)
    assert float(supcon(F.one_hot(labels).float(), labels, 0.05)) == pytest.approx(math.log(4), abs=1e-5)


def test_identical_embeddings_cost_info_nce_the_log_of_all_it_chooses_from() -> None:
    q, negatives = torch.ones(5, 4), torch.ones(12, 4)
    assert float(info_nce(q, q, negatives, 0.3)) == pytest.approx(math.log(13), rel=1e-5)
    allowed = torch.zeros(5, 12, dtype=torch.bool)
    allowed[:, 3:7] = True
    assert float(info_nce(q, q, negatives, 0.3, allowed)) == pytest.approx(math.log(5), rel=1e-5)


def test_info_nce_without_a_single_negative_costs_nothing() -> None:
    q, k, negatives = noise(5, 4), noise(5, 4, seed=1), noise(6, 4, seed=2)
    nothing = torch.zeros(5, 6, dtype=torch.bool)
    assert float(info_nce(q, k, negatives, 0.1, nothing)) == 0
    assert not bool(gradient(lambda q: info_nce(q, k, negatives, 0.1, nothing), q).any())


@pytest.mark.parametrize(("sign", "expected"), [(1, -1), (-1, 1)])
def test_negative_cosine_of_equal_rows_is_minus_1_and_of_opposite_rows_1(sign: int, expected: int) -> None:
    p = noise(6, 5)
    assert float(negative_cosine(p, 3 * sign * p)) == pytest.approx(expected, abs=1e-6)


def test_no_gradient_flows_into_the_target_of_negative_cosine() -> None:
    p, z = noise(6, 5).requires_grad_(), noise(6, 5, seed=1).requires_grad_()
    backward(negative_cosine(p, z))
    assert p.grad is not None
    assert z.grad is None


@pytest.mark.parametrize("views", [2, 6])
def test_identical_outputs_cost_dino_the_log_of_the_prototypes(views: int) -> None:
    loss = dino(torch.ones(views, 5, 32), torch.ones(2, 5, 32), torch.zeros(32), 0.1, 0.04)
    assert float(loss) == pytest.approx(math.log(32), rel=1e-5)


def test_a_centre_equal_to_the_teachers_outputs_costs_dino_as_much() -> None:
    teacher = noise(32).expand(2, 5, 32)
    assert float(dino(torch.ones(4, 5, 32), teacher, teacher[0, 0], 0.1, 0.04)) == pytest.approx(math.log(32), rel=1e-5)


def test_a_student_as_sharp_as_its_teacher_costs_dino_the_entropy() -> None:
    outputs = noise(5, 16)
    p = (outputs / 0.3).softmax(1)
    expected = float(-(p * p.log()).sum(1).mean())
    assert float(dino(outputs.expand(4, 5, 16), outputs.expand(2, 5, 16), torch.zeros(16), 0.3, 0.3)) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_view_alone_with_its_own_teacher_costs_dino_nothing() -> None:
    student, teacher = noise(3, 5, 16), noise(2, 5, 16, seed=1)
    slope = gradient(lambda z: dino(z, teacher[:1], torch.zeros(16), 0.1, 0.04), student)
    # The only teacher is the first view.
    assert not bool(slope[0].any())
    assert bool(slope[1:].any())


def test_no_gradient_flows_into_dinos_teacher() -> None:
    student, teacher = noise(3, 5, 16).requires_grad_(), noise(2, 5, 16, seed=1).requires_grad_()
    backward(dino(student, teacher, torch.zeros(16), 0.1, 0.04))
    assert student.grad is not None
    assert teacher.grad is None


def test_sinkhorns_centre_is_the_loop_of_alternating_normalisations() -> None:
    outputs, temperature = noise(7, 5), 0.3
    p = np.exp(outputs.double().numpy() / temperature)
    for _ in range(3):
        for m in range(7):
            p[m] /= sum(p[m])
        for k in range(5):
            p[:, k] /= sum(p[:, k]) * 5 / 7
    for m in range(7):
        p[m] /= sum(p[m])
    softmax = ((outputs - sinkhorn_center(outputs, temperature, 3)) / temperature).softmax(1)
    np.testing.assert_allclose(softmax.numpy(), p, rtol=1e-4)


def test_sinkhorns_centre_uses_all_prototypes_equally_where_the_teacher_prefers_one() -> None:
    outputs = noise(64, 8) + 3 * torch.eye(8)[0]
    softmax = ((outputs - sinkhorn_center(outputs, 0.3, 100)) / 0.3).softmax(1)
    assert softmax.sum(0).tolist() == pytest.approx([8.0] * 8, rel=1e-3)
    same = torch.ones(6, 4) * torch.arange(4.0)
    assert ((same - sinkhorn_center(same, 0.1)) / 0.1).softmax(1).flatten().tolist() == pytest.approx([0.25] * 24)


def orthogonal_columns() -> Tensor:
    """(8, 4): ±1, columns of mean 0, variance 1 and no correlation: a Hadamard matrix without its constant column."""
    h = torch.ones(1, 1)
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h[:, 1:5]


def test_barlow_twins_costs_nothing_where_views_agree_and_columns_do_not() -> None:
    z = orthogonal_columns()
    # The loss is 4·ε².
    assert float(barlow_twins(z, z, 1.0)) == pytest.approx(0, abs=1e-8)
    # Each view is scaled by itself.
    assert float(barlow_twins(z, 100 * z + 5, 1.0)) == pytest.approx(0, abs=1e-8)
    # Each column costs (1 − −1)².
    assert float(barlow_twins(z, -z, 1.0)) == pytest.approx(4 * 4, rel=1e-4)


def test_barlow_twins_counts_each_pair_of_identical_columns_by_its_weight() -> None:
    z = noise(32, 1).expand(-1, 5)
    assert float(barlow_twins(z, z, 0.01)) == pytest.approx(5 * 4 * 0.01, rel=1e-4)


def test_constant_rows_cost_vicreg_the_whole_hinge() -> None:
    z = torch.full((6, 5), 3.0)
    assert float(vicreg(z, z, 25.0, 10.0, 1.0)) == pytest.approx(10 * (1 - math.sqrt(1e-4)), rel=1e-5)


def test_vicreg_costs_nothing_where_views_agree_and_columns_vary_alone() -> None:
    z = 2 * orthogonal_columns()
    assert float(vicreg(z, z, 25.0, 25.0, 1.0)) == 0
    assert float(vicreg(z, z + 0.5, 25.0, 25.0, 1.0)) == pytest.approx(25 * 0.25, rel=1e-5)


@pytest.mark.parametrize("mining", ["hard", "semi-hard"])
def test_identical_embeddings_cost_triplet_its_margin(mining: Mining) -> None:
    z, labels = torch.ones(8, 4), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert float(triplet(z, labels, 0.35, mining)) == pytest.approx(0.35, rel=1e-4)


@pytest.mark.parametrize("mining", ["hard", "semi-hard"])
def test_embeddings_apart_by_more_than_the_margin_cost_triplet_nothing(mining: Mining) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    # Like rows have distance 0, unlike ones √2.
    z = F.one_hot(labels).float()
    assert float(triplet(z, labels, 1.4, mining)) == 0
    assert float(triplet(z, labels, 1.5, mining)) == pytest.approx(1.5 - math.sqrt(2), abs=2e-4)


def test_hard_mining_takes_the_farthest_positive_and_the_nearest_negative() -> None:
    angles = torch.tensor([0.0, 0.3, 0.9, 0.5, 2.0]).double()
    z, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 0, 1, 2])

    def chord(i: int, j: int) -> float:
        return 2 * math.sin(abs(float(angles[i] - angles[j])) / 2)

    expected = (chord(0, 2) - chord(0, 3) + chord(1, 2) - chord(1, 3) + chord(2, 0) - chord(2, 3)) / 3 + 0.1
    assert float(triplet(z, labels, 0.1, "hard")) == pytest.approx(expected, rel=1e-5)


def test_semi_hard_mining_takes_the_nearest_negative_beyond_the_positive_or_else_the_farthest() -> None:
    angles = torch.tensor([0.0, 0.5, -0.2, -0.6, -0.9]).double()
    z, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 2, 3])

    def chord(i: int, j: int) -> float:
        return 2 * math.sin(abs(float(angles[i] - angles[j])) / 2)

    # Row 2 lies nearer than the positive, row 3 just beyond it.
    first = chord(0, 1) - chord(0, 3) + 1
    second = chord(1, 0) - chord(1, 2) + 1
    assert float(triplet(z, labels, 1.0, "semi-hard")) == pytest.approx((first + second) / 2, rel=1e-5)
    near = z[[0, 1, 2]], labels[[0, 1, 2]]
    # No negative lies beyond the positive.
    third = chord(0, 1) - chord(0, 2) + 1
    assert float(triplet(*near, 1.0, "semi-hard")) == pytest.approx((third + second) / 2, rel=1e-5)


def test_identical_embeddings_cost_margin_contrast_half_of_the_margin_squared() -> None:
    z, labels = torch.ones(8, 4), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert float(margin_contrast(z, labels, 0.8)) == pytest.approx(0.8**2 / 2, rel=1e-3)


def test_opposite_rows_of_one_label_cost_margin_contrast_half_of_four() -> None:
    z, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    # Unlike rows are at √2 > 1 and cost nothing.
    assert float(margin_contrast(z, labels, 1.0)) == pytest.approx(2, rel=1e-5)


# Peers, in float64, their conventions turned into ours.


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(("count", "width"), SIZES)
def test_nt_xent_of_two_views_is_lightlys_and_metric_learnings(count: int, width: int, temperature: float) -> None:
    z = spread((2, count, width), seed=1).double()
    loss = float(nt_xent(z, temperature))
    assert loss == pytest.approx(float(LightlyNTXentLoss(temperature)(z[0], z[1])), rel=2e-5)
    labels = torch.arange(count).repeat(2)
    assert loss == pytest.approx(float(NTXentLoss(temperature)(z.flatten(0, 1), labels)), rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_nt_xent_of_four_views_is_metric_learnings_supcon_by_picture(count: int, width: int) -> None:
    # The peer's NTXentLoss leaves other positives out of a positive's denominator; its SupConLoss keeps them, as we do.
    z = spread((4, count, width), seed=1).double()
    labels = torch.arange(count).repeat(4)
    expected = float(SupConLoss(0.2)(z.flatten(0, 1), labels))
    assert float(nt_xent(z, 0.2)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_supcon_is_metric_learnings(count: int, width: int) -> None:
    # The peer averages the losses above 0: an anchor without positives has 0 there, and no other anchor has.
    z, labels = spread((2 * count, width), seed=1).double(), torch.tensor(labels_of(2 * count))
    assert float(supcon(z, labels, 0.1)) == pytest.approx(float(SupConLoss(0.1)(z, labels)), rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_info_nce_against_a_queue_is_lightlys_with_a_memory_bank(count: int, width: int) -> None:
    q, k = spread((2, count, width), seed=1)
    peer = LightlyNTXentLoss(0.2, memory_bank_size=(37, width))
    # Since q has no gradient, the bank stays as it is.
    expected = float(peer(q, k))
    assert float(info_nce(q, k, peer.memory_bank.bank, 0.2)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_negative_cosine_is_lightlys(count: int, width: int) -> None:
    p, z = spread((2, count, width), seed=1)
    assert float(negative_cosine(p, z)) == pytest.approx(float(NegativeCosineSimilarity()(p, z)), rel=1e-6)


@pytest.mark.parametrize("views", [2, 3, 8])
@pytest.mark.parametrize(("count", "width"), SIZES)
def test_dino_is_lightlys(count: int, width: int, views: int) -> None:
    student, teacher = spread((views, count, width), seed=1).double(), spread((2, count, width), seed=3).double()
    peer = DINOLoss(width, teacher_temp=0.3, student_temp=0.5)
    # Two steps: in the second one the peer has a centre.
    for _ in range(2):
        center = peer.center.flatten().float()
        expected = float(peer(list(teacher), list(student)))
        assert float(dino(student, teacher, center, 0.5, 0.3)) == pytest.approx(expected, rel=2e-5)
    assert bool(center.any())


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_barlow_twins_is_lightlys(count: int, width: int) -> None:
    a, b = spread((2, count, width), seed=1).double()
    assert float(barlow_twins(a, b, 0.02)) == pytest.approx(float(BarlowTwinsLoss(0.02)(a, b)), rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_vicreg_is_lightlys_and_metric_learnings(count: int, width: int) -> None:
    a, b = spread((2, count, width), seed=1).double()
    loss = float(vicreg(a, b, 25.0, 15.0, 1.5))
    assert loss == pytest.approx(float(LightlyVICRegLoss(25.0, 15.0, 1.5)(a, b)), rel=2e-5)
    assert loss == pytest.approx(float(VICRegLoss(25.0, 15.0, 1.5)(a, ref_emb=b)), rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_hard_triplets_are_metric_learnings(count: int, width: int) -> None:
    # By default the peer averages only the losses above 0.
    z, labels = spread((2 * count, width), seed=1).double(), torch.tensor(labels_of(2 * count))
    peer = TripletMarginLoss(margin=0.4, reducer=MeanReducer())
    expected = float(peer(z, labels, BatchHardMiner()(z, labels)))
    assert float(triplet(z, labels, 0.4, "hard")) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_semi_hard_triplets_are_metric_learnings(count: int, width: int) -> None:
    # The peer keeps all semi-hard triplets of a pair within a margin, here 10. Ours is the nearest of them; a pair
    # without any has the easiest of its hard ones.
    z, labels = spread((2 * count, width), seed=1).double(), torch.tensor(labels_of(2 * count))
    apart = torch.cdist(F.normalize(z, dim=1), F.normalize(z, dim=1))
    chosen: dict[tuple[int, int], int] = {}
    for kind, better in (("semihard", min), ("hard", max)):
        found: dict[tuple[int, int], list[int]] = {}
        mined = TripletMarginMiner(margin=10, type_of_triplets=kind)(z, labels)
        for a, p, n in torch.stack(mined, 1).tolist():
            found.setdefault((a, p), []).append(n)
        for (a, p), negatives in found.items():
            chosen.setdefault((a, p), better(negatives, key=lambda n, a=a: float(apart[a, n])))  # type: ignore[misc]
    triplets = torch.tensor([(a, p, n) for (a, p), n in chosen.items()]).unbind(1)
    expected = float(TripletMarginLoss(margin=0.4, reducer=MeanReducer())(z, labels, triplets))
    assert float(triplet(z, labels, 0.4, "semi-hard")) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_margin_contrast_is_half_of_metric_learnings_hinges_squared(count: int, width: int) -> None:
    # The peer sums d and max(0, m − d), not their squares.
    z, labels = spread((2 * count, width), seed=1).double(), torch.tensor(labels_of(2 * count))
    found = ContrastiveLoss(pos_margin=0, neg_margin=1.2, reducer=DoNothingReducer())(z, labels)
    expected = sum(float(found[kind]["losses"].square().mean()) for kind in ("pos_loss", "neg_loss")) / 2
    assert float(margin_contrast(z, labels, 1.2)) == pytest.approx(expected, rel=2e-5)


# Symmetries of the losses.

# These have a partner beside z, which has to move along.
PARTNERED = ("info_nce", "info_nce of some negatives", "dino", "clip in groups", "siglip in groups")
SYMMETRIC = [name for name in CASES if len(case(name, 2, 2).shape) == 3 and name not in PARTNERED]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_of_the_pictures_does_not_matter_and_pairing_does(name: str) -> None:
    ours, _, shape, _ = case(name, 9, 6)
    z, order = spread(shape), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    expected = float(ours(z))
    assert float(ours(z[:, order])) == pytest.approx(expected, rel=1e-5)
    assert float(ours(torch.cat([z[:1], z[1:].roll(1, 1)]))) > expected * 1.1


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_of_the_views_does_not_matter(name: str) -> None:
    ours, _, shape, _ = case(name, 9, 6)
    z = spread(shape)
    assert float(ours(z.flip(0))) == pytest.approx(float(ours(z)), rel=1e-5)


def test_order_of_pictures_prototypes_and_local_views_does_not_matter_to_dino_and_pairing_does() -> None:
    student, teacher, center = spread((6, 9, 7)), spread((2, 9, 7)), 0.1 * noise(7)
    expected = float(dino(student, teacher, center, 0.5, 0.3))
    generator = torch.Generator().manual_seed(3)
    rows, columns = torch.randperm(9, generator=generator), torch.randperm(7, generator=generator)
    moved = dino(student[:, rows][..., columns], teacher[:, rows][..., columns], center[columns], 0.5, 0.3)
    assert float(moved) == pytest.approx(expected, rel=1e-5)
    views = torch.tensor([1, 0, 5, 3, 2, 4])
    assert float(dino(student[views], teacher.flip(0), center, 0.5, 0.3)) == pytest.approx(expected, rel=1e-5)
    assert float(dino(student, teacher.roll(1, 1), center, 0.5, 0.3)) > expected * 1.1


def test_order_of_queries_and_of_negatives_does_not_matter_to_info_nce_and_pairing_does() -> None:
    q, k, negatives = spread((3, 9, 6))
    allowed, generator = allowed_of(9, 9), torch.Generator().manual_seed(3)
    rows, columns = torch.randperm(9, generator=generator), torch.randperm(9, generator=generator)
    expected = float(info_nce(q, k, negatives, 0.3, allowed))
    moved = info_nce(q[rows], k[rows], negatives[columns], 0.3, allowed[rows][:, columns])
    assert float(moved) == pytest.approx(expected, rel=1e-5)
    assert float(info_nce(q, k.roll(1, 0), negatives, 0.3, allowed)) > expected + 0.1
    # Without the mask there are more negatives.
    assert float(info_nce(q, k, negatives, 0.3)) > expected + 0.1


LABELLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "supcon": lambda z, labels: supcon(z, labels, 0.2),
    "triplet, hard": lambda z, labels: triplet(z, labels, 0.2, "hard"),
    "triplet, semi-hard": lambda z, labels: triplet(z, labels, 0.2, "semi-hard"),
    "margin_contrast": lambda z, labels: margin_contrast(z, labels, 1.2),
}
FORMS: dict[str, Callable[[Array, list[int]], float]] = {
    "supcon": lambda z, labels: supcon_form(z, labels, 0.2),
    "triplet, hard": lambda z, labels: triplet_form(z, labels, 0.2, "hard"),
    "triplet, semi-hard": lambda z, labels: triplet_form(z, labels, 0.2, "semi-hard"),
    "margin_contrast": lambda z, labels: margin_contrast_form(z, labels, 1.2),
}


@pytest.mark.parametrize("name", LABELLED)
def test_order_of_rows_and_names_of_labels_do_not_matter_and_which_rows_agree_does(name: str) -> None:
    loss, z, labels = LABELLED[name], spread((12, 6)), torch.arange(12) % 4
    # Rows of a label are alike.
    z = z + 2 * noise(4, 6, seed=5)[labels]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    expected = float(loss(z, labels))
    assert float(loss(z[order], labels[order])) == pytest.approx(expected, rel=1e-5)
    assert float(loss(z, torch.tensor([900, -1, 5, 3])[labels])) == pytest.approx(expected, rel=1e-5)
    assert float(loss(z, torch.arange(12) // 3)) > expected + 0.05


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=8), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", LABELLED)
def test_any_labels_give_the_papers_value_and_a_finite_gradient(name: str, labels: list[int], seed: int) -> None:
    z, numbers = spread((len(labels), 4), seed), torch.tensor(labels)
    expected = FORMS[name](z.double().numpy(), labels)
    assert float(LABELLED[name](z, numbers)) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert bool(gradient(lambda z: LABELLED[name](z, numbers), z).isfinite().all())


def test_an_anchor_without_positives_is_left_out_of_supcons_mean_and_stays_a_negative() -> None:
    # The last row has no positive.
    z, labels = spread((7, 5)), torch.tensor([0, 0, 1, 1, 2, 2, 3])
    normalised = F.normalize(z.double(), dim=1)
    logits = (normalised @ normalised.T / 0.2).fill_diagonal_(-torch.inf)
    log_share = logits.log_softmax(1)
    expected = -float(torch.stack([log_share[i, i ^ 1] for i in range(6)]).mean())
    assert float(supcon(z, labels, 0.2)) == pytest.approx(expected, rel=1e-5)
    assert float(supcon(z[:6], labels[:6], 0.2)) < expected - 1e-3
    # The last row is still pushed away as a negative.
    assert bool(gradient(lambda z: supcon(z, labels, 0.2), z)[6].any())


@pytest.mark.parametrize("name", ["supcon", "triplet, hard", "triplet, semi-hard"])
def test_no_two_rows_of_a_label_cost_nothing_with_no_gradient(name: str) -> None:
    z, labels = spread((5, 4)), torch.arange(5)
    assert float(LABELLED[name](z, labels)) == 0
    assert torch.equal(gradient(lambda z: LABELLED[name](z, labels), z), torch.zeros(5, 4))


@pytest.mark.parametrize("mining", ["hard", "semi-hard"])
def test_a_single_label_has_no_triplet(mining: Mining) -> None:
    z, labels = spread((5, 4)), torch.zeros(5, dtype=torch.long)
    assert float(triplet(z, labels, 0.2, mining)) == 0
    assert torch.equal(gradient(lambda z: triplet(z, labels, 0.2, mining), z), torch.zeros(5, 4))


@pytest.mark.parametrize(("labels", "pairs"), [([0, 0, 0, 0], "pulled"), ([0, 1, 2, 3], "pushed")])
def test_margin_contrast_does_with_one_kind_of_pair(labels: list[int], pairs: str) -> None:
    z = spread((4, 4))
    apart = [distance(z[i].double().numpy(), z[j].double().numpy()) for i in range(4) for j in range(i)]
    expected = np.mean([d**2 / 2 if pairs == "pulled" else max(0.0, 1.5 - d) ** 2 / 2 for d in apart])
    assert float(margin_contrast(z, torch.tensor(labels), 1.5)) == pytest.approx(float(expected), rel=1e-5)


# The direction of the gradient.


def descended(loss: Callable[[Tensor], Tensor], z: Tensor, steps: int = 50, rate: float = 0.5) -> Tensor:
    z = F.normalize(z, dim=-1)
    for _ in range(steps):
        z = F.normalize(z - rate * gradient(loss, z), dim=-1)
    return z


def between(z: Tensor, same: Tensor) -> tuple[float, float]:
    """Mean cosine of the positive pairs of rows and of the negative ones."""
    similarity, itself = F.cosine_similarity(z[:, None], z, dim=2), torch.eye(len(z), dtype=torch.bool)
    return float(similarity[same & ~itself].mean()), float(similarity[~same].mean())


PULLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "supcon": lambda z, labels: supcon(z, labels, 0.2),
    "triplet, hard": lambda z, labels: triplet(z, labels, 1.5, "hard"),
    "triplet, semi-hard": lambda z, labels: triplet(z, labels, 1.5, "semi-hard"),
    "margin_contrast": lambda z, labels: margin_contrast(z, labels, 1.5),
    "nt_xent": lambda z, _: nt_xent(z.reshape(2, 8, 8), 0.2),
    "info_nce": lambda z, _: info_nce(z[:8], z[8:], z[8:], 0.2, ~torch.eye(8, dtype=torch.bool)),
    "clip": lambda z, _: clip(z[:8], z[8:], torch.tensor(5.0), torch.arange(8)),
    "siglip": lambda z, _: siglip(z[:8], z[8:], torch.tensor(5.0), torch.tensor(-2.0), torch.arange(8)),
}


@pytest.mark.parametrize("name", PULLING)
def test_descent_draws_together_what_belongs_together_and_drives_the_rest_apart(name: str) -> None:
    labels = torch.arange(8).repeat(2)
    same = labels[:, None] == labels
    # All rows are on one side of the sphere.
    z = 0.7 * torch.ones(16, 8) + noise(16, 8)
    positive, negative = between(z, same)
    later = between(descended(lambda z: PULLING[name](z, labels), z), same)
    assert later[0] > positive + 0.1
    assert later[1] < negative - 0.1


def argmax_of_mask(z: Tensor) -> Tensor:
    """(2N,) losses of the first well-known wrong form. Argmax takes the first of the two marks in a row of the label
    mask, and in the first half of the batch that is the diagonal, which has just been masked."""
    rows = F.normalize(z.flatten(0, 1), dim=1)
    labels = torch.arange(z.shape[1]).repeat(2)
    # The diagonal is marked, too.
    same = (labels[:, None] == labels[None, :]).float()  # (2N, 2N)
    similarity = (rows @ rows.T).masked_fill(torch.eye(len(rows), dtype=torch.bool), -1e15)
    return F.cross_entropy(similarity, same.argmax(1), reduction="none")


def log_sigmoid_of_all(z: Tensor) -> Tensor:
    """The second: log σ(−sim) is minimised, though only −log σ(−sim) would push, and it ignores positives."""
    rows = F.normalize(z.flatten(0, 1), dim=1)
    return F.logsigmoid(-(rows @ rows.T)).mean()


def test_argmax_of_a_label_mask_finds_the_masked_diagonal_and_ours_does_not() -> None:
    good, poor = torch.eye(8).expand(2, -1, -1), torch.stack([torch.eye(8), torch.eye(8).roll(1, 0)])
    # Only the upper half of the rows hits the diagonal.
    assert float(argmax_of_mask(good).mean()) == pytest.approx(0.5e15, rel=1e-3)
    assert float(argmax_of_mask(good).mean()) == float(argmax_of_mask(poor).mean())
    assert float(nt_xent(good, 0.5)) < float(nt_xent(poor, 0.5)) - 1


def test_the_argmax_form_drives_a_pictures_first_view_from_its_second_and_ours_draws_it() -> None:
    z = spread((2, 8, 16))
    same = torch.eye(8, dtype=torch.bool).repeat(2, 2)
    before, _ = between(z.flatten(0, 1), same)
    # The second half of the rows hits its positive by chance, so only the first half is used.
    theirs, _ = between(descended(lambda z: argmax_of_mask(z)[:8].mean(), z).flatten(0, 1), same)
    ours, _ = between(descended(lambda z: nt_xent(z, 0.2), z).flatten(0, 1), same)
    assert theirs < before - 0.1
    assert ours > before + 0.1


def test_log_sigmoid_of_all_similarities_rewards_collapse_and_ours_does_not() -> None:
    apart, collapsed = torch.eye(8).expand(2, -1, -1), torch.ones(2, 8, 8)
    assert float(log_sigmoid_of_all(collapsed)) < float(log_sigmoid_of_all(apart))
    assert float(nt_xent(collapsed, 0.5)) > float(nt_xent(apart, 0.5)) + 0.5


def test_log_sigmoid_of_all_similarities_draws_other_pictures_near_and_ours_drives_them_apart() -> None:
    z = spread((2, 8, 16))
    same = torch.eye(8, dtype=torch.bool).repeat(2, 2)
    _, before = between(z.flatten(0, 1), same)
    _, theirs = between(descended(log_sigmoid_of_all, z, rate=5).flatten(0, 1), same)
    positive, ours = between(descended(lambda z: nt_xent(z, 0.2), z).flatten(0, 1), same)
    assert theirs > before + 0.5
    assert ours < before - 0.02
    assert positive > 0.9


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_a_positive_that_comes_nearer_lowers_nt_xent_all_the_way(temperature: float) -> None:
    def loss(angle: float) -> float:
        view = torch.eye(4)
        moved = math.cos(angle) * view + math.sin(angle) * view.roll(1, 1)
        return float(nt_xent(torch.stack([view, moved]), temperature))

    losses = [loss(angle) for angle in np.linspace(math.pi / 2, 0, 9)]
    assert all(later < earlier for earlier, later in pairwise(losses))
