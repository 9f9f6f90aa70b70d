"""The offline job: neighbours against plain NumPy and scikit-learn, and baselines that are what they say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from service.card import Card, read_card
from service.encoder import Encoder as ServedEncoder
from service.errors import InvalidSource, UndecodablePicture
from service.sources import open_source
from training.backbones import build_backbone
from training.data import open_training_source
from training.evaluate import embed, evaluate, nearest, nearest_pixels, randomised, read_pixels
from training.export import Encoder, export, square_preprocessing
from training.knn import vote

BANK, QUERIES = "digits[:1000]", "digits[1000:]"


@pytest.fixture(scope="module")
def report(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate(tiny_model, BANK, QUERIES, tmp_path_factory.mktemp("data"))


def test_the_report_has_its_keys_and_figures(report: dict[str, Any], tiny_card: Card) -> None:
    figures = {
        report["knn"]["k5"],
        report["baselines"]["raw_pixels"]["k5"],
        report["baselines"]["random_encoder"]["k5"],
    }
    assert report == {
        "model": "tiny",
        "fingerprint": tiny_card.fingerprint,
        "bank": {"source": BANK, "pictures": 1000},
        "queries": {"source": QUERIES, "pictures": 797},
        "knn": report["knn"],
        "baselines": {name: report["baselines"][name] for name in ("raw_pixels", "random_encoder")},
    }
    assert all(set(row) == {"k5", "weighted_k20"} for row in (report["knn"], *report["baselines"].values()))
    assert len(figures) == 3  # three different things were measured
    assert all(0.3 < figure < 1 for figure in figures)  # and each beats chance, 0.1, by far


def test_raw_pixels_are_scikit_learns_neighbours(report: dict[str, Any]) -> None:
    bank, queries = open_source(BANK), open_source(QUERIES)
    preprocessing = square_preprocessing(8)
    sklearn = KNeighborsClassifier(n_neighbors=5, algorithm="brute")
    sklearn.fit(read_pixels(bank, preprocessing).reshape(1000, -1).astype(np.float64), bank.labels)
    accuracy = sklearn.score(read_pixels(queries, preprocessing).reshape(797, -1).astype(np.float64), queries.labels)
    assert report["baselines"]["raw_pixels"]["k5"] == round(accuracy, 4)


def test_the_encoders_figure_is_scikit_learns_on_its_embeddings(report: dict[str, Any], tiny_card: Card) -> None:
    bank, queries = open_source(BANK), open_source(QUERIES)
    encoder = ServedEncoder(tiny_card, "cpu")
    sklearn = KNeighborsClassifier(n_neighbors=5, algorithm="brute", metric="cosine")
    sklearn.fit(encoder.encode(read_pixels(bank, tiny_card.preprocessing)), bank.labels)
    accuracy = sklearn.score(encoder.encode(read_pixels(queries, tiny_card.preprocessing)), queries.labels)
    assert report["knn"]["k5"] == pytest.approx(accuracy, abs=1.5 / 797)  # one near tie may fall either way


def test_nearest_is_the_order_of_all_cosines() -> None:
    random = np.random.default_rng(0)
    bank, queries = (random.normal(size=(count, 12)).astype(np.float32) for count in (300, 40))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    expected = np.argsort(-(queries.astype(np.float64) @ bank.T.astype(np.float64)), axis=1)[:, :5]
    np.testing.assert_array_equal(nearest(bank, queries, 5), expected)


@pytest.mark.parametrize("grey", [(), ("bank",), ("queries",), ("bank", "queries")])
def test_nearest_pixels_is_the_order_of_all_distances(grey: tuple[str, ...]) -> None:
    random = np.random.default_rng(0)
    bank, queries = (random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8) for count in (300, 40))
    for name, pixels in (("bank", bank), ("queries", queries)):
        if name in grey:
            pixels[...] = pixels[..., :1]
    difference = queries.reshape(40, 1, -1).astype(np.int64) - bank.reshape(1, 300, -1)
    expected = np.argsort((difference**2).sum(2), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(nearest_pixels(bank, queries, 5), expected)


@pytest.mark.parametrize("count", [1, 64, 129])
def test_embed_leaves_no_picture_out(count: int, tiny_card: Card) -> None:
    encoder = ServedEncoder(tiny_card, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(embed(encoder, pixels), encoder.encode(pixels), atol=1e-5)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, paint: Callable[..., bytes]) -> None:
    for number in range(6):
        paint(tmp_path / "a" / f"{number}.png", seed=number)
    (tmp_path / "a" / "4.png").write_bytes((tmp_path / "a" / "4.png").read_bytes()[:60])
    with pytest.raises(UndecodablePicture, match=r"a/4\.png: the picture is damaged"):
        read_pixels(open_source(str(tmp_path)), square_preprocessing(8))


def test_a_bank_too_small_to_vote_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"digits\[:4\]: 4 pictures cannot vote among 5"):
        evaluate(tiny_model, "digits[:4]", QUERIES, tmp_path)
    assert evaluate(tiny_model, "digits[:5]", "digits[:2]", tmp_path)["bank"]["pictures"] == 5


@pytest.mark.parametrize("role", ["bank", "queries"])
def test_pictures_without_labels_are_refused(
    role: str, tiny_model: Path, tmp_path: Path, paint: Callable[..., bytes]
) -> None:
    for number in range(6):
        paint(tmp_path / f"{number}.png", seed=number)
    sources = {"bank": BANK, "queries": QUERIES} | {role: str(tmp_path)}
    with pytest.raises(InvalidSource, match="has no labels"):
        evaluate(tiny_model, sources["bank"], sources["queries"], tmp_path)


def checked_random_encoder(card: Card, backbone: nn.Module) -> None:
    """The card's encoder untrained: other weights, of He's variance for the torch network's own fan-in."""
    drawn = randomised(card)
    assert drawn == randomised(card)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(drawn).graph.initializer}
    trained = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(card.model).graph.initializer
    }
    assert {name: value.shape for name, value in values.items()} == {name: v.shape for name, v in trained.items()}
    convolutions = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions
    for name, module in convolutions.items():
        weights = values[f"backbone.{name}.weight"]
        assert weights.shape == tuple(module.weight.shape)
        fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        assert float(weights.std()) == pytest.approx(np.sqrt(2 / fan_in), rel=0.1)
        assert np.abs(weights - trained[f"backbone.{name}.weight"]).max() > 0.01

    pixels = read_pixels(open_source("digits[:200]"), card.preprocessing)
    random = ServedEncoder(replace(card, model=drawn, facts={}), "cpu")
    before, after = ServedEncoder(card, "cpu").encode(pixels), random.encode(pixels)
    assert after.shape == before.shape
    assert float((before * after).sum(1).max()) < 0.95
    assert float(after.std(0).mean()) > 0.1 / np.sqrt(after.shape[1])  # not one point
    assert float((after @ after.T).min()) < 0.95


