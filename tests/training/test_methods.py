"""Each paper's step: the promises of all to the loop, and each one's use of views, labels, keys and targets.

Most tests put nn.Flatten in the backbone's place, so that a method's result can be computed beside it.
"""

import math
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import DINOLoss
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.nn import functional as F

from service.encoding.voting import headline_accuracy
from service.errors import InvalidRequest
from tests.conftest import some_slow
from training.augment import augment
from training.backbones import Backbone, build_backbone
from training.losses import (
    barlow_twins,
    clip,
    dino,
    info_nce,
    margin_contrast,
    nt_xent,
    siglip,
    supcon,
    triplet,
    vicreg,
)
from training.methods import METHODS, Batch, Captioned, Method, build_method
from training.methods.infonce import next_of_label
from training.methods.moco import MoCo, SplitBatchNorm, split_batch_norms
from training.methods.supcon import apart
from training.optimizers import build_optimizer
from training.recipe import MethodName, Recipe

# The source has this many pictures.
COUNT = 64
NEED_LABELS = {"supcon", "triplet", "margin", "infonce"}
# Of the batches' texts: as many tokens, and as many in the tower's vocabulary.
LENGTH, VOCABULARY = 6, 300


def recipe_of(tiny_recipe: Recipe, method: str, **changes: Any) -> Recipe:
    """The tiny recipe of a method, its table and other keys changed; moco with 4 parts and a small queue."""
    text = {"width": 16, "layers": 2, "heads": 2, "max_length": 8, "vocabulary": VOCABULARY}
    content = tiny_recipe.model_dump() | {"method": method, "moco": {"queue": 48, "splits": 4}}
    content |= {"text": text, "clip": {"dimension": 256}}
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    return Recipe.model_validate(content)


