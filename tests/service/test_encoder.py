"""Pixels → unit embeddings; a graph outside the contract is refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.batcher import Batcher
from service.card import Card, Preprocessing, read_card
from service.encoder import Encoder
from service.errors import InvalidModel, NoEmbedding
from tests.conftest import MODEL

SIDE = 4
CONFIG = {"size": {"width": SIDE, "height": SIDE}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def card(graph: bytes, **config: Any) -> Card:
    return Card(Path("test"), "test", "f" * 64, graph, Preprocessing.from_config(CONFIG | config, "test"), {})


def flat_graph(
    type: int = TensorProto.FLOAT,
    input: str = "pixel_values",
    outputs: tuple[str, ...] = ("image_embeds",),
    side: int = SIDE,
) -> bytes:
    """An encoder whose embedding is its flattened input: what went in can be read off."""
    nodes = [helper.make_node("Cast", [input], ["cast"], to=TensorProto.FLOAT)]
    for name in outputs:
        flatten = helper.make_node("Flatten", ["cast"], [name if name != "nest" else "flat"])
        nodes.append(flatten)
        if name == "nest":
            nodes.append(helper.make_node("Unsqueeze", ["flat", "axes"], ["nest"]))
    shapes: dict[str, list[str | int | None]] = {
        name: ["N", 3 * side * side] if name != "nest" else ["N", 3 * side * side, 1] for name in outputs
    }
    graph = helper.make_graph(
        nodes,
        "flat",
        [helper.make_tensor_value_info(input, type, ["N", 3, side, side])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [2])] if "nest" in outputs else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


PIXELS = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)


def normalised(values: Any) -> Any:
    flat = values.reshape(len(values), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_a_hugging_face_graph_gets_rescaled_normalised_pixels_and_unit_length() -> None:
    encoder = Encoder(card(flat_graph()), device="cpu")
    expected = ((PIXELS / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])).transpose(0, 3, 1, 2)
    assert encoder.dimension == 48
    assert np.allclose(encoder.encode(PIXELS), normalised(expected), atol=1e-6)


def test_a_uint8_graph_gets_pixels_as_they_are() -> None:
    encoder = Encoder(card(flat_graph(TensorProto.UINT8, "pixels", ("embedding",))), device="cpu")
    assert np.allclose(encoder.encode(PIXELS), normalised(PIXELS.transpose(0, 3, 1, 2).astype(float)), atol=1e-6)


def test_which_output_is_the_embedding() -> None:
    assert Encoder(card(flat_graph(outputs=("other", "embedding"))), device="cpu")._graph._output == "embedding"
    assert Encoder(card(flat_graph(outputs=("nest", "only"))), device="cpu")._graph._output == "only"
    with pytest.raises(InvalidModel, match="or a single 2-D one; it has one, two"):
        Encoder(card(flat_graph(outputs=("one", "two"))), device="cpu")


def test_a_picture_without_an_embedding_is_named_and_harms_nobody() -> None:
    encoder = Encoder(card(flat_graph(TensorProto.UINT8, "pixels", ("embedding",))), device="cpu")
    with pytest.raises(NoEmbedding, match="gives this picture no embedding"):
        encoder.encode(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    batcher = Batcher(encoder.encode)
    assert np.array_equal(batcher.encode(list(PIXELS)), encoder.encode(PIXELS))
    with pytest.raises(NoEmbedding):
        batcher.encode([PIXELS[0], np.zeros((SIDE, SIDE, 3), np.uint8)])
    batcher.close()


def test_graphs_that_do_not_fit() -> None:
    with pytest.raises(InvalidModel, match="onnxruntime cannot load it"):
        Encoder(card(b"no graph"), device="cpu")
    with pytest.raises(InvalidModel, match="expected one image input"):
        Encoder(card(flat_graph(TensorProto.DOUBLE)), device="cpu")
    with pytest.raises(InvalidModel, match="preprocessing gives 3x4x4"):
        Encoder(card(flat_graph(side=8)), device="cpu")
    with pytest.raises(InvalidModel, match=r"gives 48 dimensions, card\.json says 7"):
        Encoder(replace(card(flat_graph()), facts={"dimension": 7}), device="cpu")


def test_a_graph_with_data_in_another_file_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(read_card(MODEL).model)
    onnx.save(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(InvalidModel, match="cannot load it"):
        Encoder(replace(read_card(MODEL), model=(tmp_path / "model.onnx").read_bytes()), device="cpu")


def test_cuda_that_is_not_there_is_not_replaced_in_silence() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InvalidModel, match="device cuda was asked for"):
        Encoder(read_card(MODEL), device="cuda")


def test_a_batch_equals_one_by_one(encoder: Encoder) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 28, 28, 3), dtype=np.uint8)
    batch = encoder.encode(pixels)
    singles = np.concatenate([encoder.encode(pixels[n : n + 1]) for n in range(len(pixels))])
    assert batch.shape == (64, encoder.dimension)
    assert batch.dtype == np.float32
    assert np.abs(batch - singles).max() < 1e-5
    assert np.allclose(np.linalg.norm(batch, axis=1), 1, atol=1e-6)


def scaled_graph(factors: "np.ndarray[Any, Any]", slow: int = 0) -> bytes:
    """An encoder whose embedding is its input times factors, after so many useless products of matrices."""
    size = 3 * SIDE * SIDE
    nodes = [
        helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["h0"]),
        *(helper.make_node("MatMul", [f"h{n}", "eye"], [f"h{n + 1}"]) for n in range(slow)),
        helper.make_node("Mul", [f"h{slow}", "factors"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", size])],
        [
            numpy_helper.from_array(np.eye(size, dtype=np.float32), "eye"),
            numpy_helper.from_array(factors.astype(np.float32), "factors"),
        ],
    )
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    ).SerializeToString()
    return model


SAME = np.ones(3 * SIDE * SIDE)


def test_auto_takes_the_fastest_variant_and_a_name_takes_that_one() -> None:
    slow, fast = scaled_graph(SAME, slow=400), scaled_graph(SAME)
    varied = replace(card(slow), variants={"fp16": scaled_graph(SAME, slow=500), "int8": fast})
    encoder = Encoder(varied, "cpu", "auto")
    assert encoder.variant == "int8"
    assert np.allclose(encoder.encode(PIXELS), Encoder(card(slow), "cpu").encode(PIXELS), atol=1e-6)
    assert Encoder(varied, "cpu").variant == "fp32"
    assert Encoder(varied, "cpu", "fp16").variant == "fp16"
    # no faster than model.onnx, so model.onnx
    assert Encoder(replace(card(fast), variants={"int8": slow}), "cpu", "auto").variant == "fp32"


def test_a_variant_that_is_another_encoder_is_refused() -> None:
    other = np.where(np.arange(len(SAME)) % 2, 1, -1)
    foreign = replace(card(scaled_graph(SAME)), variants={"int8": scaled_graph(other)})
    for variant in ("auto", "int8"):
        with pytest.raises(InvalidModel, match=r"model\.int8\.onnx: is another encoder than model\.onnx"):
            Encoder(foreign, "cpu", variant)
    assert Encoder(foreign, "cpu", "fp32").variant == "fp32"
    broken = replace(card(scaled_graph(SAME)), variants={"int8": b"no graph"})
    with pytest.raises(InvalidModel, match=r"model\.int8\.onnx: onnxruntime cannot load it"):
        Encoder(broken, "cpu", "auto")
    with pytest.raises(InvalidModel, match="has no variant fp16; it has fp32, int8"):
        Encoder(foreign, "cpu", "fp16")
