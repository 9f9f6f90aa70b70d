"""The loop: its schedule and health checks in closed form, its refusals, and that it learns and repeats."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from service.errors import InvalidOutput, InvalidRequest, InvalidSource
from service.sources import open_source
from training.augment import augment
from training.backbones import build_backbone
from training.data import decode_canvas
from training.export import square_preprocessing
from training.methods import Step
from training.methods.simclr import SimCLR
from training.pretrain import (
    _statistics,
    check_health,
    choose_device,
    per_dimension_std,
    pretrain,
    schedule,
    train,
)
from training.recipe import Augmentation, Recipe

MEAN, STD = torch.tensor([0.3]), torch.tensor([0.35])


def changed(recipe: Recipe, **values: object) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | values)


def method_for(recipe: Recipe, kind: type[SimCLR] = SimCLR) -> SimCLR:
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(recipe.backbone, recipe.channels, recipe.side)
    return kind(recipe, backbone.module, backbone.dimension)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return decode_canvas(open_source("digits[:512]"), square_preprocessing(8), 1).pixels


def test_the_schedule_warms_up_in_a_line_and_ends_in_a_cosine() -> None:
    assert [schedule(step, 100, 4) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert schedule(4 + 48, 100, 4) == pytest.approx(0.5)  # half of the 96 steps of cosine
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
    axes = torch.cat([torch.eye(8), -torch.eye(8)])  # in each of 8 dimensions: one 1, one −1 and fourteen 0
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
    pixels[2200:, 2] = 255  # the last ones count as well
    mean, std = _statistics(pixels)
    values = pixels.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean.numpy(), values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), values.std((0, 2, 3)), rtol=1e-6)


def test_a_device_by_name() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_without_a_gpu_is_refused_before_anything_is_read(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="torch finds no CUDA GPU; use --device cpu"):
        pretrain("no/such/source", tiny_recipe, tmp_path / "out", None, "cuda", tmp_path)


def test_a_folder_that_is_no_model_is_left_alone(tiny_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    with pytest.raises(InvalidOutput, match="thesis: is there and is not a model folder"):
        pretrain("digits", tiny_recipe, out, None, "cpu", tmp_path)
    assert (out / "chapter.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]


def test_a_file_is_left_alone(tiny_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "notes"
    out.write_text("years of work")
    with pytest.raises(InvalidOutput, match="notes: is there and is not a model folder"):
        pretrain("digits", tiny_recipe, out, None, "cpu", tmp_path)
    with pytest.raises(InvalidOutput, match="cannot be made"):
        pretrain("digits", tiny_recipe, out / "model", None, "cpu", tmp_path)
    assert out.read_text() == "years of work"


def test_fewer_pictures_than_a_batch_are_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"digits\[:63\]: 63 pictures make no batch of 64"):
        pretrain("digits[:63]", tiny_recipe, tmp_path / "out", None, "cpu", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("colour", [(0, 0, 0), (200, 200, 200), (10, 77, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_flat_pictures_are_refused(
    colour: tuple[int, int, int], channels: int, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(70):
        Image.new("RGB", (9, 9), colour).save(tmp_path / "flat" / f"{number}.png")
    recipe = changed(tiny_recipe, channels=channels)
    with pytest.raises(InvalidSource, match="all pictures are one flat colour"):
        pretrain(str(tmp_path / "flat"), recipe, tmp_path / "out", None, "cpu", tmp_path)


def test_a_channel_that_is_always_empty_does_no_harm(
    tiny_recipe: Recipe, tmp_path: Path, paint: Callable[..., bytes]
) -> None:
    for number in range(16):
        path = tmp_path / "cells" / f"{number}.png"
        paint(path, 8, 8, seed=number)
        pixels = np.array(Image.open(path))
        pixels[..., 2] = 0  # two-colour microscopy
        Image.fromarray(pixels).save(path)
    recipe = changed(tiny_recipe, channels=3, batch_size=8, epochs=1)
    pretrain(str(tmp_path / "cells"), recipe, tmp_path / "out", None, "cpu", tmp_path)
    assert math.isfinite(json.loads((tmp_path / "out" / "card.json").read_text())["run"]["loss"])


def test_a_learning_rate_far_too_high_ends_with_a_sentence(tiny_recipe: Recipe, digits: Tensor) -> None:
    recipe = changed(tiny_recipe, learning_rate=1e30, epochs=3, warmup=0)
    with pytest.raises(InvalidRequest, match=r"the loss is (nan|inf) at step 20; lower learning_rate"):
        train(method_for(recipe), digits, MEAN, STD, recipe, None)


def test_pictures_all_alike_end_with_a_sentence(tiny_recipe: Recipe, digits: Tensor) -> None:
    recipe = changed(tiny_recipe, augmentation=Augmentation().model_dump(), epochs=3)
    alike = digits[:1].repeat(512, 1, 1, 1)
    with pytest.raises(InvalidRequest, match=r"the embeddings collapsed to one point by step 20 .*pictures all alike"):
        train(method_for(recipe), alike, MEAN, STD, recipe, None)


def test_a_few_dozen_steps_lower_the_loss(tiny_recipe: Recipe, digits: Tensor) -> None:
    recipe = changed(tiny_recipe, epochs=6)
    method = method_for(recipe)
    generator = torch.Generator().manual_seed(99)

    def loss_now() -> float:
        batch = digits[:256].float() / 255
        views = [(augment(batch, recipe.augmentation, generator) - MEAN) / STD for _ in range(2)]
        with torch.no_grad():
            return float(method.step(torch.stack(views)).loss)

    before = loss_now()
    run = train(method, digits, MEAN, STD, recipe, None)
    assert run.steps == 48
    assert run.seconds > 0
    assert loss_now() < before - 0.5
    assert run.loss < math.log(2 * 64 - 1) - 1  # against no better than chance


class Float32SimCLR(SimCLR):
    """Whether bfloat16 pays is decided by a stopwatch; this method computes in float32 either way."""

    def step(self, views: Tensor) -> Step:
        with torch.autocast(views.device.type, enabled=False):
            return super().step(views)


def test_the_same_seed_repeats_to_the_last_bit_and_another_does_not(tiny_recipe: Recipe, digits: Tensor) -> None:
    def weights(seed: int) -> Tensor:
        recipe = changed(tiny_recipe, seed=seed, epochs=2)
        method = method_for(changed(recipe, seed=0), Float32SimCLR)  # the same weights to begin with
        train(method, digits, MEAN, STD, recipe, None)
        return torch.cat([value.flatten().float() for value in method.state_dict().values()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_a_time_too_short_for_the_timed_steps_is_kept(tiny_recipe: Recipe, digits: Tensor) -> None:
    recipe = changed(tiny_recipe, epochs=1)
    assert train(method_for(recipe), digits, MEAN, STD, recipe, minutes=1e-6).steps == 1


def test_a_time_replaces_the_epochs(tiny_recipe: Recipe, digits: Tensor) -> None:
    recipe = changed(tiny_recipe, epochs=1)  # 8 steps, were it not for the time
    assert train(method_for(recipe), digits, MEAN, STD, recipe, minutes=0.1).steps > 8


def test_pretraining_writes_what_it_was(tiny_model: Path, tiny_recipe: Recipe) -> None:
    card = json.loads((tiny_model / "card.json").read_text())
    assert card["method"] == "simclr"
    assert Recipe.model_validate(card["recipe"]) == tiny_recipe
    assert card["data"]["source"] == "digits"
    assert card["data"]["pictures"] == 1797
    assert card["run"]["steps"] == 2 * (1797 // 64)
    assert card["run"]["device"] == "cpu"
    assert 0 < card["run"]["loss"] < math.log(2 * 64 - 1)
