"""The step behind an encoder: against plain NumPy and scikit-learn, in every kind of graph, off and on again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.decomposition import PCA

from service import FloatArray
from service.encoding.card import Card, fingerprint, read_card, square_preprocessing
from service.encoding.encoder import Encoder
from service.encoding.whitening import (
    Whitening,
    append_whitening,
    default_whitening,
    learn_whitening,
    remove_whitening,
    without_whitening,
)
from service.errors import InvalidModel
from tests.conftest import MODEL

SIDE, D = 4, 6


def cone(count: int, seed: int = 0) -> FloatArray:
    """Unit rows (N, D) in a narrow cone, with directions of unlike spread."""
    random = np.random.default_rng(seed)
    rows = 1 + random.normal(0, 0.4, (count, D)) * np.linspace(1, 0.1, D)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def plainly(rows: FloatArray, learnt_on: FloatArray, power: float, dimension: int) -> FloatArray:
    """The same whitening from the eigenvectors of the covariance, one picture at a time."""
    learnt = learnt_on.astype(np.float64)
    mean = learnt.mean(0)
    values, vectors = np.linalg.eigh((learnt - mean).T @ (learnt - mean) / len(learnt))
    out = np.zeros((len(rows), dimension))
    for n, row in enumerate(rows):
        for place in range(dimension):
            direction, variance = vectors[:, -1 - place], values[-1 - place]
            out[n, place] = sum((row[i] - mean[i]) * direction[i] for i in range(D)) / variance ** (power / 2)
        out[n] /= np.sqrt((out[n] ** 2).sum())
    return out.astype(np.float32)


@pytest.mark.parametrize(("power", "dimension"), [(0, 6), (0, 3), (0.5, 6), (0.5, 4), (1, 6), (1, 2)])
def test_cosines_are_those_of_plain_numpy(power: float, dimension: int) -> None:
    learnt, rows = cone(200), cone(20, seed=1)
    ours = learn_whitening(learnt, power, dimension).apply(rows)
    expected = plainly(rows, learnt, power, dimension)
    assert ours.shape == (20, D if (power, dimension) == (0, 6) else dimension)
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_full_whitening_is_scikit_learns() -> None:
    learnt, rows = cone(300), cone(10, seed=2)
    theirs = PCA(4, whiten=True).fit(learnt.astype(np.float64)).transform(rows.astype(np.float64))
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    ours = learn_whitening(learnt, 1, 4).apply(rows)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=2e-5)


def test_it_opens_the_cone() -> None:
    rows = cone(500)
    assert np.median(rows @ rows.T) > 0.8
    for power, dimension in ((0.0, D), (0.5, 4), (1.0, D)):
        after = learn_whitening(rows, power, dimension).apply(cone(500, seed=3))
        assert abs(np.median(after @ after.T)) < 0.05


def test_the_same_rows_give_the_same_bytes_and_their_order_changes_nothing_to_speak_of() -> None:
    rows = cone(400)
    first, second = learn_whitening(rows, 0.5, 5), learn_whitening(rows.copy(), 0.5, 5)
    assert first.matrix is not None
    assert second.matrix is not None
    assert first.mean.tobytes() == second.mean.tobytes()
    assert first.matrix.tobytes() == second.matrix.tobytes()
    turned = learn_whitening(rows[::-1], 0.5, 5)
    assert turned.matrix is not None
    # This checks the sign of each direction, too.
    np.testing.assert_allclose(turned.matrix, first.matrix, rtol=1e-4, atol=1e-5)
    largest = np.abs(first.matrix).argmax(0)
    assert (first.matrix[largest, np.arange(5)] > 0).all()


def test_pictures_that_are_all_the_same_teach_nothing() -> None:
    with pytest.raises(InvalidModel, match="the same embedding"):
        learn_whitening(np.repeat(cone(1), 30, axis=0), 0.5, 2)


def test_few_pictures_teach_the_mean_alone() -> None:
    assert default_whitening(499, 1280) == (0.0, 1280)
    assert default_whitening(500, 1280) == (0.5, 250)
    assert default_whitening(10_000, 1280) == (0.5, 512)
    assert default_whitening(10_000, 256) == (0.5, 256)
    assert default_whitening(500, 64) == (0.5, 64)


def encoder_graph(opset: int, output: str = "embedding", precision: int = TensorProto.FLOAT) -> bytes:
    """Pixels → D numbers that are not of length 1: the mean of each channel, twice, scaled and shifted."""
    dtype = helper.tensor_dtype_to_np_dtype(precision)
    matrix = np.random.default_rng(0).normal(0, 0.1, (3, D)).astype(dtype)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["values"], to=precision),
        helper.make_node("GlobalAveragePool", ["values"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["mixed"]),
        helper.make_node("Add", ["mixed", "shift"], [output]),
    ]
    weights = [numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(np.full(D, 20, dtype), "shift")]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, SIDE, SIDE])
    embedding = helper.make_tensor_value_info(output, precision, ["N", D])
    graph = helper.make_graph(nodes, "toy", [pixels], [embedding], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


def card_of(model: bytes) -> Card:
    preprocessing = square_preprocessing(SIDE)
    return Card(Path("toy"), "toy", fingerprint(model, preprocessing), model, preprocessing, {})


def embedded(model: bytes) -> FloatArray:
    pixels = np.random.default_rng(1).integers(0, 256, (30, SIDE, SIDE, 3), dtype=np.uint8)
    return Encoder(card_of(model), "cpu").encode(pixels)


@pytest.mark.parametrize(
    ("opset", "output", "precision"),
    [
        (13, "embedding", TensorProto.FLOAT),
        (17, "image_embeds", TensorProto.FLOAT),
        (18, "pooled_output", TensorProto.FLOAT),
        (20, "embedding", TensorProto.FLOAT16),
    ],
)
def test_the_graph_gives_what_numpy_gives(opset: int, output: str, precision: int) -> None:
    model = encoder_graph(opset, output, precision)
    before = embedded(model)
    for power, dimension in ((0.0, D), (0.5, 3)):
        whitening = learn_whitening(before, power, dimension)
        whitened = append_whitening(model, whitening)
        onnx.checker.check_model(onnx.load_from_string(whitened), full_check=True)
        np.testing.assert_allclose(
            embedded(whitened), whitening.apply(before), atol=5e-3 if precision == TensorProto.FLOAT16 else 2e-5
        )
        bare = remove_whitening(whitened)
        assert bare is not None
        np.testing.assert_array_equal(embedded(bare), before)
        assert remove_whitening(bare) is None


def test_its_numbers_are_float32_in_every_variant() -> None:
    whitening = Whitening(np.zeros(D, np.float32), np.eye(D, 3, dtype=np.float32))
    model = onnx.load_from_string(append_whitening(encoder_graph(18, precision=TensorProto.FLOAT16), whitening))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["whitening/mean"] == types["whitening/matrix"] == TensorProto.FLOAT
    assert types["matrix"] == TensorProto.FLOAT16
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_a_graph_without_an_embedding_is_refused() -> None:
    model = onnx.load_from_string(encoder_graph(18))
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["N", 3]))
    model.graph.output[0].name = "other"
    with pytest.raises(InvalidModel, match=r"expected an output named embedding, .* the graph has other, flat"):
        append_whitening(model.SerializeToString(), Whitening(np.zeros(D, np.float32), None))


def test_a_card_without_its_whitening_is_another_space() -> None:
    card = read_card(MODEL)
    bare = without_whitening(card)
    assert bare.fingerprint != card.fingerprint
    assert (Encoder(card, "cpu").dimension, Encoder(bare, "cpu").dimension) == (128, 256)
    assert set(bare.variants) == set(card.variants)
    again = append_whitening(bare.model, Whitening(np.zeros(256, np.float32), None))
    with pytest.raises(InvalidModel, match="its variant int8 has no whitening"):
        without_whitening(replace(card, model=again, variants={"int8": bare.variants["int8"]}))
    assert without_whitening(bare).fingerprint == bare.fingerprint
