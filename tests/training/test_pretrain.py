"""The loop: its schedule, checks and refusals, that it learns, and that a resumed run is the uninterrupted one."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Generator, Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lookalike
from service.encoding.card import square_preprocessing
from service.encoding.images import tones
from service.errors import InvalidOutput, InvalidRequest, InvalidSource, LookalikeError
from service.sources import open_source
from service.sources.compact import Labels
from service.sources.source import Source
from tests.conftest import ROOT, some_slow
from tests.service.sources.test_files import tarred
from tests.test_json import assert_as_promised
from training import data
from training import material as materials
from training import pretrain as loop
from training.augment import augment
from training.backbones import build_backbone
from training.checkpoint import (
    Checkpoint,
    Cursor,
    Identity,
    Progress,
    earlier_run,
    read_checkpoint,
    run_folder,
    set_aside,
    weights_file,
)
from training.data import Canvas, batches
from training.material import Material, prepare, statistics
from training.methods import METHODS, Batch, Method, Step, build_method
from training.methods.dino import DINO
from training.methods.simclr import SimCLR
from training.pretrain import (
    Learner,
    account_of,
    check_health,
    compare_with_untrained,
    export_run,
    load,
    online_knn,
    part,
    per_dimension_std,
    planned_total,
    pretrain,
    resumable,
    schedule,
    train,
)
from training.recipe import Augmentation, MethodName, Recipe
from training.weights import Normalisation

CPU = torch.device("cpu")
Paint = Callable[..., bytes]


def changed(recipe: Recipe, **values: object) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | values)


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """In float32, because timing decides whether bfloat16 is used."""
    return changed(tiny_recipe, precision="float32")


@pytest.fixture
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Source, Recipe], Material]]:
    """prepared(source, recipe) is its material, in a run's folder of its own; closed in the end."""
    made: list[Material] = []

    def make(source: Source, recipe: Recipe) -> Material:
        made.append(prepare(source, recipe, tmp_path_factory.mktemp("run"), CPU))
        return made[-1]

    yield make
    for material in made:
        material.canvas.close()


Prepared = Callable[[Source, Recipe], Material]


def method_for(recipe: Recipe, source: Source) -> Method:
    torch.manual_seed(recipe.seed)
    return build_method(recipe, build_backbone(recipe.backbone, recipe.channels, recipe.side), len(source))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


# Arithmetic


