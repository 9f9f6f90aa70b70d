"""Faults while the service runs, and the callers that they affect."""

import json
import logging
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from starlette.testclient import TestClient

from service.app import make_service
from service.settings import Settings
from tests.conftest import MODEL, encoded, scene
from tests.serving import LOOKALIKE, running, status_of

PICTURES = [encoded(scene(200, 150, seed=number), "JPEG") for number in range(31)]


def ask(address: str, data: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address + "/embed", data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def write_model(folder: Path, side: int = 8, slow: int = 0) -> Path:
    """An encoder whose embedding is its input, so that a black picture has none; `slow` makes it take its time."""
    size = 3 * side * side
    nodes = [helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Flatten", ["cast"], ["h0"]))
    nodes += [helper.make_node("MatMul", [f"h{n}", "eye"], [f"h{n + 1}"]) for n in range(slow)]
    nodes.append(helper.make_node("Identity", [f"h{slow}"], ["embedding"]))
    graph = helper.make_graph(
        nodes,
        "flat",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, side, side])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", size])],
        [onnx.numpy_helper.from_array(np.eye(size, dtype=np.float32), "eye")],
    )
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    config = {"size": {"width": side, "height": side}, "do_rescale": False, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def test_a_poisoned_picture_in_a_batch_harms_one_caller(tmp_path: Path) -> None:
    # The encoder is slow, so that the 32 requests share batches.
    model = write_model(tmp_path / "flat", slow=100)
    poison = encoded(Image.new("RGB", (20, 20)))
    with TestClient(make_service(Settings(no_store=True, model=model)).to_asgi()) as client:

        def figure(name: str) -> float:
            lines = client.get("/metrics").text.splitlines()
            return next((float(line.split()[1]) for line in lines if line.startswith(name + " ")), 0.0)

        refused, batches = 'lookalike_errors_total{code="no_embedding"}', 'lookalike_batch_size_bucket{le="%s"}'
        names = (refused, batches % "+Inf", batches % "1.0")
        alone = [client.post("/embed", content=data).json()["embeddings"][0] for data in PICTURES]
        before = [figure(name) for name in names]
        together = threading.Barrier(32)

        def meet(data: bytes) -> tuple[int, dict[str, Any]]:
            together.wait(30)
            answer = client.post("/embed", content=data)
            return answer.status_code, answer.json()

        for _ in range(3):
            with ThreadPoolExecutor(32) as pool:
                answers = list(pool.map(meet, [*PICTURES, poison]))
            assert [status for status, _ in answers] == [200] * 31 + [422]
            assert answers[-1][1]["code"] == "no_embedding"
            for (_, answer), expected in zip(answers, alone, strict=False):
                assert np.abs(np.subtract(answer["embeddings"][0], expected)).max() < 1e-5
        told, of_any_size, of_one = (figure(name) - was for name, was in zip(names, before, strict=True))
        assert told == 3
        # Some batches held more than one picture.
        assert of_any_size > of_one


@pytest.mark.slow("starts a service of its own and sends it 600 pictures")
def test_a_full_queue_answers_429_and_the_rest_as_ever(tmp_path: Path) -> None:
    model = write_model(tmp_path / "flat", slow=300)
    with running(tmp_path, "--no-store", "--model", str(model), max_waiting="4") as (_, address, _):
        with ThreadPoolExecutor(48) as pool:
            answers = list(pool.map(lambda number: ask(address, PICTURES[number % 31]), range(600)))
        seen = Counter(status for status, _ in answers)
        assert set(seen) == {200, 429}, seen
        assert {answer["code"] for status, answer in answers if status == 429} == {"busy"}
        assert status_of(address + "/readyz") == 200
        # The refusals occupy no place afterwards.
        assert ask(address, PICTURES[0])[0] == 200
        assert "lookalike_requests_at_work 0.0" in urllib.request.urlopen(address + "/metrics").read().decode()


@pytest.mark.slow("starts a service of its own and then refuses another")
def test_a_model_folder_that_changes_is_not_what_is_served(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    with running(tmp_path, "--model", str(model), "--store", str(tmp_path / "store")) as (server, address, log):
        before = ask(address, PICTURES[0])
        shutil.rmtree(model)
        write_model(model)
        assert ask(address, PICTURES[0]) == before
        assert status_of(address + "/readyz") == 200
        server.terminate()
        assert server.wait(25) == 0, log.read_text()
    refused = subprocess.run(
        [LOOKALIKE, "serve", "--model", model, "--store", tmp_path / "store"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "built by the encoder mnist" in refused.stderr


def test_a_provider_that_is_lost_makes_it_not_ready_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = make_service(Settings(no_store=True, model=MODEL, variant="fp32"))
    with TestClient(service.to_asgi()) as client, caplog.at_level(logging.INFO, "bentoml.lookalike"):
        assert client.get("/readyz").status_code == 200
        lane = service.inner.app().state.gallery.encoder._graphs[0]
        session = lane._session
        del lane._session
        for _ in range(3):
            assert client.get("/readyz").status_code == 503
        assert client.post("/embed", content=PICTURES[0]).status_code == 500
        assert "lookalike_ready 0.0" in client.get("/metrics").text
        lane._session = session
        assert client.get("/readyz").status_code == 200
        assert client.post("/embed", content=PICTURES[0]).status_code == 200
    told = [record.getMessage() for record in caplog.records if "ready" in record.getMessage()]
    assert len(told) == 2
    assert told[0].startswith("not ready: mnist: inference failed: ")
    assert told[1] == "ready again"
