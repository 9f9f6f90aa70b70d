"""Pixels → unit embeddings; a graph outside the contract is refused by name."""

import base64
import hashlib
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service import FloatArray
from service.encoding.batcher import Batcher
from service.encoding.card import Card, Output, Preprocessing, read_card
from service.encoding.encoder import Encoder, canary
from service.encoding.onnxruntime_graph import OnnxruntimeGraph
from service.encoding.runtimes import Device
from service.errors import InvalidModel, NoEmbedding
from tests.conftest import MODEL, ROOT

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
    """Return an encoder whose embedding is its flattened input; an output named `other` is the negative of that."""
    nodes = [helper.make_node("Cast", [input], ["cast"], to=TensorProto.FLOAT)]
    for name in outputs:
        flat = "flat" if name in ("nest", "other") else name
        nodes.append(helper.make_node("Flatten", ["cast"], [flat]))
        if name == "nest":
            nodes.append(helper.make_node("Unsqueeze", [flat, "axes"], [name]))
        elif name == "other":
            nodes.append(helper.make_node("Neg", [flat], [name]))
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
    flat = normalised(PIXELS.transpose(0, 3, 1, 2).astype(float))
    for outputs in (("other", "embedding"), ("nest", "only")):
        encoder = Encoder(card(flat_graph(TensorProto.UINT8, "pixels", outputs)), device="cpu")
        assert np.allclose(encoder.encode(PIXELS), flat, atol=1e-6)
    with pytest.raises(InvalidModel, match="or a single 2-D one; it has one, two"):
        Encoder(card(flat_graph(outputs=("one", "two"))), device="cpu")


