"""Encoders in OpenVINO: the same embeddings as in onnxruntime, taken where they are faster, named where they run."""

import json
import logging
import os
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service import FloatArray, PixelArray, cores
from service.encoding.card import Card, Output, read_card, square_preprocessing
from service.encoding.choice import canaries
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.openvino_graph import computes_bf16
from service.encoding.pretrained import import_efficientnet_lite0
from service.errors import InvalidModel
from service.sources import open_source
from tests.conftest import MODEL, ROOT, encoded, scene
from tests.service.encoding.test_encoder import PIXELS, SAME, SIDE, card, flat_graph, scaled_graph
from tests.serving import serving

# Of the pictures of encoders that are to be slow.
WIDE = 64

pytest.importorskip("openvino", reason="OpenVINO is not installed; `make test-openvino` has it")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """The encoder for photographs."""
    out = tmp_path_factory.mktemp("made") / "photos"
    import_efficientnet_lite0(out)
    return read_card(out)


@pytest.fixture(scope="module")
def pictures(photos: Card, data_root: Path) -> PixelArray:
    """Pixels of 24 photographs, or of generated scenes where there are none."""
    folder = data_root / "photos"
    if folder.is_dir():
        source = open_source(str(folder), data_root)
        files = [source.entry(int(n)).data for n in np.linspace(0, len(source) - 1, 24).astype(int)]
    else:
        files = [encoded(scene(320, 240, seed)) for seed in range(24)]
    return np.stack([decode_pixels(data, photos.preprocessing, Limits()) for data in files])


def cosines(one: FloatArray, other: FloatArray) -> FloatArray:
    return np.asarray((one * other).sum(1))


def needs_bf16() -> None:
    if not computes_bf16():
        pytest.skip("this processor has no instructions for bfloat16")


def test_float32_embeds_as_onnxruntime_does(photos: Card, pictures: PixelArray) -> None:
    expected = Encoder(photos, "cpu").encode(pictures)
    encoder = Encoder(photos, "cpu", "fp32", runtime="openvino")
    assert (encoder.runtime, encoder.provider, encoder.variant) == ("openvino", "OpenVINO", "fp32")
    assert cosines(expected, encoder.encode(pictures)).min() > 0.99999
    assert float(encoder.probe() @ photos.canary) > 0.9999  # type: ignore[operator]


def test_bfloat16_is_near_and_really_another_arithmetic(photos: Card, pictures: PixelArray) -> None:
    needs_bf16()
    expected = Encoder(photos, "cpu").encode(pictures)
    encoder = Encoder(photos, "cpu", "bf16", runtime="auto")
    assert (encoder.runtime, encoder.variant) == ("openvino", "bf16")
    found = cosines(expected, encoder.encode(pictures))
    assert np.percentile(found, 1) >= 0.99
    assert found.max() < 0.999999


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_the_int8_file_embeds_as_in_onnxruntime(name: str) -> None:
    model = read_card(ROOT / "models" / name)
    files = [encoded(scene(48, 40, seed)) for seed in range(100)]
    pixels = np.stack([decode_pixels(data, model.preprocessing, Limits()) for data in files])
    expected = Encoder(model, "cpu", "int8").encode(pixels)
    encoder = Encoder(model, "cpu", "int8", runtime="openvino")
    assert np.percentile(cosines(expected, encoder.encode(pixels)), 1) > 0.99


def chain(operator: str, *constant: float) -> bytes:
    """An encoder of 40 equal operators one after another, each with a constant if there is one."""
    names = ["flat", *(f"h{n}" for n in range(39)), "embedding"]
    more = ["constant"] if constant else []
    options: dict[str, Any] = {"fmod": 1} if operator == "Mod" else {}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["cast"], ["flat"]),
            *(helper.make_node(operator, [one, *more], [two], **options) for one, two in pairwise(names)),
        ],
        operator,
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, WIDE, WIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3 * WIDE * WIDE])],
        [numpy_helper.from_array(np.array(one, np.float32), "constant") for one in constant],
    )
    operators = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=operators, ir_version=10).SerializeToString())


def wide(graph: bytes) -> Card:
    return replace(card(graph), preprocessing=square_preprocessing(WIDE, WIDE, 2))


def test_the_faster_one_is_taken() -> None:
    """OpenVINO takes a thirtieth of onnxruntime's time for remainders, and five times its time for arc tangents."""
    remainders, tangents = wide(chain("Mod", 200.0)), wide(chain("Atan"))
    encoder = Encoder(remainders, "cpu", "fp32", runtime="auto")
    assert (encoder.runtime, encoder.provider, encoder.compared) == ("openvino", "OpenVINO", True)
    slower = Encoder(tangents, "cpu", "fp32", runtime="auto")
    assert (slower.runtime, slower.provider, slower.compared) == ("onnxruntime", "CPUExecutionProvider", True)
    # What one process has measured, another need not.
    again = Encoder(remainders, "cpu", "auto", runtime="auto", measured=encoder.choice)
    assert (again.choice, again.compared) == (encoder.choice, False)
    of_another = Encoder(tangents, "cpu", "fp32", runtime="auto", measured=f"{'1' * 64}:openvino:fp32")
    assert (of_another.choice, of_another.compared) == (slower.choice, True)