def test_the_schedule_warms_up_in_a_line_and_ends_in_a_cosine() -> None:
    assert [schedule(step, 100, 4) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    # This is half of the 96 steps of cosine.
    assert schedule(4 + 48, 100, 4) == pytest.approx(0.5)
    assert schedule(4 + 24, 100, 4) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    falling = [schedule(step, 100, 4) for step in range(4, 100)]
    assert all(earlier > later > 0 for earlier, later in pairwise(falling))
    assert falling[-1] < 1e-3


def test_the_schedule_without_warm_up_begins_at_the_peak() -> None:
    assert schedule(0, 10, 0) == 1
    assert schedule(0, 1, 1) == 1


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    assert [schedule(step, 3, 10) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_per_dimension_std_of_one_point_and_of_the_axes() -> None:
    assert per_dimension_std(torch.ones(10, 4)) == 0
    # Each of 8 dimensions has one 1, one −1 and fourteen 0.
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert per_dimension_std(axes) == pytest.approx(math.sqrt(2 / 15))
    lengths = torch.arange(1.0, 17.0)[:, None]
    assert per_dimension_std(axes * lengths) == pytest.approx(math.sqrt(2 / 15))


def test_per_dimension_std_of_directions_of_all_kinds_is_one_over_root_d() -> None:
    directions = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    assert per_dimension_std(directions) == pytest.approx(1 / math.sqrt(256), rel=0.01)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(loss: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"the loss is {loss} at step 40; lower learning_rate"):
        check_health(loss, 0.1, 100, 40)


def test_collapse_is_a_hundredth_of_the_healthy_spread() -> None:
    check_health(1.0, 0.00101, 100, 20)
    with pytest.raises(InvalidRequest, match="the embeddings collapsed to one point by step 20"):
        check_health(1.0, 0.00099, 100, 20)


def test_statistics_are_those_of_all_pixels_channel_by_channel() -> None:
    pixels = torch.randint(0, 256, (2300, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, 1] //= 3
    # The last pictures count as well.
    pixels[2200:, 2] = 255
    mean, std = statistics(pixels)
    values = pixels.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean.numpy(), values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), values.std((0, 2, 3)), rtol=1e-6)


def test_what_fits_a_time_is_the_pace_and_what_is_left_to_decode(tmp_path: Path) -> None:
    canvas = Canvas(open_source("digits[:500]"), square_preprocessing(8), 1, tmp_path, CPU)
    # 50 steps took 10 s, of which decoding 100 pictures took 5 s: 0.1 s a step and 0.05 s a picture.
    canvas.take(np.arange(100))
    assert canvas.untouched() == 400
    # 50 s are left, 20 of them for 400 pictures.
    assert planned_total(Progress(50, None, 10.0, 5.0), 60.0, 100, canvas) == 50 + 300
    canvas.take(np.arange(500))
    assert planned_total(Progress(50, None, 10.0, 5.0), 60.0, 100, canvas) == 50 + 500
    assert planned_total(Progress(50, None, 10.0, 0.0), 60.0, 100, canvas) == 50 + 250
    # The time is over.
    assert planned_total(Progress(50, None, 70.0, 0.0), 60.0, 100, canvas) == 50
    # 53 s at 2 s a step leave half a step, which is not begun.
    assert planned_total(Progress(3, None, 7.0, 1.0), 60.0, 100, canvas) == 3 + 26
    canvas.close()


def test_what_is_decoded_at_every_epoch_is_part_of_the_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_DISK_LEFT", 2**62)
    names = cast("Sequence[str]", Labels(np.zeros(20_000_000, np.uint8), ["one of them"]))
    source = Source("more than memory", names, open_source("digits[:1]").read, None)
    canvas = Canvas(source, square_preprocessing(512), 3, tmp_path, CPU)
    assert canvas.residence == "nowhere"
    assert planned_total(Progress(50, None, 10.0, 5.0), 60.0, 100, canvas) == 50 + 250
    canvas.close()


# Training pictures


def test_the_material_is_what_the_pixels_say(recipe: Recipe, prepared: Prepared) -> None:
    source = open_source("digits")
    material = prepared(source, recipe)
    pixels = material.canvas.take(np.arange(1797))[0]
    mean, std = statistics(pixels)
    assert torch.equal(material.mean, mean)
    assert torch.equal(material.std, std)
    assert material.tones == pytest.approx(tones(pixels.numpy().transpose(0, 2, 3, 1).repeat(3, axis=3)), abs=2e-4)
    assert material.labels is not None
    assert source.labels is not None
    assert [source.labels.names[code] for code in material.labels] == list(source.labels)


def test_held_out_pictures_are_a_twentieth_and_never_trained_on(recipe: Recipe, prepared: Prepared) -> None:
    material = prepared(open_source("digits"), recipe)
    assert len(material.held_out) == 1797 // 20
    # They come from all parts of the source.
    assert np.abs(np.diff(material.held_out) - 1797 / 89).max() <= 1.5
    assert sorted([*material.held_out, *material.trained]) == list(range(1797))


@pytest.mark.parametrize(("name", "held_out"), [("digits[:399]", 0), ("digits[:400]", 20)])
def test_of_few_pictures_none_are_held_out(name: str, held_out: int, recipe: Recipe, prepared: Prepared) -> None:
    assert len(prepared(open_source(name), recipe).held_out) == held_out


@pytest.mark.parametrize("method", ["simclr", "supcon", "triplet"])
def test_pictures_without_a_label_are_no_queries_and_no_voters(
    method: str, recipe: Recipe, prepared: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = open_source("digits[:900]")
    assert digits.labels is not None
    labels = [None if position % 3 == 0 else label for position, label in enumerate(digits.labels)]
    material = prepared(replace(digits, labels=Labels.of(labels)), recipe.model_copy(update={"method": method}))
    assert len(material.held_out) == 600 // 20
    assert all(position % 3 for position in (*material.held_out, *material.voters))
    assert len(material.voters) == 570
    assert len(material.trained) == {"simclr": 870, "supcon": 870, "triplet": 570}[method]
    assert ("300 pictures without a label are left out" in capsys.readouterr().err) == (method == "triplet")


def test_few_labelled_pictures_fill_their_share_of_a_batch(recipe: Recipe, prepared: Prepared) -> None:
    digits = open_source("digits[:300]")
    assert digits.labels is not None
    labels = [label if position < 30 else None for position, label in enumerate(digits.labels)]
    recipe = changed(recipe, method="supcon", supcon={"labelled": 0.4})
    material = prepared(replace(digits, labels=Labels.of(labels)), recipe)
    drawn = material.drawn(recipe)
    # Of 450 pictures drawn 180 have a label: each of the 30 six times.
    assert np.bincount(drawn).tolist() == [6] * 30 + [1] * 270
    assert material.drawn(changed(recipe, method="simclr")) is material.trained


def test_without_labels_none_are_held_out(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    source = open_source("digits[:500]")
    unlabelled = Source("unlabelled", source.ids, source.read, None)
    material = prepared(unlabelled, recipe)
    assert material.labels is None
    assert len(material.held_out) == 0
    assert len(material.trained) == 500
    run = train(method_for(recipe, unlabelled), material, Identity("digits", recipe), tmp_path).progress
    assert run.step == 2 * (500 // 64)
    assert not [line for line in lines(tmp_path) if "knn" in line]


class Noting(SimCLR):
    """SimCLR that records its pictures and their labels."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noted: list[tuple[Tensor, Tensor | None]] = []

    def step(self, batch: Batch) -> Step:
        self.noted.append((batch.positions, batch.labels))
        return super().step(batch)


def test_no_batch_has_a_held_out_picture_and_each_picture_its_own_label(
    recipe: Recipe, prepared: Prepared, tmp_path: Path
) -> None:
    source = open_source("digits[:640]")
    material = prepared(source, recipe)
    method = Noting(recipe, build_backbone("small-cnn", 1, 8), len(source))
    train(method, material, Identity("digits", recipe), tmp_path)
    assert len(method.noted) == 2 * (608 // 64)
    assert material.labels is not None
    for positions, labels in method.noted:
        assert not set(positions.tolist()) & set(material.held_out.tolist())
        assert labels is not None
        assert labels.tolist() == material.labels[positions].tolist()


class NotingCrops(DINO):
    """DINO that records what it was given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noted: list[Batch] = []

    def step(self, batch: Batch) -> Step:
        self.noted.append(batch)
        return super().step(batch)


@pytest.mark.parametrize(("local_side", "side"), [(None, 4), (6, 6), (8, 8)])
def test_dino_gets_local_views_of_each_picture_at_their_own_side(
    local_side: int | None, side: int, recipe: Recipe, prepared: Prepared, tmp_path: Path
) -> None:
    table = {"local_views": 3, "local_side": local_side, "local_area": (0.2, 0.3)}
    recipe = changed(recipe, method="dino", dino=table, augmentation=Augmentation().model_dump())
    source = open_source("digits[:320]")
    material = prepared(source, recipe)
    method = NotingCrops(recipe, build_backbone("small-cnn", 1, 8), len(source))
    run = train(method, material, Identity("digits", recipe), tmp_path).progress
    assert [batch.progress for batch in method.noted] == [number / run.step for number in range(run.step)]
    for batch in method.noted:
        assert batch.local is not None
        assert batch.views.shape == (2, 64, 1, 8, 8)
        assert batch.local.shape == (3, 64, 1, side, side)
        # No change but the crop: a global view is the whole picture, and no two local views are alike.
        assert torch.equal(batch.views[0], batch.views[1])
        pictures = batch.views[0].flatten(1)
        assert bool((batch.local.amax((0, 2, 3, 4)) <= pictures.amax(1) + 1e-5).all())
        assert bool((batch.local.amin((0, 2, 3, 4)) >= pictures.amin(1) - 1e-5).all())
        assert not any(torch.equal(batch.local[i], batch.local[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


class NotingViews(SimCLR):
    """SimCLR that records its views."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noted: list[Tensor] = []

    def step(self, batch: Batch) -> Step:
        self.noted.append(batch.views)
        return super().step(batch)


def test_views_have_the_side_that_the_recipe_names(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    recipe = changed(recipe, side=16, view_side=8, views=3, augmentation=Augmentation().model_dump())
    source = open_source("digits[:320]")
    material = prepared(source, recipe)
    method = NotingViews(recipe, build_backbone("small-cnn", 1, 16), len(source))
    train(method, material, Identity("digits", recipe), tmp_path)
    assert {view.shape for view in method.noted} == {(3, 64, 1, 8, 8)}
    pixels, _ = material.canvas.take(material.trained)  # (n, 1, 16, 16): the encoder keeps its own side
    # No change but the side: each pixel of a view is the mean of four of the picture.
    halved = pixels.numpy().reshape(-1, 8, 2, 8, 2).mean((2, 4)) / 255
    expected = (halved - float(material.mean)) / float(material.std)  # (n, 8, 8)
    for view in method.noted[0][0]:
        assert np.abs(expected - view.numpy()).max((1, 2)).min() < 1e-4


@pytest.mark.parametrize(("method", "local_views"), [("dino", 0), ("simclr", 6)])
def test_no_local_views_are_made_where_none_are_wanted(
    method: str, local_views: int, recipe: Recipe, prepared: Prepared
) -> None:
    recipe = changed(recipe, method=method, dino={"local_views": local_views})
    source = open_source("digits[:320]")
    material = prepared(source, recipe)
    learner = Learner(method_for(recipe, source), material, recipe, None)
    before = learner.checkpoint(material, Identity("digits", recipe), Progress()).random["views"]
    learner.step(load(material, recipe, Progress()), Progress(total=2))
    generator = Generator().manual_seed(0)
    generator.set_state(before)
    pictures = torch.zeros(64, 1, 8, 8)
    for _ in range(2):
        augment(pictures, recipe.augmentation, generator)
    # The random numbers were drawn for two views and for nothing else.
    after = learner.checkpoint(material, Identity("digits", recipe), Progress()).random["views"]
    assert torch.equal(after, generator.get_state())


# Online k-NN


def sklearns_accuracy(backbone: torch.nn.Module, source: Source, material: Material) -> float:
    """The headline figure, by scikit-learn, of the pictures as decoded one by one."""
    canvas = Canvas(source, square_preprocessing(8), 1, material.canvas._path.parent, CPU)
    pixels = canvas.take(np.arange(len(source)))[0]
    canvas.close()
    backbone.eval()
    with torch.no_grad():
        embeddings = backbone((pixels.float() / 255 - material.mean) / material.std).numpy()
    backbone.train()
    assert material.labels is not None

    def votes(distances: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        weights: np.ndarray[Any, Any] = np.exp((1 - distances) / 0.07)
        return weights

    neighbours = KNeighborsClassifier(20, weights=votes, metric="cosine", algorithm="brute")
    neighbours.fit(embeddings[material.trained], material.labels[material.trained])
    found = neighbours.predict(embeddings[material.held_out])
    return float((found == material.labels[material.held_out]).mean())


def test_online_knn_is_scikit_learns_figure(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    source = open_source("digits[:900]")
    material = prepared(source, recipe)
    method = method_for(recipe, source)
    train(method, material, Identity("digits", recipe), tmp_path)
    expected = sklearns_accuracy(method.backbone, source, material)
    assert 0.5 < expected < 1
    logged = [line["knn"] for line in lines(tmp_path) if "knn" in line]
    assert logged[-1] == pytest.approx(expected, abs=1e-6)
    before = deepcopy(dict(method.backbone.state_dict()))
    assert online_knn(method.backbone, material, "float32", 4000) == expected
    # The network is in training mode again.
    assert method.backbone.training
    # The batch norms learned nothing from the evaluation.
    assert_same(before, dict(method.backbone.state_dict()))


def test_online_knn_comes_five_times_evenly(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    source = open_source("digits[:640]")
    # 5 epochs of 9 steps are 45.
    recipe = changed(recipe, epochs=5)
    train(method_for(recipe, source), prepared(source, recipe), Identity("digits", recipe), tmp_path)
    assert [line["step"] for line in lines(tmp_path) if "knn" in line] == [9, 18, 27, 36, 45]


# The loop


def test_pixels_that_reside_on_the_device_make_the_same_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs have two epochs and bad pictures, which both skip. A resumed run is the same, too."""
    monkeypatch.setattr(materials, "_SAMPLED", 40)
    digits = open_source("digits[:240]")
    source = Source("flawed", digits.ids, lambda at: b"" if at % 40 == 7 else digits.read(at), digits.labels)
    recipe = changed(recipe, batch_size=32)
    work(recipe, source, tmp_path / "lazy")
    with ctrl_c_after(8):
        work(changed(recipe, resident=True), source, tmp_path / "resident")
    work(changed(recipe, resident=True), source, tmp_path / "resident")
    lazy, resident = checkpoint(tmp_path / "lazy"), checkpoint(tmp_path / "resident")
    assert len(resident["canvas"]["bad"]) == 6
    for key in ("step", "loss", "method", "optimizer", "random"):
        assert_same(lazy[key], resident[key], key)


def test_sgd_is_the_textbooks(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    """w − rate · (momentum · 0 + gradient + decay · w) after one step; the gradient is autograd's."""
    source = open_source("digits[:64]")
    recipe = changed(recipe, epochs=1, optimizer="sgd", weight_decay=0.1, warmup=0)
    method, stepped = method_for(recipe, source), list[Tensor]()
    before = [weight.detach().clone() for weight in method.parameters()]

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        stepped.extend(weight.grad.clone() for group in optimizer.param_groups for weight in group["params"])

    hook = register_optimizer_step_pre_hook(note)
    try:
        train(method, prepared(source, recipe), Identity("digits", recipe), tmp_path)
    finally:
        hook.remove()
    for weight, was, gradient in zip(method.parameters(), before, stepped, strict=True):
        torch.testing.assert_close(weight, was - recipe.learning_rate * (gradient + 0.1 * was))


def test_a_session_ends_in_time_and_the_next_one_goes_on(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    source = open_source("digits[:128]")
    method, material, identity = method_for(recipe, source), prepared(source, recipe), Identity("digits", recipe)
    first = train(method, material, identity, tmp_path, session_s=0)
    assert (first.progress.step, first.progress.total) == (1, 4)
    assert checkpoint(tmp_path)["step"] == 1
    assert train(method, material, identity, tmp_path, read_checkpoint(tmp_path)).progress.step == 4


def test_a_learning_rate_far_too_high_ends_with_a_sentence(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    source = open_source("digits[:512]")
    recipe = changed(recipe, learning_rate=1e30, epochs=4, warmup=0)
    with pytest.raises(InvalidRequest, match=r"the loss is (nan|inf) at step 20; lower learning_rate"):
        train(method_for(recipe, source), prepared(source, recipe), Identity("digits", recipe), tmp_path)
    assert read_checkpoint(tmp_path) is None


def test_pictures_all_alike_end_with_a_sentence(recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(recipe, augmentation=Augmentation().model_dump(), epochs=3)
    digits = open_source("digits[:512]")
    alike = Source("alike", digits.ids, lambda _: digits.read(0), None)
    canvas = Canvas(alike, square_preprocessing(8), 1, tmp_path, CPU)
    material = Material(
        canvas, None, np.arange(512), np.arange(0), torch.tensor([0.3]), torch.tensor([0.35]), [1 / 16] * 16, 0
    )
    with pytest.raises(InvalidRequest, match=r"the embeddings collapsed to one point by step 20 .*pictures all alike"):
        train(method_for(recipe, alike), material, Identity("digits", recipe), tmp_path)
    canvas.close()


def test_a_few_dozen_steps_lower_the_loss(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    recipe = changed(recipe, epochs=6)
    source = open_source("digits[:512]")
    method, material = method_for(recipe, source), prepared(source, recipe)
    generator = torch.Generator().manual_seed(99)
    pictures = material.canvas.take(np.arange(256))[0].float() / 255

    def loss_now() -> float:
        views = torch.stack([augment(pictures, recipe.augmentation, generator) for _ in range(2)])
        batch = Batch((views - material.mean) / material.std, torch.arange(256), None)
        with torch.no_grad():
            return float(method.step(batch).loss)

    before = loss_now()
    run = train(method, material, Identity("digits", recipe), tmp_path).progress
    # 25 pictures are held out.
    assert run.step == 6 * (487 // 64)
    assert run.seconds > 0
    assert loss_now() < before - 0.5
    # The last term is the loss at chance.
    assert run.loss < math.log(2 * 64 - 1) - 1


def test_a_time_too_short_for_the_timed_steps_is_kept(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    source = open_source("digits[:512]")
    run = train(
        method_for(recipe, source), prepared(source, recipe), Identity("digits", recipe, minutes=1e-6), tmp_path
    ).progress
    assert run.step == 1


def test_a_time_replaces_the_epochs(recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    source = open_source("digits[:80]")
    # One epoch alone would be one step.
    recipe = changed(recipe, epochs=1)
    assert (
        train(
            method_for(recipe, source), prepared(source, recipe), Identity("digits", recipe, minutes=0.02), tmp_path
        ).progress.step
        > 1
    )


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 14), (2, 7), (3, 4), (15, 1)])
def test_accumulated_batches_share_a_step(
    accumulate: int, steps: int, recipe: Recipe, prepared: Prepared, tmp_path: Path
) -> None:
    recipe = changed(recipe, batch_size=32, accumulate=accumulate)
    # An epoch has 7 batches.
    source = open_source("digits[:240]")
    assert (
        train(method_for(recipe, source), prepared(source, recipe), Identity("digits", recipe), tmp_path).progress.step
        == steps
    )


def test_two_accumulated_batches_make_the_mean_of_their_gradients(
    recipe: Recipe, prepared: Prepared, tmp_path: Path
) -> None:
    recipe = changed(recipe, batch_size=32, accumulate=2, epochs=1)
    source = open_source("digits[:64]")
    material = prepared(source, recipe)
    stepped: list[list[Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        stepped.append([weight.grad.clone() for group in optimizer.param_groups for weight in group["params"]])

    hook = register_optimizer_step_pre_hook(note)
    try:
        run = train(method_for(recipe, source), material, Identity("digits", recipe), tmp_path).progress
    finally:
        hook.remove()
    assert run.step == 1

    method = method_for(recipe, source).to(memory_format=torch.channels_last).train()
    weights = [weight for weight in method.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(recipe.seed)
    order = batches(material.canvas, material.trained, 32, recipe.seed, Cursor())
    gradients: list[tuple[Tensor, ...]] = []
    for pixels, positions, _ in (next(order), next(order)):
        views = torch.stack([augment(pixels.float() / 255, recipe.augmentation, generator) for _ in range(2)])
        loss = method.step(Batch((views - material.mean) / material.std, positions, None)).loss
        gradients.append(torch.autograd.grad(loss, weights))
    for found, *both in zip(stepped[0], *gradients, strict=True):
        torch.testing.assert_close(found, torch.stack(both).mean(0), rtol=1e-4, atol=1e-7)
    assert any((first - second).abs().max() > 1e-3 for first, second in zip(*gradients, strict=True))


def test_the_same_seed_repeats_to_the_last_bit_and_another_does_not(
    recipe: Recipe, prepared: Prepared, tmp_path: Path
) -> None:
    source = open_source("digits[:512]")

    def weights(seed: int) -> Tensor:
        seeded = changed(recipe, seed=seed)
        # The weights are the same at the start.
        method = method_for(changed(recipe, seed=0), source)
        train(method, prepared(source, seeded), Identity("digits", seeded), tmp_path)
        return torch.cat([value.flatten().float() for value in method.state_dict().values()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


# A resumed run equals an uninterrupted one


@contextmanager
def pressing(steps: int, times: int = 1, number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Press Ctrl-C, or send another signal, after so many steps of the optimizer."""
    done = count(1)

    def press(*arguments: object) -> None:
        if next(done) == steps:
            for _ in range(times):
                signal.raise_signal(number)

    hook = register_optimizer_step_post_hook(press)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def ctrl_c_after(steps: int) -> Iterator[None]:
    """Press Ctrl-C after so many steps, and check that it ends the run."""
    with pressing(steps), pytest.raises(KeyboardInterrupt):
        yield


def work(recipe: Recipe, source: Source, folder: Path, minutes: float | None = None) -> Progress:
    """Train in this folder as pretrain() does, from its checkpoint if it has one."""
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(recipe.backbone, recipe.channels, recipe.side, None, recipe.frozen)
    method = build_method(recipe, backbone, len(source))
    folder.mkdir(exist_ok=True)
    earlier = read_checkpoint(folder)
    material = prepare(source, recipe, folder, CPU, earlier)
    try:
        return train(method, material, Identity("digits", recipe, minutes=minutes), folder, earlier).progress
    finally:
        material.canvas.close()


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Compare two checkpoints to the last bit."""
    assert type(first) is type(second), where
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}[{place}]")
    else:
        assert first == second, where


def assert_resumed_as_if_never_stopped(
    recipe: Recipe, source: Source, folder: Path, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run to the end, and again with a Ctrl-C after each of these numbers of steps; compare logs and states."""
    # The loss of every step is logged.
    monkeypatch.setattr(loop, "_WATCHED", 1)
    straight, broken = folder / "straight", folder / "broken"
    run = work(recipe, source, straight)
    done = 0
    for steps in stops:
        with ctrl_c_after(steps):
            work(recipe, source, broken)
        done += steps
        assert checkpoint(broken)["step"] == done
    assert done < run.step
    resumed = work(recipe, source, broken)
    assert (resumed.step, resumed.loss) == (run.step, run.loss)
    took = ("seconds", "waited")
    first, second = (
        {key: value for key, value in checkpoint(place).items() if key not in took} for place in (straight, broken)
    )
    assert_same(first, second)
    took = ("seconds", "pictures_per_s")
    traces = [
        [{key: value for key, value in line.items() if key not in took} for line in lines(place)]
        for place in (straight, broken)
    ]
    assert len([line for line in traces[0] if "loss" in line]) == run.step
    assert traces[0] == traces[1]


# Each picture has one of two captions, drawn anew in each step.
WORDS: dict[str, object] = {
    "words": {str(number): f"digit {'abcdefghij'[number] * 2}" for number in range(10)},
    "templates": ["{label}", "a picture of {label}"],
    "width": 16, "layers": 1, "heads": 2, "vocabulary": 300,
}  # fmt: skip
TWICE = pytest.mark.slow("trains a run twice, once with interruptions")
SETTINGS: dict[str, dict[str, object]] = {
    # The queue wraps around.
    "moco": {"queue": 96, "splits": 4},
    # Clustering runs once an epoch.
    "clusters": {"clusters": 8},
}


@pytest.mark.parametrize("name", some_slow(METHODS, "trains each method twice", kept=("moco",)))
def test_every_method_goes_on_to_the_last_bit(
    name: MethodName, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {name: SETTINGS[name]} if name in SETTINGS else {}
    if name == "clip":
        settings = {"text": WORDS, "views": 1}
    recipe = changed(recipe, method=name, batch_size=32, epochs=3, **settings)
    # 7 batches an epoch: 21 steps, stopped in the middle of the first epoch and just before the end of the second
    assert_resumed_as_if_never_stopped(recipe, open_source("digits[:240]"), tmp_path, (5, 8), monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"accumulate": 2}, marks=TWICE),
        pytest.param({"views": 3}, marks=TWICE),
        {"method": "moco", "views": 3, "accumulate": 2, "moco": {"queue": 96, "splits": 4}},
        pytest.param({"augmentation": {"preset": "photos"}, "channels": 3}, marks=TWICE),
        pytest.param(
            {"method": "dino", "accumulate": 2, "dino": {"local_views": 3, "local_side": 6, "frozen": 0.5}}, marks=TWICE
        ),
    ],
    ids=["accumulated", "three views", "both with MoCo", "all augmentations", "local views with DINO"],
)
def test_views_and_accumulation_go_on_to_the_last_bit(
    changes: dict[str, object], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, batch_size=32, **changes)
    assert_resumed_as_if_never_stopped(recipe, open_source("digits[:320]"), tmp_path, (3, 4), monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "frozen": ["0", "1"], "backbone_rate": 0.5, "layer_decay": 0.5, "decay_norms": False},
        pytest.param({"optimizer": "lars", "learning_rate": 0.1}, marks=TWICE),
        pytest.param({"optimizer": "sgd", "nesterov": True, "momentum": 0.8}, marks=TWICE),
    ],
    ids=["average and layers", "LARS", "Nesterov"],
)
def test_optimizers_and_averages_go_on_to_the_last_bit(
    changes: dict[str, object], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, batch_size=32, **changes)
    assert_resumed_as_if_never_stopped(recipe, open_source("digits[:320]"), tmp_path, (3, 4), monkeypatch)


def test_the_average_is_the_encoder_of_a_run(recipe: Recipe, tmp_path: Path) -> None:
    recipe, source = changed(recipe, batch_size=32, ema=0.9), open_source("digits[:320]")
    method, folder = method_for(recipe, source), tmp_path / "run"
    folder.mkdir()
    material = prepare(source, recipe, folder, CPU)
    train(method, material, Identity("digits", recipe), folder)
    material.canvas.close()
    done = read_checkpoint(folder)
    assert done is not None
    assert done.average is not None
    loaded = build_backbone(recipe.backbone, 1, 8, str(folder / "checkpoint.pt")).module.state_dict()
    for key, value in method.backbone.state_dict().items():
        assert torch.equal(value, done.average[key]), key
        assert torch.equal(value, loaded[key]), key
    assert not torch.equal(done.average["0.weight"], done.method["backbone.0.weight"])


def test_frozen_parts_of_a_backbone_do_not_change(recipe: Recipe, tmp_path: Path) -> None:
    recipe, source = changed(recipe, batch_size=32, frozen=("0", "1")), open_source("digits[:320]")
    torch.manual_seed(0)
    method = build_method(recipe, build_backbone(recipe.backbone, 1, 8, None, recipe.frozen), len(source))
    before = {key: value.clone() for key, value in method.backbone.state_dict().items()}
    material = prepare(source, recipe, tmp_path, CPU)
    # Between the steps the held-out pictures are embedded, in eval mode.
    train(method, material, Identity("digits", recipe), tmp_path)
    material.canvas.close()
    same = {key for key, value in method.backbone.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.split(".")[0] in ("0", "1")}


def test_pixels_are_normalised_as_the_weights_want(recipe: Recipe, tmp_path: Path) -> None:
    source, own = open_source("digits[:320]"), Normalisation((0.1, 0.2, 0.3), (0.5, 0.5, 0.8))

    def found(recipe: Recipe, earlier: Checkpoint | None = None) -> list[float]:
        material = prepare(source, recipe, tmp_path, CPU, earlier, normalisation=own)
        material.canvas.close()
        return [*material.mean.tolist(), *material.std.tolist()]

    assert found(changed(recipe, channels=3)) == pytest.approx([*own.mean, *own.std])
    assert found(recipe) == pytest.approx([0.2, 0.6])
    assert found(changed(recipe, mean=(0.4,), std=(0.3,))) == pytest.approx([0.4, 0.3])


@pytest.mark.slow("trains a network of 32x32 pixels twice")
def test_a_backbone_with_dropout_goes_on_to_the_last_bit(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, backbone="mobilenet_v3_small", side=32, channels=3, batch_size=16)
    assert_resumed_as_if_never_stopped(recipe, open_source("digits[:48]"), tmp_path, (2, 2), monkeypatch)


def test_bad_pictures_and_a_canvas_on_disk_go_on_to_the_last_bit(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run has a record of bad pictures and skips them without reading."""
    # The other bad pictures are found in training.
    monkeypatch.setattr(materials, "_SAMPLED", 40)
    monkeypatch.setattr(data, "_SMALL", 0)
    monkeypatch.setattr(data, "_DISK_LEFT", 0)
    # Some of the pictures are held out.
    digits = open_source("digits[:420]")
    source = Source(
        "flawed", digits.ids, lambda position: b"" if position % 30 == 1 else digits.read(position), digits.labels
    )
    assert_resumed_as_if_never_stopped(changed(recipe, batch_size=32), source, tmp_path, (3, 9), monkeypatch)
    found = checkpoint(tmp_path / "broken")["canvas"]
    assert found["residence"] == "disk"
    assert sorted(found["bad"]) == list(range(1, 420, 30))
    assert len([line for line in lines(tmp_path / "broken") if "knn" in line]) == 5


def slowly(seconds: float, after: int) -> Any:
    """Make every step of an optimizer but the first few take so much longer, as on a machine that becomes busy."""
    done = count(1)
    return register_optimizer_step_post_hook(lambda *_: time.sleep(seconds if next(done) > after else 0))


def test_a_deadline_holds_on_a_machine_that_becomes_busy(
    recipe: Recipe, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_TIMED_STEPS", 5)
    source = open_source("digits[:80]")
    hook = slowly(0.05, after=20)
    try:
        identity = Identity("digits", recipe, minutes=0.03)
        run = train(method_for(recipe, source), prepared(source, recipe), identity, tmp_path).progress
    finally:
        hook.remove()
    # Of 1.8 s; the pace of the first steps, kept, would take ten times as long.
    assert run.seconds < 2.1
    assert run.step == run.total
    rates = [line["learning_rate"] for line in lines(tmp_path) if "learning_rate" in line]
    assert rates[-1] < 0.1 * recipe.learning_rate


def test_a_part_of_the_run_is_reached_once_however_often_the_plan_changes() -> None:
    assert [part(Progress(step, 10), 5) for step in (0, 1, 2, 9, 10)] == [0, 0, 1, 4, 5]
    assert part(Progress(7, None), 5) == 0
    assert part(Progress(0, 0), 5) == 0


def test_more_minutes_extend_a_run_and_other_settings_do_not(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_TIMED_STEPS", 2)
    source, folder = open_source("digits[:80]"), tmp_path / "out.run"
    first = work(recipe, source, folder, 0.01)
    assert first.step == first.total
    one, two = Identity("digits", recipe, minutes=0.01), Identity("digits", recipe, minutes=0.02)
    assert resumable(tmp_path / "out", two, True) is not None
    with pytest.raises(InvalidRequest, match=r"begun with minutes 0\.01, now it is 0\.005"):
        resumable(tmp_path / "out", replace(one, minutes=0.005), True)
    with pytest.raises(InvalidRequest, match=r"begun with minutes 0\.01, now it is None"):
        resumable(tmp_path / "out", replace(one, minutes=None), True)
    second = work(recipe, source, folder, 0.02)
    assert second.step == second.total
    assert second.step > first.step
    assert first.seconds + 0.3 < second.seconds < 1.5
    assert "goes on from 0.01 to 0.02 minutes: the learning rate begins again at" in capsys.readouterr().err
    assert checkpoint(folder)["identity"]["minutes"] == 0.02


# What is there already


def test_a_finished_encoder_is_not_replaced_without_a_word(tiny_model: Path, recipe: Recipe) -> None:
    identity = Identity("digits", recipe)
    before = (tiny_model / "model.onnx").read_bytes()
    with pytest.raises(InvalidRequest, match="an encoder was trained there already; train it longer with --resume"):
        pretrain("digits", recipe, tiny_model, None, "cpu", Path("data"))
    assert (tiny_model / "model.onnx").read_bytes() == before
    assert resumable(tiny_model, identity, True) is not None
    assert resumable(tiny_model, identity, False, overwrite=True) is None
    with pytest.raises(InvalidRequest, match="expected one of them"):
        resumable(tiny_model, identity, True, overwrite=True)


def test_an_encoder_without_its_run_is_not_replaced_by_resume(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for resume in (False, True):
        with pytest.raises(InvalidRequest, match="an encoder was trained there already"):
            resumable(tmp_path / "out", Identity("digits", recipe), resume)


def test_a_run_that_overwrites_keeps_the_earlier_one_until_it_is_whole(recipe: Recipe, tmp_path: Path) -> None:
    source, out, folder = open_source("digits[:128]"), tmp_path / "out", tmp_path / "out.run"
    kept = earlier_run(folder)
    out.mkdir()
    work(recipe, source, folder)
    whole = (folder / "checkpoint.pt").read_bytes()
    set_aside(folder)
    assert (kept / "checkpoint.pt").read_bytes() == whole
    assert not folder.exists()
    with ctrl_c_after(2):
        work(recipe, source, folder)
    # Before its first checkpoint and after it, the new run may be resumed.
    identity = Identity("digits", recipe)
    found = resumable(out, identity, True)
    assert found is not None
    assert found.progress.step == 2
    (folder / "checkpoint.pt").unlink()
    assert resumable(out, identity, True) is None
    # It may also be overwritten, which costs the unfinished one alone.
    set_aside(folder)
    assert (kept / "checkpoint.pt").read_bytes() == whole
    # One that was finished and not cleared away is the one to keep.
    work(recipe, source, folder)
    newer = (folder / "checkpoint.pt").read_bytes()
    set_aside(folder)
    assert (kept / "checkpoint.pt").read_bytes() == newer


def test_weights_of_a_run_are_taken_as_they_stand(tiny_model: Path, recipe: Recipe, tmp_path: Path) -> None:
    run = tiny_model.with_name(f"{tiny_model.name}.run")
    trained = checkpoint(run)["method"]
    for init in (tiny_model, run, run / "checkpoint.pt"):
        file = weights_file(str(init))
        module = build_backbone(recipe.backbone, recipe.channels, recipe.side, file).module
        for key, value in module.state_dict().items():
            assert torch.equal(value, trained[f"backbone.{key}"]), key
    with pytest.raises(InvalidRequest, match="is of a run with the backbone small-cnn, not resnet18"):
        build_backbone("resnet18", 1, 64, str(run / "checkpoint.pt"))
    with pytest.raises(InvalidRequest, match="an exported model alone cannot be trained further"):
        weights_file(str(tmp_path))
    assert weights_file("DEFAULT") == "DEFAULT"


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_a_torchvision_run_are_taken_as_they_stand(channels: int, tmp_path: Path) -> None:
    trained = build_backbone("resnet18", channels, 16).module.state_dict()
    method = {f"backbone.{key}": value for key, value in trained.items()}
    statistics = {"mean": torch.full((channels,), 0.25), "std": torch.full((channels,), 0.5)}
    content = {"identity": {"recipe": {"backbone": "resnet18"}}, "method": method, "statistics": statistics}
    torch.save(content, tmp_path / "checkpoint.pt")
    file = weights_file(str(tmp_path))
    backbone = build_backbone("resnet18", channels, 16, file)
    assert backbone.normalisation == ((0.25,) * channels, (0.5,) * channels)
    for key, value in backbone.module.state_dict().items():
        assert torch.equal(value, trained[key]), key
    if channels == 1:
        with pytest.raises(InvalidRequest, match="weights for grey pictures; this run has 3 channels"):
            build_backbone("resnet18", 3, 16, file)


def test_a_run_that_makes_it_worse_says_so(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = open_source("digits[:640]"), tmp_path / "run"
    recipe = changed(recipe, epochs=1)
    work(recipe, source, folder)
    done = read_checkpoint(folder)
    assert done is not None
    material = prepare(source, recipe, folder, CPU, done)
    good, bad = method_for(recipe, source), method_for(recipe, source)
    good.load_state_dict(done.method)
    with torch.no_grad():
        for weight in bad.backbone.parameters():
            weight.fill_(0.0)
    capsys.readouterr()
    compare_with_untrained(bad.backbone, good, material, done)
    assert capsys.readouterr().err == ""
    compare_with_untrained(good.backbone, bad, material, done)
    material.canvas.close()
    assert re.search(
        r"warning: k-NN of held-out pictures is [01]\.\d+, below the [01]\.\d+ of the random encoder that it began as",
        capsys.readouterr().err,
    )


# The whole command


def test_pretraining_writes_what_it_was(tiny_model: Path, recipe: Recipe) -> None:
    card = json.loads((tiny_model / "card.json").read_text())
    assert card["method"] == "simclr"
    assert card["recipe"] == recipe.facts()
    assert Recipe.model_validate(card["recipe"]) == recipe
    assert card["data"]["source"] == "digits"
    assert card["data"]["pictures"] == 1797
    assert card["data"]["held_out"] == 89
    assert card["run"]["steps"] == 2 * (1708 // 64)
    assert card["run"]["device"] == "cpu"
    assert 0 < card["run"]["loss"] < math.log(2 * 64 - 1)


def test_afterwards_the_checkpoint_and_the_log_stay(tiny_model: Path) -> None:
    folder = tiny_model.with_name(f"{tiny_model.name}.run")
    assert checkpoint(folder)["step"] == checkpoint(folder)["total"] == 52
    assert lines(folder)[-1]["step"] == 52
    names = [path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")]
    assert sorted(names) == ["checkpoint.pt", "log.jsonl"]
    assert sorted(path.name for path in tiny_model.parent.iterdir()) == [tiny_model.name, folder.name]


@pytest.mark.slow("exports an encoder")
def test_a_channel_that_is_always_empty_does_no_harm(recipe: Recipe, tmp_path: Path, paint: Paint) -> None:
    for number in range(16):
        path = tmp_path / "cells" / f"{number}.png"
        paint(path, 8, 8, seed=number)
        pixels = np.array(Image.open(path))
        # The pictures resemble two-colour microscopy.
        pixels[..., 2] = 0
        Image.fromarray(pixels).save(path)
    recipe = changed(recipe, channels=3, batch_size=8, epochs=1)
    pretrain(str(tmp_path / "cells"), recipe, tmp_path / "out", None, "cpu", tmp_path)
    assert math.isfinite(json.loads((tmp_path / "out" / "card.json").read_text())["run"]["loss"])


@pytest.mark.slow("exports three encoders")
def test_a_run_with_nothing_to_resume_starts_from_the_beginning_and_a_finished_one_may_start_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The canvas is a file in the run's folder.
    monkeypatch.setattr(data, "_SMALL", 0)
    monkeypatch.setattr(data, "_DISK_LEFT", 0)
    out, folder = tmp_path / "out", tmp_path / "out.run"
    recipe = changed(recipe, batch_size=32, epochs=1)
    digits = open_source("digits[:64]")
    for position, name in enumerate(digits.ids):
        path = tmp_path / "digits" / f"{name[-5:]}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if position in (7, 8, 30) else digits.read(position))

    def run(**options: Any) -> tuple[dict[str, Any], str]:
        account = pretrain(str(tmp_path / "digits"), recipe, out, None, "cpu", tmp_path, **options)
        rows = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
        assert (account.added, account.facts()["left_out"], account.lost, len(rows)) == (61, {"empty": 3}, 3, 3)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"wrote {out}; checkpoint and log are in {folder}" in printed.err
        assert not (folder / "canvas.bin").exists()
        return json.loads((out / "card.json").read_text()), printed.err

    card, printed = run(resume=True)
    assert f"{folder}: no checkpoint there; starting from the beginning" in printed
    listed = (folder / "bad-pictures.txt").read_text()
    assert listed == "".join(
        f"{name}.png\texpected the bytes of a picture, got none\n" for name in ("00007", "00008", "00030")
    )
    assert card["data"]["pictures"] == 61
    assert card["run"]["steps"] == 2
    for options in ({"overwrite": True}, {"resume": True}):
        again, printed = run(**options)
        assert "no checkpoint there" not in printed
        assert (again["run"]["loss"], again["fingerprint"]) == (card["run"]["loss"], card["fingerprint"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals,
    code: int,
    tiny_recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lookalike", *command(tiny_recipe_file, tmp_path / "out", "digits[:100]")[3:]])
    with pressing(1, number=number), pytest.raises(SystemExit) as ended:
        lookalike.main()
    assert ended.value.code == code
    assert "stopped at step 1; the same command with --resume goes on from here" in capsys.readouterr().err
    assert checkpoint(tmp_path / "out.run")["step"] == lines(tmp_path / "out.run")[-1]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]


def test_a_signal_in_the_last_step_lets_the_run_end(recipe: Recipe, tmp_path: Path) -> None:
    with pressing(2):
        assert work(recipe, open_source("digits[:64]"), tmp_path).step == 2
    assert checkpoint(tmp_path)["step"] == checkpoint(tmp_path)["total"] == 2


def test_the_second_ctrl_c_does_not_wait(recipe: Recipe, tmp_path: Path) -> None:
    # A script's background job starts with SIGINT ignored.
    before = signal.getsignal(signal.SIGINT)
    with pressing(1, times=2), pytest.raises(KeyboardInterrupt):
        work(recipe, open_source("digits[:128]"), tmp_path)
    assert read_checkpoint(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is before


# Refusals: one sentence, exit code 2, nothing half-written


def command(recipe_file: Path, out: Path, *arguments: object) -> list[str]:
    start = [sys.executable, "-m", "lookalike", "pretrain", "--recipe", recipe_file, "--out", out]
    return [str(word) for word in (*start, "--set", "precision=float32", "--device", "cpu", *arguments)]


@pytest.fixture
def refused(
    tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """refused(source, *arguments) runs `lookalike pretrain`, which must end with code 2; returns its one sentence."""

    def run(source: object, *arguments: object, out: Path = tmp_path / "out") -> str:
        before = snapshot(out.with_name(f"{out.name}.run"))
        monkeypatch.setattr(sys, "argv", ["lookalike", *command(tiny_recipe_file, out, source, *arguments)[3:]])
        with pytest.raises(SystemExit) as ended:
            lookalike.main()
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        *notes, sentence = printed.err.strip().splitlines()
        assert sentence.startswith("lookalike: ")
        assert not [note for note in notes if note.startswith("lookalike: ")]
        assert not out.exists()
        assert not list(out.parent.glob(".*"))
        left = snapshot(out.with_name(f"{out.name}.run"))
        if before:
            # A run that may still be resumed is as it was.
            assert left == before
        else:
            assert not set(left) & {"checkpoint.pt", "checkpoint.pt.tmp", "canvas.bin"}
        return sentence.removeprefix("lookalike: ")

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


Refused = Callable[..., str]


def test_a_missing_onnxruntime_is_noticed_before_training(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refused("digits") == (
        "the export needs onnxruntime, which is not installed here: install the extra cpu or gpu of lookalike"
    )
    assert not (tmp_path / "out.run").exists()


def test_an_unknown_key_is_refused_with_the_nearest_name(refused: Refused) -> None:
    assert refused("digits", "--set", "batchsize=32") == ("--set batchsize=32: unknown key; did you mean batch_size?")
    assert "did you mean simclr.temperature?" in refused("digits", "--set", "simclr.temprature=0.3")


def test_a_source_without_pictures_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: holds no picture; looked for .jpg" in refused(tmp_path / "empty")
    assert "nowhere: no such source; expected a folder" in refused(tmp_path / "nowhere")
    assert "holds none" in refused("digits[5:5]")


def test_fewer_pictures_than_a_batch_are_refused(refused: Refused) -> None:
    assert refused("digits[:63]") == (
        "digits[:63]: 63 pictures to train on make no batch of 64; add pictures or lower batch_size, "
        "as in --set batch_size=7"
    )
    assert "380 pictures to train on make no batch of 381" in refused("digits[:400]", "--set", "batch_size=381")


def test_one_picture_is_refused(refused: Refused) -> None:
    assert "digits[:1]: 1 pictures to train on make no batch of 64; add pictures" in refused("digits[:1]")


def test_pictures_all_identical_are_refused(refused: Refused, tmp_path: Path) -> None:
    same = open_source("digits").read(0)
    (tmp_path / "same").mkdir()
    for number in range(70):
        (tmp_path / "same" / f"{number}.png").write_bytes(same)
    assert refused(tmp_path / "same").endswith("all pictures are identical; there is nothing to learn")


@pytest.mark.parametrize("colour", [(0, 0, 0), (200, 200, 200), (10, 77, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_flat_pictures_are_refused(
    colour: tuple[int, int, int], channels: int, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(70):
        Image.new("RGB", (9, 9), colour).save(tmp_path / "flat" / f"{number}.png")
    sentence = refused(tmp_path / "flat", "--set", f"channels={channels}")
    assert sentence.endswith("all pictures are one flat colour; there is nothing to learn")


def test_a_refusal_takes_its_canvas_away(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvas may take half the disk."""
    monkeypatch.setattr(data, "_SMALL", 0)
    monkeypatch.setattr(data, "_DISK_LEFT", 0)
    (tmp_path / "flat").mkdir()
    for number in range(70):
        Image.new("L", (9, 9), 100).save(tmp_path / "flat" / f"{number}.png")
    # `refused` checks that canvas.bin is gone.
    assert "one flat colour" in refused(tmp_path / "flat")


def test_too_many_bad_pictures_are_refused_and_listed(refused: Refused, tmp_path: Path) -> None:
    digits = open_source("digits[:100]")
    (tmp_path / "some").mkdir()
    for number in range(100):
        content = b"no picture" if number % 16 == 5 else digits.read(number)
        (tmp_path / "some" / f"{number:02}.png").write_bytes(content)
    assert "6 of 100 pictures are bad, more than 5%; mend or remove them. The first: 05.png: " in refused(
        tmp_path / "some"
    )
    listed = (tmp_path / "out.run" / "bad-pictures.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [f"{number:02}.png" for number in range(5, 100, 16)]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_labels])
@pytest.mark.parametrize("folder", [".", "cats"], ids=["no label", "one label"])
def test_a_method_that_needs_labels_is_refused_without(
    method: str, folder: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "pictures" / folder).mkdir(parents=True)
    digits = open_source("digits[:70]")
    for position in range(70):
        (tmp_path / "pictures" / folder / f"{position}.png").write_bytes(digits.read(position))
    assert refused(tmp_path / "pictures", "--set", f"method={method}") == (
        f"{tmp_path / 'pictures'}: {method} needs pictures of two labels or more; expected each picture in a folder "
        "named for its class. Without labels take simclr, moco, byol, simsiam, dino, barlow, vicreg or clusters"
    )


def test_the_methods_that_need_labels_are_these() -> None:
    assert {name for name, method in METHODS.items() if method.needs_labels} == {
        "supcon", "triplet", "margin", "infonce"
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_without_a_gpu_is_refused_before_anything_is_read(refused: Refused) -> None:
    assert refused("no/such/source", "--device", "cuda") == (
        "device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or auto"
    )


def test_a_run_that_goes_wrong_is_refused_in_one_sentence(refused: Refused) -> None:
    wild = ("--set", "learning_rate=1e30", "--set", "warmup=0")
    assert "lower learning_rate or raise temperature" in refused("digits[:640]", *wild, "--set", "epochs=3")


@pytest.mark.slow("trains for an epoch")
def test_a_last_step_that_goes_wrong_makes_no_model(recipe: Recipe, tmp_path: Path) -> None:
    """The loss is computed before the step, but the weights after it would be exported."""
    recipe = changed(recipe, learning_rate=1e30, warmup=0, epochs=1)
    with pytest.raises(LookalikeError):
        pretrain("digits[:64]", recipe, tmp_path / "out", None, "cpu", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]


def test_a_folder_that_is_no_model_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    with pytest.raises(InvalidOutput, match="thesis: is there and is not a model folder"):
        pretrain("digits", recipe, out, None, "cpu", tmp_path)
    assert (out / "chapter.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]


def test_a_file_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "notes"
    out.write_text("years of work")
    with pytest.raises(InvalidOutput, match="notes: is there and is not a model folder"):
        pretrain("digits", recipe, out, None, "cpu", tmp_path)
    with pytest.raises(InvalidOutput, match="cannot be made"):
        pretrain("digits", recipe, out / "model", None, "cpu", tmp_path)
    assert out.read_text() == "years of work"


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_without_a_name_cannot_be_a_model(
    out: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inner")
    with pytest.raises(InvalidOutput):
        pretrain("digits", recipe, Path(out), None, "cpu", tmp_path)


# The pictures of a run


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tar of WebDataset samples: 64 digits as input.png, each with its mask.png, and one that is no picture."""
    digits = open_source("digits[:128]")
    files = [
        (f"{n:02}.{key}.png", digits.read(2 * n + at)) for n in range(64) for at, key in enumerate(("input", "mask"))
    ]
    return tarred(tmp_path_factory.mktemp("samples") / "set.tar", [*files, ("99.mask.png", b"no picture")])


@pytest.mark.slow("exports an encoder")
def test_a_run_remembers_which_picture_of_a_sample_it_takes(
    samples: Path, refused: Refused, tmp_path: Path, recipe: Recipe
) -> None:
    with ctrl_c_after(1):
        pretrain(str(samples), recipe, tmp_path / "out", None, "cpu", tmp_path, image_key="mask")
    earlier = read_checkpoint(tmp_path / "out.run")
    assert earlier is not None
    assert (earlier.identity.image_key, earlier.pictures) == ("mask", 65)
    assert "begun with image_key mask, now it is None" in refused(samples, "--resume")
    export_run(tmp_path / "out.run", tmp_path / "exported", tmp_path)
    assert json.loads((tmp_path / "exported" / "card.json").read_text())["data"]["image_key"] == "mask"


def test_a_key_that_no_sample_has_is_refused(samples: Path, refused: Refused) -> None:
    said = refused(samples, "--image-key", "depth")
    assert "holds no picture under the key depth; found input.png, mask.png" in said


def test_pictures_without_a_label_are_accounted_for(recipe: Recipe, tmp_path: Path, paint: Paint) -> None:
    for number in range(32):
        paint(tmp_path / "set" / ("", "a", "b")[number % 3] / f"{number:02}.png", seed=number)
    (tmp_path / "set" / "a" / "bad.png").write_bytes(b"")
    source = open_source(str(tmp_path / "set"))
    material = prepare(source, changed(recipe, method="infonce", batch_size=8), tmp_path, CPU)
    account = account_of(material)
    assert (account.added, account.bad, account.lost) == (21, 1, 1)
    assert account.facts()["left_out"] == {"without a label": 11, "empty": 1}
    assert account_of(prepare(source, changed(recipe, batch_size=8), tmp_path, CPU)).added == 32


@pytest.mark.slow("exports an encoder")
def test_the_command_prints_its_account_as_json_and_nothing_else(
    tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = open_source("digits[:128]")
    (tmp_path / "set").mkdir()
    for position in range(128):
        data = digits.read(position) if position % 64 else b"no picture"
        (tmp_path / "set" / f"{position:03}.png").write_bytes(data)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["lookalike", *command(tiny_recipe_file, out, tmp_path / "set", "--json")[3:]])
    with pytest.raises(SystemExit) as ended:
        lookalike.main()
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert_as_promised("pretrain", content)
    assert (ended.value.code, content["lost"]) == (1, 2)
    assert (content["added"], content["left_out"]) == (126, {"not a picture that we take": 2})
    assert content["listed_in"] == str(run_folder(out) / "left_out.jsonl")
    assert f"wrote {out}; checkpoint and log are in {run_folder(out)}" in printed.err


# Refusals to resume


@pytest.fixture(scope="module")
def unfinished(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures/ and out.run: a run on them that Ctrl-C stopped at step 3."""
    place = tmp_path_factory.mktemp("unfinished")
    (place / "pictures").mkdir()
    digits = open_source("digits[:192]")
    for position in range(192):
        (place / "pictures" / f"{position:03}.png").write_bytes(digits.read(position))
    recipe = changed(tiny_recipe, precision="float32")
    with ctrl_c_after(3):
        pretrain(str(place / "pictures"), recipe, place / "out", None, "cpu", place)
    assert checkpoint(place / "out.run")["step"] == 3
    assert not (place / "out").exists()
    return place


def test_an_unfinished_run_is_not_begun_again(unfinished: Path, refused: Refused) -> None:
    assert refused(unfinished / "pictures", out=unfinished / "out") == (
        f"{unfinished / 'out.run'} holds a run that stopped at step 3: "
        "go on with --resume, or begin again with --overwrite"
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--set", "method=byol"), "method simclr, now it is byol"),
        (("--set", "epochs=3"), "epochs 2, now it is 3"),
        (("--set", "simclr.temperature=0.3"), "simclr.temperature 0.2, now it is 0.3"),
        (("--set", "augmentation.rotation=5"), "augmentation.rotation 15.0, now it is 5.0"),
        (("--set", "projection=[32, 8]"), "projection [32, 16], now it is [32, 8]"),
        (("--init", "some.pt"), "init None, now it is some.pt"),
        (("--minutes", "2"), "minutes None, now it is 2.0"),
        (("--image-key", "mask"), "image_key None, now it is mask"),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_another_run_is_not_gone_on_with(
    arguments: tuple[str, ...], what: str, unfinished: Path, refused: Refused
) -> None:
    assert refused(unfinished / "pictures", "--resume", *arguments, out=unfinished / "out") == (
        f"{unfinished / 'out.run'}: the run was begun with {what}; --resume goes on with the same, "
        "another run wants another --out"
    )


def test_a_limit_that_is_set_counts_in_training(
    unfinished: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKALIKE_MAX_PIXELS", "10")
    assert "the limit is 10 pixels (LOOKALIKE_MAX_PIXELS)" in refused(unfinished / "pictures")
    monkeypatch.setattr(sys, "argv", ["lookalike", "export", str(unfinished / "out.run"), "--out", str(tmp_path / "o")])
    with pytest.raises(InvalidSource, match="LOOKALIKE_MAX_PIXELS"):
        lookalike.cli(standalone_mode=False)
    assert not (tmp_path / "o").exists()


def test_a_run_is_not_gone_on_with_by_other_pictures(unfinished: Path, refused: Refused) -> None:
    assert f"begun with source {unfinished / 'pictures'}, now it is digits;" in refused(
        "digits", "--resume", out=unfinished / "out"
    )


def test_pictures_added_since_are_refused(unfinished: Path, refused: Refused) -> None:
    more = unfinished / "pictures" / "more.png"
    shutil.copy(unfinished / "pictures" / "000.png", more)
    try:
        assert refused(unfinished / "pictures", "--resume", out=unfinished / "out") == (
            f"{unfinished / 'pictures'}: its pictures are not those that the run began with (192 then, 193 now); "
            "export or --resume needs the same"
        )
    finally:
        more.unlink()


def test_a_picture_renamed_since_is_refused(unfinished: Path, refused: Refused) -> None:
    was, now = unfinished / "pictures" / "005.png", unfinished / "pictures" / "005a.png"
    was.rename(now)
    try:
        assert "(192 then, 192 now)" in refused(unfinished / "pictures", "--resume", out=unfinished / "out")
    finally:
        now.rename(was)


def test_a_damaged_checkpoint_is_refused(unfinished: Path, refused: Refused, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(unfinished / "out.run", tmp_path / "out.run"))
    content = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    assert refused(unfinished / "pictures", "--resume").startswith(
        f"{folder / 'checkpoint.pt'}: not a checkpoint that can be read: "
    )


# The real command


def run(arguments: list[str], most_bytes: int = resource.RLIM_INFINITY) -> "subprocess.CompletedProcess[str]":
    """Run a command that may write files up to a size."""
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
    )


def test_the_command_refuses_to_go_on_with_another_method(unfinished: Path, refused: Refused) -> None:
    out = unfinished / "out"
    assert refused(unfinished / "pictures", "--resume", "--set", "method=barlow", out=out).startswith(
        f"{out}.run: the run was begun with method simclr, now it is barlow; --resume goes on with the same"
    )


@pytest.mark.slow("runs the command on a copy of a run")
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_whole(
    unfinished: Path, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the disk: the log still fits in, a checkpoint does not."""
    folder = Path(shutil.copytree(unfinished / "out.run", tmp_path / "out.run"))
    before = (folder / "checkpoint.pt").read_bytes()
    arguments = (unfinished / "pictures", "--resume", "--checkpoint-minutes", 0)
    done = run(command(tiny_recipe_file, tmp_path / "out", *arguments), most_bytes=len(before) // 2)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"lookalike: {folder / 'checkpoint.pt'}: a checkpoint of {len(before) / 2**20:.0f} MiB cannot be written: "
        "File too large; the earlier one, if any, is whole: mend this and go on with --resume"
    )
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert checkpoint(folder)["step"] == 3
    assert not (folder / "checkpoint.pt.tmp").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]
