"""Variants compute the same embeddings as model.onnx; those that do not are found and left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from service import PixelArray
from service.encoding.card import Card, read_card, square_preprocessing
from service.encoding.encoder import Encoder as ServedEncoder
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.variants import Pictures, judge
from service.encoding.voting import headline_accuracy
from service.errors import InvalidOutput, InvalidRequest, InvalidSource
from service.sources import open_source
from training.encoder import Encoder
from training.export import export, to_onnx
from training.pretrain import export_run, pretrain
from training.recipe import Recipe
from training.variants import to_int8

SIDE = 8


def random_pixels(count: int) -> PixelArray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def digits() -> Pictures:
    source = open_source("digits")
    preprocessing = square_preprocessing(SIDE)
    pixels = np.stack([decode_pixels(source.entry(n).data, preprocessing, Limits()) for n in range(800)])
    assert source.labels is not None
    labels = source.labels.codes[:800].astype(np.int64)
    return Pictures(pixels[:200], pixels[600:], pixels[:600], (labels[:600], labels[600:]))


def kinds(model: bytes) -> set[int]:
    """The types of a graph's larger weights; those of a whitening are float32 in every variant."""
    tensors = onnx.load_from_string(model).graph.initializer
    large = [tensor for tensor in tensors if int(np.prod(tensor.dims)) > 500]
    assert {tensor.data_type for tensor in large if tensor.name.startswith("whitening/")} == {TensorProto.FLOAT}
    return {tensor.data_type for tensor in large if not tensor.name.startswith("whitening/")}


def test_variants_are_in_their_arithmetic(tiny_card: Card, tiny_model: Path) -> None:
    assert set(tiny_card.variants) == {"fp16", "int8"}
    assert kinds(tiny_card.variants["fp16"]) == {TensorProto.FLOAT16}
    assert kinds(tiny_card.variants["int8"]) == {TensorProto.INT8}
    assert len(tiny_card.variants["fp16"]) < 0.6 * len(tiny_card.model)
    assert len(tiny_card.variants["int8"]) < 0.4 * len(tiny_card.model)
    for file in ("model.fp16.onnx", "model.int8.onnx"):
        figures = tiny_card.facts["quality"][file]
        assert figures["belongs"]
        assert figures["bytes"] == (tiny_model / file).stat().st_size
        # A twentieth of the digits was held out.
        assert figures["pictures"] == 89
        assert 0.99 <= figures["cosine_p1"] <= 1.0001
        assert figures["knn_lost"] <= 0.003
        assert file in (tiny_model / "README.md").read_text()


def test_the_figures_are_numpys(tiny_card: Card, digits: Pictures) -> None:
    figures = judge(tiny_card, tiny_card.variants, digits)["model.int8.onnx"]
    exact, rounded = (ServedEncoder(tiny_card, "cpu", variant) for variant in ("fp32", "int8"))
    cosines = np.sort((exact.encode(digits.held_out) * rounded.encode(digits.held_out)).sum(1))
    assert digits.labels is not None
    bank_labels, labels = digits.labels
    accuracies = [
        headline_accuracy(encoder.encode(digits.bank), bank_labels, encoder.encode(digits.held_out), labels)
        for encoder in (exact, rounded)
    ]
    assert figures["least_cosine"] == pytest.approx(cosines[0], abs=1e-4)
    # 1 % of 200 is 2.
    assert cosines[1] - 1e-4 <= figures["cosine_p1"] <= cosines[2] + 1e-4
    assert figures["knn"] == round(accuracies[1], 4)
    assert figures["knn_lost"] == pytest.approx(accuracies[0] - accuracies[1], abs=1e-4)


def test_a_picture_alone_is_embedded_as_among_others(tiny_card: Card) -> None:
    pixels = random_pixels(9)
    for variant in ("fp16", "int8"):
        encoder = ServedEncoder(tiny_card, "cpu", variant)
        alone = np.concatenate([encoder.encode(pixels[n : n + 1]) for n in range(9)])
        np.testing.assert_allclose(alone, encoder.encode(pixels), atol=1e-3)


def shaken(model: bytes, by: float) -> bytes:
    """The graph with noise on its convolutions, in parts of their standard deviation."""
    graph, random = onnx.load_from_string(model), np.random.default_rng(0)
    for tensor in graph.graph.initializer:
        if len(tensor.dims) == 4:
            value = numpy_helper.to_array(tensor)
            noise = random.normal(0, by * value.std(), value.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value + noise, tensor.name))
    return bytes(graph.SerializeToString())


def test_a_graph_a_little_off_belongs_and_one_far_off_does_not(tiny_card: Card, digits: Pictures) -> None:
    near, off, far = (
        judge(tiny_card, {"int8": shaken(tiny_card.model, by)}, digits)["model.int8.onnx"] for by in (0.001, 0.12, 0.8)
    )
    assert near["belongs"]
    assert not off["belongs"]
    assert off["cosine_p1"] < 0.99
    assert not far["belongs"]
    assert far["refused"] == "is another encoder than model.onnx"


def test_a_graph_that_loses_votes_does_not_belong_however_near_it_is(tiny_card: Card, digits: Pictures) -> None:
    """Labels that follow the exact encoder's own nearest neighbours, so that any change of neighbours costs."""
    exact = ServedEncoder(tiny_card, "cpu", "fp32")
    # Every bank picture is a class of its own.
    own = np.arange(600)
    nearest = (exact.encode(digits.held_out) @ exact.encode(digits.bank).T).argmax(1)
    figures = judge(
        tiny_card, {"int8": shaken(tiny_card.model, 0.01)}, digits._replace(labels=(own, nearest.astype(np.int64)))
    )["model.int8.onnx"]
    assert figures["cosine_p1"] >= 0.99
    assert figures["knn_lost"] > 0.003
    assert not figures["belongs"]


def outlying(factor: float) -> Encoder:
    """Two linear layers with one hidden value far above the others, which 8 bits cannot hold beside them."""
    torch.manual_seed(0)
    first, second = nn.Linear(3 * SIDE * SIDE, 16), nn.Linear(16, 16)
    with torch.no_grad():
        first.weight[0] *= factor
        second.weight[:, 0] /= factor
    return Encoder(nn.Sequential(nn.Flatten(), first, second), torch.zeros(3), torch.ones(3), 3).eval()


def test_what_cannot_be_rounded_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = random_pixels(40)
    export(outlying(1e6), Pictures(pixels, pixels, pixels, None), square_preprocessing(SIDE), {}, tmp_path / "out")
    printed = capsys.readouterr().err
    card = read_card(tmp_path / "out")
    assert card.variants == {}
    for file in ("model.fp16.onnx", "model.int8.onnx"):
        assert f"{file} is not written: it is too far from model.onnx" in printed
        assert not card.facts["quality"][file]["belongs"]
        assert not (tmp_path / "out" / file).exists()
        assert file not in card.facts["sha256"]
    # 1e6 is infinite in float16.
    assert "refused" in card.facts["quality"]["model.fp16.onnx"]


@pytest.mark.slow("exports and rounds a network")
def test_one_picture_is_enough_to_calibrate_with() -> None:
    graph = onnx.load_from_string(to_int8(to_onnx(outlying(1.0), SIDE), random_pixels(1)))
    assert any(node.op_type == "QuantizeLinear" for node in graph.graph.node)


@pytest.fixture
def run(tiny_model: Path) -> Path:
    """The folder of a finished run."""
    return tiny_model.with_name("tiny.run")


@pytest.mark.slow("exports an encoder")
def test_a_run_is_exported_anew_as_it_was(run: Path, tmp_path: Path) -> None:
    before = sorted(run.iterdir())
    export_run(run, tmp_path / "again" / "tiny", tmp_path)
    first, again = read_card(run.parent / "tiny"), read_card(tmp_path / "again" / "tiny")
    # The last digits of the measured quality vary.
    without = {"quality": None}
    assert again.facts | without == first.facts | without
    assert again.variants == first.variants
    assert sorted(run.iterdir()) == before


@pytest.mark.slow("exports an encoder")
def test_an_encoder_is_exported_over_another_only_when_asked(run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run.parent / "tiny", tmp_path / "tiny"))
    (out / "README.md").write_text("a description of mine")
    with pytest.raises(InvalidOutput, match="tiny: is there already; replace it with --overwrite"):
        export_run(run, out, tmp_path)
    with pytest.raises(InvalidRequest, match="holds no checkpoint"):
        export_run(tmp_path, out, tmp_path, overwrite=True)
    assert (out / "README.md").read_text() == "a description of mine"
    export_run(run, out, tmp_path, overwrite=True)
    assert (out / "README.md").read_text() != "a description of mine"
    assert read_card(out).fingerprint == read_card(run.parent / "tiny").fingerprint


@pytest.mark.slow("exports an encoder of unlabelled pictures")
def test_runs_that_cannot_be_exported(
    run: Path, tmp_path: Path, paint: Callable[..., Any], tiny_recipe: Recipe
) -> None:
    with pytest.raises(InvalidRequest, match=r"holds no checkpoint; expected the folder OUT\.run"):
        export_run(tmp_path, tmp_path / "out", tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidOutput, match="is not a model folder"):
        export_run(run, tmp_path / "thesis.txt", tmp_path)
    pictures = tmp_path / "pictures"
    for number in range(80):
        paint(pictures / f"{number:02d}.png", seed=number)
    pretrain(str(pictures), tiny_recipe, tmp_path / "mine", None, "cpu", tmp_path)
    quality = json.loads((tmp_path / "mine" / "card.json").read_text())["quality"]
    # Without labels there are no votes.
    assert "knn" not in quality["model.int8.onnx"]
    paint(pictures / "another.png")
    with pytest.raises(InvalidSource, match="its pictures are not those that the run began with"):
        export_run(tmp_path / "mine.run", tmp_path / "out", tmp_path)
    pictures.rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidSource, match="no such"):
        export_run(tmp_path / "mine.run", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow("exports two networks")
def test_a_graph_that_has_no_embedding_for_a_picture_does_not_belong() -> None:
    """Black pixels leave only the biases: without them the embedding is 0."""
    exact, bare = outlying(1.0), outlying(1.0)
    for layer in bare.backbone.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    model, preprocessing = to_onnx(exact, SIDE), square_preprocessing(SIDE)
    card = Card(Path("toy"), "toy", "f" * 64, model, preprocessing, {})
    pixels = np.concatenate([random_pixels(9), np.zeros((1, SIDE, SIDE, 3), np.uint8)])
    found = judge(card, {"int8": to_onnx(bare, SIDE)}, Pictures(pixels, pixels, pixels, None))["model.int8.onnx"]
    assert not found["belongs"]
    assert "refused" in found