def test_bfloat16_is_taken_where_it_is_faster(photos: Card) -> None:
    if not computes_bf16() or "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AMX for bfloat16")
    encoder = Encoder(photos, "cpu", "auto", runtime="auto")
    assert (encoder.runtime, encoder.variant) == ("openvino", "bf16")


def test_a_real_measurement_decides() -> None:
    """400 products of matrices are slow everywhere, and no file is."""
    slow = replace(card(scaled_graph(SAME, slow=400)), variants={"int8": scaled_graph(SAME)})
    encoder = Encoder(slow, "cpu", "auto", runtime="auto")
    assert np.allclose(encoder.encode(PIXELS), Encoder(slow, "cpu").encode(PIXELS), atol=1e-2)
    assert encoder.variant == "int8"


def cancelling_graph() -> bytes:
    """An encoder that bfloat16 breaks: (values + a large number) · identity, minus that number."""
    size = 3 * SIDE * SIDE
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["cast"], ["flat"]),
            helper.make_node("MatMul", ["flat", "mixed"], ["large"]),
            helper.make_node("MatMul", ["large", "unmixed"], ["embedding"]),
        ],
        "cancelling",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", size])],
        [
            numpy_helper.from_array((np.eye(size) + 100).astype(np.float32), "mixed"),
            numpy_helper.from_array(np.linalg.inv(np.eye(size) + 100).astype(np.float32), "unmixed"),
        ],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    )


def test_what_bfloat16_breaks_is_never_taken(caplog: pytest.LogCaptureFixture) -> None:
    needs_bf16()
    broken = card(cancelling_graph())
    with caplog.at_level(logging.INFO, "bentoml.lookalike"):
        assert Encoder(broken, "cpu", "auto", runtime="auto").variant == "fp32"
    (line,) = [one.getMessage() for one in caplog.records]
    assert re.search(r"OpenVINO in bf16 gives other embeddings than onnxruntime: cosine .*it is not used", line)
    with pytest.raises(InvalidModel, match="OpenVINO in bf16 gives other embeddings"):
        Encoder(broken, "cpu", "bf16", runtime="auto")


def test_a_graph_that_openvino_cannot_read_runs_in_onnxruntime(caplog: pytest.LogCaptureFixture) -> None:
    # An operator of onnxruntime's own, which OpenVINO has not: the inverse of a matrix, here of the number 1.
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["cast"], ["flat"]),
            helper.make_node("Inverse", ["one"], ["inverse"], domain="com.microsoft"),
            helper.make_node("Mul", ["flat", "inverse"], ["embedding"]),
        ],
        "inverse",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3 * SIDE * SIDE])],
        [numpy_helper.from_array(np.ones((1, 1), np.float32), "one")],
    )
    operators = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    unread = card(helper.make_model(graph, opset_imports=operators, ir_version=10).SerializeToString())
    with caplog.at_level(logging.WARNING, "bentoml.lookalike"):
        encoder = Encoder(unread, "cpu", "fp32", runtime="auto")
    assert encoder.provider == "CPUExecutionProvider"
    (line,) = [one.getMessage() for one in caplog.records]
    assert "OpenVINO cannot load it: " in line
    assert line.endswith("it is not used")
    assert "\n" not in line
    with pytest.raises(InvalidModel, match="OpenVINO cannot load it"):
        Encoder(unread, "cpu", "fp32", runtime="openvino")


def test_a_broken_file_is_refused() -> None:
    with pytest.raises(InvalidModel, match="cannot load it"):
        Encoder(card(b"no graph"), "cpu", "auto", runtime="openvino")


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = card(flat_graph())
    for runtime, variant, device, message in (
        ("onnxruntime", "bf16", "cpu", "variant bf16 needs the runtime openvino"),
        ("openvino", "fp32", "cuda", "runs on the CPU, but device cuda"),
        ("openvino", "int8", "cpu", "has no variant int8"),
    ):
        with pytest.raises(InvalidModel, match=message):
            Encoder(plain, device, variant, runtime=runtime)
    # A processor without, as far as OpenVINO's kernels are told.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(InvalidModel, match="no instructions for bfloat16"):
        Encoder(plain, "cpu", "bf16", runtime="auto")


def test_float_input_is_preprocessed() -> None:
    plain = card(flat_graph())
    expected = Encoder(plain, "cpu").encode(PIXELS)
    assert np.allclose(Encoder(plain, "cpu", runtime="openvino").encode(PIXELS), expected, atol=1e-6)