def test_a_random_small_cnn(tiny_card: Card) -> None:
    checked_random_encoder(tiny_card, build_backbone("small-cnn", 1, 8).module)


def test_a_random_resnet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", 3, 8).module
    with torch.no_grad():  # running statistics as after training, not the identity that they start as
        for _ in range(5):
            backbone(torch.randn(16, 3, 8, 8))
    export(
        Encoder(backbone, torch.full((3,), 0.3), torch.full((3,), 0.3), 3),
        None,
        square_preprocessing(8),
        {},
        tmp_path / "resnet",
    )
    checked_random_encoder(read_card(tmp_path / "resnet"), backbone)


@pytest.mark.parametrize(
    ("kind", "shape", "transposed"),
    [("MatMul", (800, 50), False), ("Gemm", (800, 50), False), ("Gemm", (50, 800), True)],
)
def test_matrices_and_biases_are_drawn_by_their_fan_in(
    kind: str, shape: tuple[int, int], transposed: bool, tiny_card: Card
) -> None:
    weights = numpy_helper.from_array(np.full(shape, 7, np.float32), "w")
    biases = [numpy_helper.from_array(np.full(50, 7, np.float32), "b")] if kind == "Gemm" else []
    node = helper.make_node(kind, ["x", "w", *(bias.name for bias in biases)], ["y"])
    if transposed:
        node.attribute.append(helper.make_attribute("transB", 1))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", d]) for n, d in (("x", 800), ("y", 50)))
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weights, *biases]))
    graph = onnx.load_from_string(randomised(replace(tiny_card, model=model.SerializeToString()))).graph
    drawn = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert float(drawn["w"].std()) == pytest.approx(np.sqrt(2 / 800), rel=0.03)
    assert abs(float(drawn["w"].mean())) < 0.002
    if biases:
        assert not drawn["b"].any()


def test_raw_mnist_under_the_small_protocol_is_0_9660(data_root: Path) -> None:
    bank = open_training_source("mnist/test[:8000]", data_root)
    queries = open_training_source("mnist/test[8000:]", data_root)
    preprocessing = square_preprocessing(28)
    found = nearest_pixels(read_pixels(bank, preprocessing), read_pixels(queries, preprocessing), 5)
    assert bank.labels is not None
    assert queries.labels is not None
    assert (vote(np.asarray(bank.labels)[found]) == np.asarray(queries.labels)).mean() == 0.9660