def convolutional(recipe: Recipe, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return build_method(recipe, build_backbone("small-cnn", 1, 8), COUNT)


def flat(recipe: Recipe, count: int = COUNT, seed: int = 0) -> Any:
    """A method whose backbone hands on the 64 pixels."""
    torch.manual_seed(seed)
    return build_method(recipe, Backbone(nn.Flatten(), 64), count)


def batch_of(views: int = 2, count: int = 16, seed: int = 0, labels: int = 4, first: int = 0) -> Batch:
    """Views of random pictures: each is its picture and as much noise again; three local views; labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(count, 1, 8, 8, generator=generator)
    noisy = pictures + torch.randn(views, count, 1, 8, 8, generator=generator)
    local = pictures + torch.randn(3, count, 1, 8, 8, generator=generator)
    numbers = torch.arange(count)
    # Every two pictures have the same caption, and every two captions say the same.
    tokens = torch.randint(VOCABULARY, (-(-count // 2), LENGTH), generator=generator)
    captions = Captioned(tokens, torch.ones_like(tokens), numbers // 2, numbers // 4)
    return Batch(noisy, first + numbers, numbers % labels, local, progress=0.5, captions=captions)


def labels_of(batch: Batch) -> Tensor:
    assert batch.labels is not None
    return batch.labels


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def weights_of(module: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in module.parameters()]


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(these, those, strict=True))


# Promises of every method.


def test_there_is_a_method_and_a_table_for_every_name() -> None:
    assert set(METHODS) == set(MethodName.__args__)  # type: ignore[attr-defined]
    assert set(METHODS) < set(Recipe.model_fields)


def test_four_methods_need_labels() -> None:
    assert {name for name, method in METHODS.items() if method.needs_labels} == NEED_LABELS


@pytest.mark.parametrize(("views", "precision"), [(2, "float32"), (4, "float32"), (2, "bfloat16")])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_gives_a_loss_that_reaches_the_backbone_and_embeddings_that_do_not(
    name: MethodName, views: int, precision: str, tiny_recipe: Recipe
) -> None:
    method = convolutional(recipe_of(tiny_recipe, name))
    assert type(method) is METHODS[name]
    batch = batch_of(views)
    if name not in NEED_LABELS:
        batch = batch._replace(labels=None)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        step = method.step(batch)
    assert step.loss.dtype == torch.float32
    assert step.loss.shape == ()
    assert bool(step.loss.isfinite())
    # MoCo's first view gives the keys.
    queries = views - 1 if name == "moco" else views
    assert step.embeddings.shape == (queries * 16, 256)
    assert not step.embeddings.requires_grad
    assert all(value.numel() == 1 and bool(value.isfinite()) for value in step.diagnostics.values())
    assert -1 <= float(step.diagnostics["positive_cosine"]) <= 1
    backward(step.loss)
    learning = [weight for weight in method.parameters() if weight.requires_grad]
    assert {id(weight) for weight in method.backbone.parameters()} <= {id(weight) for weight in learning}
    for weight in method.backbone.parameters():
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())
    # No head or predictor is outside the loss.
    assert all(weight.grad is not None for weight in learning)


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_saved_method_goes_on_exactly(name: MethodName, views: int, tiny_recipe: Recipe) -> None:
    recipe = recipe_of(tiny_recipe, name, clusters={"clusters": 5})
    method = convolutional(recipe)
    optimizer = torch.optim.AdamW([weight for weight in method.parameters() if weight.requires_grad], 1e-3)
    # The steps are more than an epoch, so clusters has clustered and MoCo's queue has wrapped around.
    for number in range(6):
        backward(method.step(batch_of(views, first=number * 16 % COUNT, seed=number)).loss)
        optimizer.step()
        optimizer.zero_grad()
        method.update(number / 10)
    other = convolutional(recipe, seed=1)
    other.load_state_dict(method.state_dict())

    def later(method: Method) -> list[float]:
        torch.manual_seed(7)
        return [float(method.step(batch_of(views, first=number * 16, seed=9)).loss.detach()) for number in range(3)]

    expected = later(method)
    assert later(other) == expected
    assert len(set(expected)) > 1 or name not in ("moco", "clusters")


TUNED: list[tuple[MethodName, str, Any]] = [
    ("simclr", "temperature", 0.7),
    ("moco", "temperature", 0.7),
    ("dino", "temperature", 0.7),
    ("dino", "teacher_temperature", [0.7, 0.7]),
    ("dino", "prototypes", 64),
    ("barlow", "lambd", 0.5),
    ("vicreg", "lambd", 5.0),
    ("vicreg", "mu", 5.0),
    ("vicreg", "nu", 5.0),
    ("supcon", "temperature", 0.7),
    ("clusters", "temperature", 0.7),
    ("triplet", "margin", 0.7),
    ("triplet", "mining", "hard"),
    ("margin", "margin", 1.7),
    ("infonce", "temperature", 0.7),
    ("clip", "temperature", 0.7),
    ("clip", "loss", "sigmoid"),
]


@pytest.mark.parametrize(("name", "key", "value"), TUNED, ids=[f"{name}.{key}" for name, key, _ in TUNED])
def test_a_setting_of_the_methods_own_table_reaches_its_loss(
    name: MethodName, key: str, value: object, tiny_recipe: Recipe
) -> None:
    losses = [
        float(flat(recipe_of(tiny_recipe, name, **table)).step(batch_of()).loss.detach())
        for table in ({}, {name: {key: value}})
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("moco", "byol", "dino")])
def test_a_method_without_a_momentum_encoder_has_nothing_to_update(name: MethodName, tiny_recipe: Recipe) -> None:
    method = convolutional(recipe_of(tiny_recipe, name))
    before = weights_of(method)
    method.update(0.5)
    assert same(weights_of(method), before)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """(1797, 1, 8, 8), 0..1."""
    pictures: Tensor = torch.from_numpy(load_digits().images).float()[:, None] / 16
    return pictures


def accuracy_of(backbone: nn.Module, digits: Tensor) -> float:
    """Headline k-NN of digits after the first thousand among the first thousand."""
    backbone.eval()
    with torch.inference_mode():
        embeddings = F.normalize(backbone((digits - 0.3) / 0.35), dim=1).numpy()
    backbone.train()
    labels = load_digits().target
    return headline_accuracy(embeddings[:1000], labels[:1000], embeddings[1000:], labels[1000:])


# The gains are of k-NN; the other methods need more steps.
GAINS = {"simclr": 0.005, "supcon": 0.03, "triplet": 0.03, "infonce": 0.03, "clip": 0.03}


@pytest.mark.parametrize("name", some_slow(METHODS, "trains each method", kept=("simclr",)))
def test_a_few_dozen_steps_on_digits_lower_the_loss_and_some_beat_the_untrained_backbone(
    name: MethodName, digits: Tensor, tiny_recipe: Recipe
) -> None:
    short = {"momentum": 0.9, "prototypes": 256}
    recipe = recipe_of(tiny_recipe, name, moco={"queue": 256}, clusters={"clusters": 30}, dino=short)
    torch.manual_seed(0)
    method = build_method(recipe, build_backbone("small-cnn", 1, 8), 1000)
    untrained = accuracy_of(method.backbone, digits) if name in GAINS else 0
    optimizer = torch.optim.AdamW([weight for weight in method.parameters() if weight.requires_grad], 2e-3)
    generator, labels = torch.Generator().manual_seed(0), torch.from_numpy(load_digits().target).long()
    losses, steps = [], 64 if name == "simclr" else 32
    for number in range(steps):
        chosen = torch.randint(1000, (128,), generator=generator)
        views = torch.stack([augment(digits[chosen], recipe.augmentation, generator) for _ in range(2)])
        local = None
        if method.multi_crop:
            small = [augment(digits[chosen], recipe.augmentation, generator, 6, (0.3, 0.8)) for _ in range(2)]
            local = (torch.stack(small) - 0.3) / 0.35
        words = Captioned(torch.arange(10)[:, None], torch.ones(10, 1).long(), labels[chosen], labels[chosen])
        batch = Batch((views - 0.3) / 0.35, chosen, labels[chosen], local, number / steps, words)
        step = method.step(batch)
        backward(step.loss)
        optimizer.step()
        optimizer.zero_grad()
        method.update(number / steps)
        losses.append(float(step.loss.detach()))
    # MoCo's queue is full of keys by then.
    full = 3 if name == "moco" else 0
    early, late = np.mean(losses[full : full + 2]), np.mean(losses[-4:])
    assert late < early - 0.1 * abs(early)
    if name in GAINS:
        assert accuracy_of(method.backbone, digits) > untrained + GAINS[name]


# Methods whose loss is a function of all projections.


def test_simclr_is_nt_xent_of_the_projections_of_all_views(tiny_recipe: Recipe) -> None:
    method, batch = convolutional(recipe_of(tiny_recipe, "simclr")), batch_of(3)
    step = method.step(batch)
    # Batch norm gets all views at once.
    h = method.backbone(batch.views.flatten(0, 1))
    z = method.get_submodule("head")(h).unflatten(0, (3, 16))
    torch.testing.assert_close(step.loss, nt_xent(z, 0.2))
    torch.testing.assert_close(step.embeddings, h.detach())
    expected = F.cosine_similarity(z[0], z[1], dim=1).mean()
    torch.testing.assert_close(step.diagnostics["positive_cosine"], expected.detach())


LABELLED: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("supcon", lambda z, labels: supcon(z, labels, 0.1)),
    ("triplet", lambda z, labels: triplet(z, labels, 0.2, "semi-hard")),
    ("margin", lambda z, labels: margin_contrast(z, labels, 1.0)),
]


@pytest.mark.parametrize(("name", "loss"), LABELLED, ids=[name for name, _ in LABELLED])
@pytest.mark.parametrize("views", [2, 4])
def test_a_labelled_method_gives_every_view_its_pictures_label(
    name: str, loss: Callable[[Tensor, Tensor], Tensor], views: int, tiny_recipe: Recipe
) -> None:
    method, batch = flat(recipe_of(tiny_recipe, name)), batch_of(views)
    rows = method.head(batch.views.flatten(0, 1).flatten(1))
    # The rows are ordered view by view.
    labels = torch.tensor([n % 4 for _ in range(views) for n in range(16)])
    torch.testing.assert_close(method.step(batch).loss, loss(rows, labels))
    swapped = batch._replace(labels=labels_of(batch).roll(1))
    # The rolled labels still agree for the same pictures.
    assert abs(float((method.step(batch).loss - method.step(swapped).loss).detach())) < 1e-5
    other = batch._replace(labels=torch.arange(16) // 4)
    assert abs(float((method.step(batch).loss - method.step(other).loss).detach())) > 1e-3


PAIRED: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("barlow", lambda a, b: barlow_twins(a, b, 0.0051)),
    ("vicreg", lambda a, b: vicreg(a, b, 25.0, 25.0, 1.0)),
]


@pytest.mark.parametrize(("name", "loss"), PAIRED, ids=[name for name, _ in PAIRED])
@pytest.mark.parametrize("views", [2, 4])
def test_a_method_of_pairs_averages_over_all_pairs_of_views(
    name: str, loss: Callable[[Tensor, Tensor], Tensor], views: int, tiny_recipe: Recipe
) -> None:
    method, batch = flat(recipe_of(tiny_recipe, name)), batch_of(views)
    z = method.head(batch.views.flatten(0, 1).flatten(1)).unflatten(0, (views, 16))
    pairs = [loss(z[i], z[j]) for i, j in combinations(range(views), 2)]
    assert len(pairs) == views * (views - 1) // 2
    torch.testing.assert_close(method.step(batch).loss, torch.stack(pairs).mean())


# MoCo: a queue, and a key encoder that follows.


def moco(tiny_recipe: Recipe, **table: Any) -> Any:
    """MoCo without any batch norm: its keys are those of each picture alone."""
    return flat(recipe_of(tiny_recipe, "moco", moco=table))


def keys_of(method: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        keys: Tensor = F.normalize(method.key_head(method.key_backbone(batch.views[0])), dim=1)
    return keys


def by_age(method: Any) -> Tensor:
    """The queue, oldest key first."""
    queue: Tensor = method.queue.roll(-int(method.pointer), 0)
    return queue


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 13), counts=st.lists(st.integers(2, 9), min_size=1, max_size=5))
def test_the_queue_holds_the_latest_keys_whatever_its_size(size: int, counts: list[int], tiny_recipe: Recipe) -> None:
    method = moco(tiny_recipe, queue=size)
    everything = [method.queue.clone()]
    for number, count in enumerate(counts):
        batch = batch_of(count=count, seed=number)
        everything.append(keys_of(method, batch))
        method.step(batch)
        torch.testing.assert_close(by_age(method), torch.cat(everything)[-size:])
        torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(size))


def test_a_batchs_keys_are_not_among_its_own_negatives(tiny_recipe: Recipe) -> None:
    method, batch = moco(tiny_recipe, queue=16), batch_of()
    # In the second step the keys are negatives, and the queue holds nothing else.
    for _ in range(2):
        before, keys = method.queue.clone(), keys_of(method, batch)
        q = method.head(method.backbone(batch.views[1]))
        torch.testing.assert_close(method.step(batch).loss, info_nce(q, keys, before, 0.2))
    torch.testing.assert_close(before, keys)


def test_every_later_view_is_a_query_of_the_first_views_key(tiny_recipe: Recipe) -> None:
    method, batch = moco(tiny_recipe), batch_of(4)
    keys, queue = keys_of(method, batch), method.queue.clone()
    losses = [info_nce(method.head(method.backbone(view)), keys, queue, 0.2) for view in batch.views[1:]]
    step = method.step(batch)
    torch.testing.assert_close(step.loss, torch.stack(losses).mean())
    torch.testing.assert_close(step.embeddings, batch.views[1:].flatten(0, 1).flatten(1))


def test_no_gradient_reaches_the_key_encoder_or_the_queue(tiny_recipe: Recipe) -> None:
    method = convolutional(recipe_of(tiny_recipe, "moco"))
    assert isinstance(method, MoCo)
    before = weights_of(method.key_backbone) + weights_of(method.key_head)
    backward(method.step(batch_of()).loss)
    for weight in [*method.key_backbone.parameters(), *method.key_head.parameters()]:
        assert not weight.requires_grad
        assert weight.grad is None
    assert not method.queue.requires_grad
    # Only update() moves the key encoder.
    assert same(weights_of(method.key_backbone) + weights_of(method.key_head), before)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_the_key_encoder_follows_by_one_minus_its_momentum(momentum: float, tiny_recipe: Recipe) -> None:
    method = convolutional(recipe_of(tiny_recipe, "moco", moco={"momentum": momentum}))
    assert isinstance(method, MoCo)
    online, keys = [method.backbone, method.head], [method.key_backbone, method.key_head]
    # The two encoders start with the same weights.
    assert all(same(weights_of(k), weights_of(q)) for k, q in zip(keys, online, strict=True))
    for module in keys:
        for number, weight in enumerate(module.parameters()):
            weight.copy_(torch.full_like(weight, number))
    before = [weight.double() for module in keys for weight in weights_of(module)]
    theta = [weight.double() for module in online for weight in weights_of(module)]
    # The momentum does not change with progress.
    for progress in (0.0, 0.7):
        method.update(progress)
        before = [momentum * xi + (1 - momentum) * to for xi, to in zip(before, theta, strict=True)]
        after = [weight.double() for module in keys for weight in weights_of(module)]
        for found, expected in zip(after, before, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert same([weight.double() for module in online for weight in weights_of(module)], theta)


def test_supcon_pairs_a_picture_without_a_label_with_itself() -> None:
    labels, temperature = [3, -1, 0, -1, 3, 0, 3], 0.2
    z = torch.randn(2 * len(labels), 5, generator=torch.Generator().manual_seed(0))
    rows = F.normalize(z, dim=1).double().numpy()
    losses = []
    for i in range(len(rows)):
        others = [a for a in range(len(rows)) if a != i]
        below = sum(np.exp(rows[i] @ rows[a] / temperature) for a in others)
        picture = i % 7
        positives = [p for p in others if p % 7 == picture or labels[picture] == labels[p % 7] >= 0]
        assert len(positives) == {3: 5, 0: 3, -1: 1}[labels[picture]]
        losses.append(-np.mean([np.log(np.exp(rows[i] @ rows[p] / temperature) / below) for p in positives]))
    numbers = apart(torch.tensor(labels)).repeat(2)
    assert float(supcon(z, numbers, temperature)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_supcon_without_any_label_is_simclrs_loss() -> None:
    z = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    labels = apart(torch.full((6,), -1)).repeat(2)
    torch.testing.assert_close(supcon(z.flatten(0, 1), labels, 0.2), nt_xent(z, 0.2))
    # Identical embeddings cost the log of the 11 other rows.
    assert float(supcon(torch.ones(12, 4), labels, 0.2)) == pytest.approx(np.log(11), rel=1e-5)


def test_norms_of_timm_keep_their_activation_when_split() -> None:
    network = build_backbone("timm:test_efficientnet", 3, 32).module.eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = network(x)
        split_batch_norms(network, 2)
        assert torch.equal(network(x), before)
        norm = next(module for module in network.modules() if isinstance(module, SplitBatchNorm)).train()
        assert norm.splits == 2
        y = torch.randn(4, norm.num_features, 3, 3)
        halves = y[:2], y[2:]
        parts = [F.batch_norm(half, None, None, norm.weight, norm.bias, True, 0, norm.eps) for half in halves]
        torch.testing.assert_close(norm(y), F.silu(torch.cat(parts)))


def test_batch_norms_of_query_and_key_encoder_are_split(tiny_recipe: Recipe) -> None:
    method = convolutional(recipe_of(tiny_recipe, "moco", moco={"splits": 2}))
    assert isinstance(method, MoCo)
    for backbone in (method.backbone, method.key_backbone):
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 4
        assert all(isinstance(norm, SplitBatchNorm) and norm.splits == 2 for norm in norms)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in method.modules())


def test_a_split_batch_norm_is_four_batch_norms_in_training_and_one_in_service() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(16, 5, 4, 4) + torch.arange(16.0).view(16, 1, 1, 1)
    plain, split = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    for norm in (plain, split):
        with torch.no_grad():
            norm.weight.copy_(torch.arange(1.0, 6))
            norm.bias.fill_(0.5)
    split_batch_norms(split, 4)
    parts = [nn.BatchNorm2d(5) for _ in range(4)]
    for part in parts:
        part.load_state_dict(plain.state_dict())
    expected = torch.cat([part(x[4 * number : 4 * number + 4]) for number, part in enumerate(parts)])
    torch.testing.assert_close(split(x), expected)
    assert float((plain(x) - expected).detach().abs().max()) > 0.5
    running = torch.zeros(5)
    # Each part in turn moves the running statistics by its momentum.
    for number in range(4):
        running = 0.9 * running + 0.1 * x[4 * number : 4 * number + 4].mean((0, 2, 3))
    torch.testing.assert_close(split.state_dict()["running_mean"], running)
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("count", [2, 7, 8, 9, 25, 64])
def test_a_split_batch_norm_leaves_no_picture_by_itself(count: int) -> None:
    split = nn.BatchNorm2d(5)
    split_batch_norms(split, 8)
    x = torch.randn(count, 5, 1, 1, generator=torch.Generator().manual_seed(0))
    # A single number of one picture has no variance.
    y = split(x).detach()
    parts = x.tensor_split(min(8, count // 2))
    assert min(len(part) for part in parts) >= 2
    expected = [(part - part.mean(0)) / (part.var(0, correction=0) + 1e-5).sqrt() for part in parts]
    torch.testing.assert_close(y, torch.cat(expected))


def test_the_keys_other_order_is_undone(tiny_recipe: Recipe) -> None:
    method = convolutional(recipe_of(tiny_recipe, "moco", moco={"queue": 16}))
    assert isinstance(method, MoCo)
    # With running statistics, a key does not depend on its companions.
    method.key_backbone.eval()
    batch = batch_of()
    method.step(batch)
    torch.testing.assert_close(method.queue, keys_of(method, batch), rtol=1e-4, atol=1e-5)


def test_keys_are_normalised_among_other_companions_than_their_queries(tiny_recipe: Recipe) -> None:
    method, batch = convolutional(recipe_of(tiny_recipe, "moco", moco={"queue": 16})), batch_of()
    assert isinstance(method, MoCo)
    method.step(batch)
    # keys_of does not shuffle the pictures.
    assert float((method.queue - keys_of(method, batch)).abs().max()) > 0.01


# BYOL and SimSiam: no negatives.


def byol_target(method: Any, views: Tensor) -> Tensor:
    with torch.no_grad():
        target: Tensor = method.target_head(method.target_backbone(views.flatten(0, 1))).unflatten(0, views.shape[:2])
    return target


@pytest.mark.parametrize("views", [2, 3])
def test_byol_is_the_squared_distance_of_unit_vectors_over_all_ordered_pairs(views: int, tiny_recipe: Recipe) -> None:
    method, batch = flat(recipe_of(tiny_recipe, "byol")), batch_of(views)
    for weight in method.target_head.parameters():
        # The target differs from the online network.
        weight.add_(0.1 * torch.randn_like(weight))
    p = method.predictor(method.head(batch.views.flatten(0, 1).flatten(1))).unflatten(0, (views, 16)).detach()
    target = byol_target(method, batch.views)
    distances = []
    for i, j in permutations(range(views), 2):
        for n in range(16):
            q, z = p[i, n].double().numpy(), target[j, n].double().numpy()
            distances.append(np.sum((q / np.linalg.norm(q) - z / np.linalg.norm(z)) ** 2))
    assert float(method.step(batch).loss.detach()) == pytest.approx(np.mean(distances), rel=1e-5)


@pytest.mark.parametrize(("progress", "tau"), [(0, 0.9), (0.25, 1 - 0.05 * (1 + math.sqrt(0.5))), (0.5, 0.95), (1, 1)])
def test_byols_target_moves_less_and_less(progress: float, tau: float, tiny_recipe: Recipe) -> None:
    method: Any = convolutional(recipe_of(tiny_recipe, "byol", byol={"momentum": 0.9}))
    targets, onlines = [method.target_backbone, method.target_head], [method.backbone, method.head]
    for target, online in zip(targets, onlines, strict=True):
        # The two networks start with the same weights.
        assert same(weights_of(target), weights_of(online))
        for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
            xi.data.fill_(2.0)
            theta.data.fill_(1.0)
    method.update(progress)
    for target, online in zip(targets, onlines, strict=True):
        for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(xi, torch.full_like(xi, tau * 2 + (1 - tau) * 1), rtol=1e-6, atol=0)
            assert torch.equal(theta, torch.ones_like(theta))


def test_no_gradient_reaches_byols_target(tiny_recipe: Recipe) -> None:
    method: Any = convolutional(recipe_of(tiny_recipe, "byol"))
    before = weights_of(method.target_backbone)
    backward(method.step(batch_of()).loss)
    for weight in [*method.target_backbone.parameters(), *method.target_head.parameters()]:
        assert not weight.requires_grad
        assert weight.grad is None
    assert same(weights_of(method.target_backbone), before)


# DINO: multi-crop, centring and sharpening.


def dino_method(tiny_recipe: Recipe, **table: Any) -> Any:
    """DINO whose teacher differs from its student and has a centre; local views are as large as global ones."""
    method: Any = flat(recipe_of(tiny_recipe, "dino", dino={"prototypes": 24, "local_side": 8, "frozen": 0} | table))
    for weight in method.teacher_head.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    method.center.uniform_(-0.1, 0.1)
    return method


def dino_outputs(method: Any, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of teacher and student, view by view."""
    local = [] if batch.local is None else list(batch.local)
    with torch.no_grad():
        # The heads' batch norms see all views of a network at once.
        student = method.head(torch.cat([*batch.views, *local]).flatten(1)).split(16)
        teacher = method.teacher_head(batch.views.flatten(0, 1).flatten(1)).split(16)
    return list(teacher), list(student)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("views", [2, 3])
def test_dino_is_lightlys_loss_of_global_views_against_all(views: int, local: bool, tiny_recipe: Recipe) -> None:
    method, batch = dino_method(tiny_recipe, teacher_temperature=[0.06, 0.06]), batch_of(views)
    batch = batch if local else batch._replace(local=None)
    peer = DINOLoss(24, teacher_temp=0.06, student_temp=0.1, center_momentum=0.9)
    peer.center.copy_(method.center)
    teacher, student = dino_outputs(method, batch)
    assert len(student) == views + 3 * local
    expected = float(peer(teacher, student))
    step = method.step(batch)
    assert float(step.loss.detach()) == pytest.approx(expected, rel=1e-5)
    # The centre moves after the loss, by the teacher's outputs alone.
    torch.testing.assert_close(method.center, peer.center.flatten())
    # The loop watches the global views.
    torch.testing.assert_close(step.embeddings, batch.views.flatten(0, 1).flatten(1))


@pytest.mark.parametrize(("progress", "sharpness"), [(0, 0.02), (0.1, 0.04), (0.2, 0.06), (0.7, 0.06)])
def test_dinos_teacher_temperature_warms_up_in_a_line(progress: float, sharpness: float, tiny_recipe: Recipe) -> None:
    method = dino_method(tiny_recipe, teacher_temperature=[0.02, 0.06], teacher_warmup=0.2)
    batch = batch_of()._replace(progress=progress)
    teacher, student = (torch.stack(outputs) for outputs in dino_outputs(method, batch))
    expected = float(dino(student, teacher, method.center.clone(), 0.1, sharpness))
    assert float(method.step(batch).loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_temperature_may_be_constant_from_the_start(tiny_recipe: Recipe) -> None:
    method = dino_method(tiny_recipe, teacher_temperature=[0.02, 0.06], teacher_warmup=0)
    batch = batch_of()._replace(progress=0.001)
    teacher, student = (torch.stack(outputs) for outputs in dino_outputs(method, batch))
    expected = float(dino(student, teacher, method.center.clone(), 0.1, 0.06))
    assert float(method.step(batch).loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "lars"])
def test_dinos_last_layer_is_frozen_at_first(optimizer_name: str, tiny_recipe: Recipe) -> None:
    method = dino_method(tiny_recipe, frozen=0.1)
    optimizer = build_optimizer(method, method.recipe.model_copy(update={"optimizer": optimizer_name}))
    for progress, learns in ((0.0, False), (0.09, False), (0.1, True), (0.5, True)):
        before, rest = method.head.last.weight.clone(), method.head.layers[0].weight.clone()
        backward(method.step(batch_of()._replace(progress=progress)).loss)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(method.head.last.weight, before) != learns
        assert not torch.equal(method.head.layers[0].weight, rest)


def test_lengths_of_projection_and_prototypes_do_not_matter(tiny_recipe: Recipe) -> None:
    method, h = dino_method(tiny_recipe), torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    z = method.head.layers(h).detach()
    found = method.head(h)
    assert found.shape == (16, 24)
    torch.testing.assert_close(found, F.cosine_similarity(z[:, None], method.head.last.weight, dim=2))
    with torch.no_grad():
        method.head.last.weight.mul_(7)
    torch.testing.assert_close(method.head(h), found)


@pytest.mark.parametrize(("progress", "momentum"), [(0, 0.9), (0.5, 0.95), (1, 1)])
def test_dinos_teacher_moves_less_and_less(progress: float, momentum: float, tiny_recipe: Recipe) -> None:
    method: Any = convolutional(recipe_of(tiny_recipe, "dino", dino={"momentum": 0.9}))
    pairs = ((method.teacher_backbone, method.backbone), (method.teacher_head, method.head))
    for teacher, student in pairs:
        # The two networks start with the same weights.
        assert same(weights_of(teacher), weights_of(student))
        for target, online in zip(teacher.parameters(), student.parameters(), strict=True):
            target.data.fill_(2.0)
            online.data.fill_(1.0)
    method.update(progress)
    for teacher, student in pairs:
        for target, online in zip(teacher.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(target, torch.full_like(target, 1 + momentum), rtol=1e-6, atol=0)
            assert torch.equal(online, torch.ones_like(online))


def test_no_gradient_reaches_dinos_teacher_or_its_centre(tiny_recipe: Recipe) -> None:
    method: Any = convolutional(recipe_of(tiny_recipe, "dino"))
    before = weights_of(method.teacher_backbone)
    backward(method.step(batch_of()).loss)
    for weight in [*method.teacher_backbone.parameters(), *method.teacher_head.parameters()]:
        assert not weight.requires_grad
        assert weight.grad is None
    assert not method.center.requires_grad
    assert same(weights_of(method.teacher_backbone), before)


@pytest.mark.parametrize("name", ["small-cnn", "mid-cnn", "resnet18"])
def test_a_backbone_learns_from_views_of_two_sides(name: str, tiny_recipe: Recipe) -> None:
    recipe = recipe_of(tiny_recipe, "dino", backbone=name, side=32, channels=3, dino={"local_side": 16})
    torch.manual_seed(0)
    method = build_method(recipe, build_backbone(name, 3, 32), COUNT)
    views, local = torch.randn(2, 4, 3, 32, 32), torch.randn(6, 4, 3, 16, 16)
    step = method.step(Batch(views, torch.arange(4), None, local, 0.5))
    backward(step.loss)
    assert step.embeddings.shape == (8, {"small-cnn": 256, "mid-cnn": 256, "resnet18": 512}[name])
    assert all(weight.grad is not None for weight in method.parameters() if weight.requires_grad)


def test_a_backbone_of_one_side_is_refused_with_local_views(tiny_recipe: Recipe) -> None:
    recipe = recipe_of(tiny_recipe, "dino", backbone="vit_b_32", side=64, channels=3)
    backbone = build_backbone("vit_b_32", 3, 64)
    with pytest.raises(InvalidRequest, match="vit_b_32 cannot take pictures of 32x32"):
        build_method(recipe, backbone, COUNT)
    build_method(recipe_of(tiny_recipe, "dino", backbone="vit_b_32", side=64, dino={"local_views": 0}), backbone, COUNT)


class Fixed(nn.Module):
    """A predictor whose output does not depend on its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, z: Tensor) -> Tensor:
        return self.answer.expand(len(z), -1)


@pytest.mark.parametrize("name", ["simsiam", "byol"])
def test_a_prediction_alone_carries_gradient(name: str, tiny_recipe: Recipe) -> None:
    method: Any = convolutional(recipe_of(tiny_recipe, name))
    method.predictor = Fixed(16)
    backward(method.step(batch_of()).loss)
    assert method.predictor.answer.grad is not None
    assert bool(method.predictor.answer.grad.any())
    assert all(weight.grad is None for weight in [*method.backbone.parameters(), *method.head.parameters()])


@pytest.mark.parametrize("views", [2, 3])
def test_simsiam_is_minus_the_cosine_over_all_ordered_pairs(views: int, tiny_recipe: Recipe) -> None:
    method, batch = flat(recipe_of(tiny_recipe, "simsiam")), batch_of(views)
    z = method.head(batch.views.flatten(0, 1).flatten(1))
    p = method.predictor(z).unflatten(0, (views, 16)).detach().double().numpy()
    z = z.unflatten(0, (views, 16)).detach().double().numpy()
    cosines = [
        p[i, n] @ z[j, n] / (np.linalg.norm(p[i, n]) * np.linalg.norm(z[j, n]))
        for i, j in permutations(range(views), 2)
        for n in range(16)
    ]
    assert float(method.step(batch).loss.detach()) == pytest.approx(-np.mean(cosines), rel=1e-5)


@pytest.mark.parametrize(("name", "width"), [("simsiam", 24), ("byol", 40)])
def test_the_predictors_hidden_width_is_the_recipes(name: str, width: int, tiny_recipe: Recipe) -> None:
    method = flat(recipe_of(tiny_recipe, name, **{name: {"predictor": width}}))
    shapes = [(m.in_features, m.out_features) for m in method.predictor.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(16, width), (width, 16)]


# Clusters: pseudo-labels from k-means.


def test_clusters_is_simclr_until_the_first_clustering(tiny_recipe: Recipe) -> None:
    changes: dict[str, Any] = {"simclr": {"temperature": 0.3}, "clusters": {"temperature": 0.3}}
    ours = convolutional(recipe_of(tiny_recipe, "clusters", **changes))
    theirs = convolutional(recipe_of(tiny_recipe, "simclr", **changes), seed=1)
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if key in theirs.state_dict()})
    for number in range(COUNT // 16):
        batch = batch_of(first=16 * number, seed=number)
        step = ours.step(batch)
        torch.testing.assert_close(step.loss, theirs.step(batch).loss)
        assert float(step.diagnostics["clustered"]) == 0


def blobs(count: int = COUNT, kinds: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 8, 8) of a few kinds far apart, in random order, and their kinds."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(count)[torch.randperm(count, generator=generator)] % kinds
    centres = 5 * torch.eye(64)[:kinds]
    return (centres[kind] + 0.1 * torch.randn(count, 64, generator=generator)).view(-1, 1, 8, 8), kind


def test_pictures_of_blobs_far_apart_are_clustered_rightly_and_drive_the_loss(tiny_recipe: Recipe) -> None:
    every = 2
    method = flat(recipe_of(tiny_recipe, "clusters", clusters={"clusters": 4, "every": every}))
    pictures, kinds = blobs()
    generator = torch.Generator().manual_seed(0)
    clustered = []
    for _ in range(every):
        for positions in torch.randperm(COUNT, generator=generator).view(-1, 16):
            views = pictures[positions] + 0.1 * torch.randn(2, 16, 1, 8, 8, generator=generator)
            clustered.append(float(method.step(Batch(views, positions, None)).diagnostics["clustered"]))
    assert not any(clustered)
    assert int(method.assignment.min()) >= 4
    positions = torch.arange(16)
    batch = Batch(pictures[positions].expand(2, -1, -1, -1, -1), positions, None)
    step = method.step(batch)
    assert float(step.diagnostics["clustered"]) == 1
    assert int(method.assignment.max()) < 4
    assert adjusted_rand_score(kinds.numpy(), method.assignment.numpy()) == 1
    z = method.head(batch.views.flatten(0, 1).flatten(1))
    torch.testing.assert_close(step.loss, supcon(z, kinds[positions].repeat(2), 0.2))
    assert abs(float((step.loss - nt_xent(z.unflatten(0, (2, 16)), 0.2)).detach())) > 0.1


def test_clusters_are_made_anew_after_as_many_epochs_again(tiny_recipe: Recipe) -> None:
    method = flat(recipe_of(tiny_recipe, "clusters", clusters={"clusters": 4, "every": 2}))
    assignments = []
    for epoch in range(5):
        # Other pictures in the same clusters stand for an encoder that has moved.
        pictures, _ = blobs(seed=epoch)
        for positions in torch.arange(COUNT).view(-1, 16):
            method.step(Batch(pictures[positions].expand(2, -1, -1, -1, -1), positions, None))
            assignments.append(method.assignment.clone())
    changes = [n for n in range(1, len(assignments)) if not torch.equal(assignments[n], assignments[n - 1])]
    # Clustering comes before the first step of epochs 2 and 4.
    assert changes == [8, 16]
    assert adjusted_rand_score(blobs(seed=3)[1].numpy(), assignments[-1].numpy()) == 1


def test_a_picture_that_was_never_in_a_batch_keeps_a_label_of_its_own(tiny_recipe: Recipe) -> None:
    method = flat(recipe_of(tiny_recipe, "clusters", clusters={"clusters": 4}))
    pictures, kinds = blobs()
    unseen = torch.tensor([3, 40])
    seen = torch.tensor([n for n in range(COUNT) if n not in (3, 40)])
    for _ in range(2):
        method.step(Batch(pictures[seen].expand(2, -1, -1, -1, -1), seen, None))
    step = method.step(Batch(pictures.expand(2, -1, -1, -1, -1), torch.arange(COUNT), None))
    assert float(step.diagnostics["clustered"]) == pytest.approx(1 - 2 / COUNT)
    assert adjusted_rand_score(kinds[seen].numpy(), method.assignment[seen].numpy()) == 1
    assert method.assignment[unseen].tolist() == [4 + 3, 4 + 40]


def test_fewer_pictures_than_clusters_do_no_harm(tiny_recipe: Recipe) -> None:
    method = flat(recipe_of(tiny_recipe, "clusters", clusters={"clusters": 100}), count=8)
    for _ in range(2):
        step = method.step(batch_of(count=8))
    assert float(step.diagnostics["clustered"]) == 1
    assert bool(step.loss.isfinite())
    assert 4 < len(set(method.assignment.tolist())) <= 8
    assert int(method.assignment.max()) < 8


# InfoNCE with explicit negatives.


@settings(max_examples=100, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_next_of_a_label_is_found_by_walking_on(labels: list[int]) -> None:
    expected = []
    for place in range(len(labels)):
        walk = (place + 1) % len(labels)
        while labels[walk] != labels[place]:
            walk = (walk + 1) % len(labels)
        expected.append(walk)
    assert next_of_label(torch.tensor(labels)).tolist() == expected


@pytest.mark.parametrize("views", [2, 3])
def test_infonces_positive_is_another_picture_of_the_label_and_its_negatives_those_of_others(
    views: int, tiny_recipe: Recipe
) -> None:
    method, batch = flat(recipe_of(tiny_recipe, "infonce")), batch_of(views, labels=5)
    # The 16 pictures have 5 labels: one of 4, four of 3.
    labels = labels_of(batch).tolist()
    z = method.head(batch.views.flatten(0, 1).flatten(1)).unflatten(0, (views, 16)).detach().double().numpy()
    z = z / np.linalg.norm(z, axis=2, keepdims=True)
    losses = []
    for v in range(1, views):
        for n in range(16):
            partner = next(m % 16 for m in range(n + 1, n + 17) if labels[m % 16] == labels[n])
            assert partner != n
            above = math.exp(z[0, n] @ z[v, partner] / 0.1)
            below = sum(math.exp(z[0, n] @ z[v, m] / 0.1) for m in range(16) if labels[m] != labels[n])
            losses.append(-math.log(above / (above + below)))
    assert float(method.step(batch).loss.detach()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_picture_alone_with_its_label_has_its_own_other_view_as_infonces_positive(tiny_recipe: Recipe) -> None:
    method, batch = flat(recipe_of(tiny_recipe, "infonce", infonce={"temperature": 0.2})), batch_of()
    alone = batch._replace(labels=torch.arange(16))
    z = method.head(batch.views.flatten(0, 1).flatten(1)).unflatten(0, (2, 16))
    expected = info_nce(z[0], z[1], z[1], 0.2, ~torch.eye(16, dtype=torch.bool))
    torch.testing.assert_close(method.step(alone).loss, expected)


@pytest.mark.parametrize("name", sorted(NEED_LABELS))
def test_a_batch_of_one_label_does_no_harm(name: str, tiny_recipe: Recipe) -> None:
    method, batch = convolutional(recipe_of(tiny_recipe, name)), batch_of(labels=1)
    loss = method.step(batch).loss
    backward(loss)
    assert bool(loss.isfinite())
    for weight in method.backbone.parameters():
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())


# CLIP and SigLIP.


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_clip_is_its_loss_of_pictures_and_their_captions(form: str, views: int, tiny_recipe: Recipe) -> None:
    recipe = recipe_of(tiny_recipe, "clip", clip={"loss": form, "dimension": 24, "temperature": 0.25, "bias": -3.0})
    method, batch = flat(recipe), batch_of(views)
    assert batch.captions is not None
    with torch.no_grad():
        images = batch.views.flatten(0, 1).flatten(1) @ method.backbone[1].weight.T
        texts = method.text(batch.captions.tokens, batch.captions.mask)
        # Picture n has the caption n // 2, whatever the view.
        texts = torch.stack([texts[n // 2] for _ in range(views) for n in range(16)])
    groups = torch.tensor([n // 4 for _ in range(views) for n in range(16)])
    if form == "softmax":
        expected = clip(images, texts, torch.tensor(4.0), groups)
    else:
        expected = siglip(images, texts, torch.tensor(4.0), torch.tensor(-3.0), groups)
    step = method.step(batch)
    assert float(step.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert step.embeddings.shape == (views * 16, 24)
    assert float(step.diagnostics["logit_scale"]) == pytest.approx(4)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_temperature_learns_and_is_clamped_at_a_hundredth(form: str, tiny_recipe: Recipe) -> None:
    method = flat(recipe_of(tiny_recipe, "clip", clip={"loss": form}))
    backward(method.step(batch_of()).loss)
    assert method.log_scale.grad is not None
    assert (method.bias.grad is not None) if form == "sigmoid" else not hasattr(method, "bias")
    method.log_scale.data.fill_(7.0)
    method.update(0.5)
    told = method.scales()
    assert told["logit_scale"] == pytest.approx(100)
    assert told.get("logit_bias") == (-10 if form == "sigmoid" else None)
    method.log_scale.data.fill_(1.0)
    method.update(0.5)
    assert method.scales()["logit_scale"] == pytest.approx(math.e)


def test_a_locked_backbone_is_no_part_of_what_learns(tiny_recipe: Recipe) -> None:
    recipe = recipe_of(tiny_recipe, "clip", backbone="locked", clip={"dimension": 7})
    method: Any = build_method(recipe, Backbone(nn.Identity(), 64), COUNT)
    embeddings = torch.randn(1, 16, 64)
    step = method.step(batch_of()._replace(views=embeddings))
    assert torch.equal(step.embeddings, embeddings[0])
    assert not list(method.backbone.parameters())
    assert method.text.projection.weight.shape == (64, 16)
    backward(step.loss)
    assert all(weight.grad is not None for weight in method.text.parameters())


def test_padding_behind_a_text_changes_nothing(tiny_recipe: Recipe) -> None:
    text = flat(recipe_of(tiny_recipe, "clip")).text.eval()
    tokens = torch.randint(VOCABULARY, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    with torch.no_grad():
        together = text(tokens, mask)
        alone = torch.cat(
            [
                text(row[:length][None], torch.ones(1, length, dtype=torch.long))
                for row, length in zip(tokens, mask.sum(1).tolist(), strict=True)
            ]
        )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert float((together[0] - together[1]).abs().max()) > 0.01