def test_a_picture_without_an_embedding_is_named_and_harms_nobody() -> None:
    encoder = Encoder(card(flat_graph(TensorProto.UINT8, "pixels", ("embedding",))), device="cpu")
    with pytest.raises(NoEmbedding, match="gives this picture no embedding"):
        encoder.encode(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    batcher = Batcher(encoder.lanes, encoder.max_batch)
    pictures = [*PIXELS, np.zeros((SIDE, SIDE, 3), np.uint8)]
    futures: list[Future[FloatArray]] = [Future() for _ in pictures]
    for pixels, future in zip(pictures, futures, strict=True):
        batcher.submit(pixels, future)
    assert np.allclose(np.stack([future.result(10) for future in futures[:-1]]), encoder.encode(PIXELS), atol=1e-6)
    with pytest.raises(NoEmbedding):
        futures[-1].result(10)
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


def test_batches_are_filled_up_to_the_sizes_that_a_graph_runs() -> None:
    one = card(flat_graph(TensorProto.UINT8, "pixels", ("embedding",)))
    graph, ran = OnnxruntimeGraph(one, "fp32", one.model, Device("cpu")), []
    infer = graph._infer

    def noted(batch: Any) -> Any:
        ran.append(len(batch))
        return infer(batch)

    graph._infer = noted  # type: ignore[method-assign]
    pixels = np.random.default_rng(0).integers(1, 256, (11, SIDE, SIDE, 3), dtype=np.uint8)
    expected = graph.run(pixels)
    # As a GPU has them; here the graph runs on the CPU.
    graph.sizes, graph.max_batch = (1, 4, 8), 8
    for count, sizes in ((1, [1]), (2, [4]), (4, [4]), (5, [8]), (11, [8, 4])):
        ran.clear()
        assert np.array_equal(graph.run(list(pixels[:count])), expected[:count])
        assert ran == sizes


@pytest.mark.parametrize("pixels", [PIXELS[:, :1, :1], PIXELS[:, 1:], PIXELS.astype(np.float32)])
def test_pixels_of_another_shape_or_type_are_refused(pixels: Any) -> None:
    encoder = Encoder(card(flat_graph(TensorProto.UINT8, "pixels", ("embedding",))), device="cpu")
    with pytest.raises(InvalidModel, match="inference failed"):
        encoder.encode(pixels)


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
    # An int8 file no faster than model.onnx is not chosen.
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


def text(embedding: FloatArray) -> str:
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()


def test_the_canary_must_be_what_the_card_tells() -> None:
    plain = card(flat_graph())
    known = Encoder(plain, "cpu").encode(canary(SIDE)[None])[0]
    Encoder(replace(plain, facts={"canary": text(known)}), "cpu")
    turned = known.copy()
    turned[:10] *= -1
    with pytest.raises(InvalidModel, match="another embedding of the canary picture here"):
        Encoder(replace(plain, facts={"canary": text(turned)}), "cpu")
    for nonsense in ("no base64", "AAA=", 7):
        with pytest.raises(InvalidModel, match="canary: expected float32 numbers in base64"):
            Encoder(replace(plain, facts={"canary": nonsense}), "cpu")
    assert read_card(MODEL).canary is not None


def test_the_canary_is_one_picture_everywhere() -> None:
    assert [hashlib.sha256(canary(side).tobytes()).hexdigest()[:8] for side in (28, 224)] == ["d4b6eedc", "2cc1a69d"]
    assert canary(28).std() > 50


def test_a_probe_notices_a_graph_that_has_changed_or_is_gone() -> None:
    encoder = Encoder(card(flat_graph()), "cpu")
    assert np.allclose(encoder.probe(), encoder.encode(canary(SIDE)[None])[0], atol=1e-6)
    factors = np.linspace(0.5, 1.5, 3 * SIDE * SIDE)
    graph, other = encoder._graphs[0], Encoder(card(scaled_graph(factors)), "cpu")._graphs[0]
    assert isinstance(graph, OnnxruntimeGraph)
    assert isinstance(other, OnnxruntimeGraph)
    graph._session, graph._type, graph._input, graph._output = other._session, np.uint8, "pixels", Output("embedding")
    with pytest.raises(InvalidModel, match="another embedding than at the start"):
        encoder.probe()
    del graph._session
    with pytest.raises(InvalidModel, match="inference failed"):
        encoder.probe()


def test_a_batch_that_memory_is_too_short_for_is_halved() -> None:
    """In a process with little memory: a graph that needs 30 MB a picture, really."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["OutOfMemory", "16", "8", "8"]


SHORT_OF_MEMORY = """
import resource, time
from concurrent.futures import Future
from pathlib import Path
from threading import Event
import numpy as np
import psutil
from onnx import TensorProto, helper
from service.encoding.batcher import Batcher
from service.encoding.card import Card, Preprocessing
from service.encoding.encoder import Encoder, canary
from service.errors import OutOfMemory

SIDE, ROW = 4, 10_000_000
nodes = [
    helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
    helper.make_node("Flatten", ["cast"], ["flat"]),
    helper.make_node("ReduceMean", ["flat", "one"], ["mean"], keepdims=1),
    helper.make_node("Expand", ["mean", "row"], ["wide"]),
    helper.make_node("ReduceMean", ["wide", "one"], ["narrow"], keepdims=1),
    helper.make_node("Add", ["flat", "narrow"], ["embedding"]),
]
graph = helper.make_graph(
    nodes,
    "wide",
    [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
    [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 48])],
    [
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("row", TensorProto.INT64, [2], [1, ROW]),
    ],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
config = {"size": {"width": SIDE, "height": SIDE}, "do_rescale": False, "do_normalize": False}
from service.encoding import runtimes
runtimes.LARGEST_BATCH["cpu"] = 1  # so that the warm-up keeps no memory for more
encoder = Encoder(Card(Path("t"), "t", "f" * 64, model, Preprocessing.from_config(config, "t"), {}), "cpu")
now = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (now + 480_000_000, now + 480_000_000))
pixels = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8)
batches, go = [], Event()
def lane(batch):
    go.wait(60)
    batches.append(len(batch))
    try:
        return encoder.encode(batch)
    except OutOfMemory:
        print("OutOfMemory")
        raise
batcher = Batcher([lane], 16)
first, futures = Future(), [Future() for _ in pixels]
batcher.submit(pixels[0], first)
while batcher._waiting.qsize():
    time.sleep(0.01)
for one, future in zip(pixels, futures):
    batcher.submit(one, future)
go.set()
embeddings = [future.result(60) for future in futures]
assert np.allclose(embeddings[3], encoder.encode(pixels[3:4])[0], atol=1e-5)
print(*batches[1:])
"""