def reshaped(graph: bytes, batch: int) -> bytes:
    """Fix the batch of a graph."""
    model = onnx.load_from_string(graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch(batch: int) -> None:
    fixed = card(reshaped(flat_graph(), batch))
    encoder = Encoder(fixed, "cpu", runtime="openvino")
    assert encoder.max_batch == batch
    assert np.allclose(encoder.encode(PIXELS), Encoder(card(flat_graph()), "cpu").encode(PIXELS), atol=1e-6)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_tokens_are_pooled(pooling: str) -> None:
    """Tokens (N, 3, 16), as a ViT gives them, and a second output besides."""
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["tokens"]),
        helper.make_node("Flatten", ["tokens"], ["other"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("other", TensorProto.FLOAT, ["N", 3 * SIDE * SIDE]),
            helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["N", 3, SIDE * SIDE]),
        ],
        [helper.make_tensor("shape", TensorProto.INT64, [3], [0, 3, -1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    vit = replace(card(model), facts={"output": {"name": "tokens", "pooling": pooling}})
    assert vit.output == Output("tokens", pooling)
    encoder = Encoder(vit, "cpu", runtime="openvino")
    assert encoder.dimension == SIDE * SIDE
    assert np.allclose(encoder.encode(PIXELS), Encoder(vit, "cpu").encode(PIXELS), atol=1e-6)


def test_every_batch_thread_and_process_gives_the_same(photos: Card, pictures: PixelArray) -> None:
    few = pictures[:6]
    for variant in ("fp32", *(["bf16"] if computes_bf16() else [])):
        encoder = Encoder(photos, "cpu", variant, runtime="openvino")
        one_by_one = np.concatenate([encoder.encode(few[n : n + 1]) for n in range(len(few))])
        # bfloat16 sums in another order for another shape.
        assert cosines(encoder.encode(few[:4]), one_by_one[:4]).min() > (0.99999 if variant == "fp32" else 0.999)
        with ThreadPoolExecutor(4) as threads:
            at_once = list(threads.map(encoder.encode, [few[n : n + 1] for n in range(len(few))] * 4))
        assert all(np.array_equal(found[0], one_by_one[n % len(few)]) for n, found in enumerate(at_once))
        # Two batches at a time, where there are two threads.
        single = Encoder(photos, "cpu", variant, threads=1, runtime="openvino")
        assert (len(encoder.lanes), len(single.lanes)) == (min(2, cores()), 1)
        assert cosines(single.encode(few[:4]), one_by_one[:4]).min() > (0.99999 if variant == "fp32" else 0.999)


def test_the_canaries_are_pictures_of_any_shape() -> None:
    for height, width in ((28, 28), (224, 160)):
        made = canaries(height, width)
        assert made.shape == (8, height, width, 3)
        assert np.array_equal(made, canaries(height, width))
        assert min(picture.std() for picture in made) > 10


def test_the_service_names_it_and_workers_take_what_was_measured(tmp_path: Path) -> None:
    wanted = {"LOOKALIKE_RUNTIME": "openvino", "LOOKALIKE_VARIANT": "fp32"}
    with serving(tmp_path, "digits[:20]", MODEL, **wanted) as url:
        with urllib.request.urlopen(f"{url}/info") as answer:
            info = json.load(answer)
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            metrics = answer.read().decode()
    assert (info["provider"], info["variant"]) == ("OpenVINO", "fp32")
    assert re.match(r"20\d\d\.\d", info["versions"]["openvino"])
    lanes = min(2, cores())
    assert f'lookalike_encoder_lanes{{model="mnist",provider="OpenVINO",variant="fp32"}} {lanes}.0' in metrics


def test_nothing_is_reported_to_anybody(tmp_path: Path) -> None:
    """In a process with a fresh home folder, where a look-up of a name or a connection is an error."""
    done = subprocess.run(
        [sys.executable, "-c", SILENT],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["OpenVINO", "silent"]
    # Its telemetry notes an identity here before it sends anything.
    assert not [*tmp_path.rglob("*")]


SILENT = """
import socket, sys, threading, time
from pathlib import Path
from typing import Any
calls = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        calls.append((event, args))
sys.addaudithook(watch)
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
print(Encoder(read_card(Path("models/digits")), "cpu", "auto", runtime="openvino").provider)
time.sleep(2)
assert not calls, calls
assert not [name for name in sys.modules if name.startswith(("openvino_telemetry", "openvino.tools.ovc"))]
print("silent")
"""


def test_its_own_import_would_report(tmp_path: Path) -> None:
    """The test above can fail: imported as usual, OpenVINO loads its telemetry and notes an identity."""
    script = "import openvino, sys; print(any(name.startswith('openvino_telemetry') for name in sys.modules))"
    closed = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **closed, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr
