"""The GPU benchmark on a CPU, with a tiny network and digits: the parts that can be tested without a GPU."""

import io
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cifar10_gpu import build_recipe, knn_rows, main, open_pictures, run
from service.encoding.voting import headline_accuracy
from service.errors import InvalidRequest, InvalidSource
from tests.conftest import ROOT
from training import augment, device, pretrain
from training.backbones import build_backbone
from training.checkpoint import Checkpoint, read_checkpoint
from training.encoder import Encoder
from training.methods import Batch, build_method
from training.pretrain import make_views
from training.recipe import Recipe

# Packages that the machine with the GPU lacks, or may lack.
ABSENT = ("pydantic_settings", "fastapi", "faiss", "apsw", "bentoml", "onnxruntime", "sklearn", "matplotlib")


def recipe(method: str = "simclr", views: int = 2) -> Recipe:
    return build_recipe(method, views, 32, 0.03, "small-cnn").model_copy(update={"precision": "float32"})


def write_zip(path: Path, positions: range) -> None:
    digits = load_digits()
    with zipfile.ZipFile(path, "w") as archive:
        for position in positions:
            grey = Image.fromarray((digits.images[position] * 15.9).astype(np.uint8)).resize((32, 32))
            buffer = io.BytesIO()
            grey.convert("RGB").save(buffer, "PNG")
            archive.writestr(f"class-{digits.target[position]}/{position:04d}.png", buffer.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 digits to train on, 100 others as queries."""
    folder = tmp_path_factory.mktemp("data")
    write_zip(folder / "train.zip", range(300))
    write_zip(folder / "test.zip", range(300, 400))
    return folder


class Ticking:
    """A clock that advances by 20 ms at each reading: the machine's load does not decide how long a step takes."""

    def __init__(self) -> None:
        self._ticks = 0

    def perf_counter(self) -> float:
        self._ticks += 1
        return self._ticks / 50


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    monkeypatch.setattr(pretrain, "time", clock)
    monkeypatch.setattr(device, "time", clock)


def short(done: Checkpoint) -> tuple[int, int | None]:
    return done.progress.step, done.progress.total


@pytest.mark.slow("runs the benchmark to its end")
def test_a_second_call_goes_on_where_the_first_stopped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(recipe(), data, tmp_path, 0.05, 0.1, "cpu")
    printed = capsys.readouterr().out
    assert first.progress.total and 10 < first.progress.step < first.progress.total
    assert "| minutes to 0.90 " in printed and "| latest weighted 20-NN" in printed and "are the test set" in printed
    assert "SimCLR, self-supervised" in printed

    second = run(recipe(), data, tmp_path, 10, 0.1, "cpu")
    printed = capsys.readouterr().out
    # The plan is revised at the pace of the steps.
    assert second.progress.step == second.progress.total
    assert 5 < second.progress.seconds < 8
    rows = knn_rows(tmp_path)
    # Evaluations that fall into the timed steps are left out.
    assert 18 <= len(rows) <= 20 and rows[-1]["step"] == second.progress.total
    # Chance is 0.1.
    assert rows[-1]["knn"] > 0.5
    assert f"| final weighted 20-NN, τ = 0.07 | {rows[-1]['knn']:.4f} | 0.90 |" in printed

    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    backbone = build_backbone(content["backbone"], content["channels"], content["side"], str(tmp_path / "encoder.pt"))
    encoder = Encoder(backbone.module, content["mean"], content["std"], content["channels"]).eval()
    embedded, labels = [], load_digits().target[:400]
    source, queries = open_pictures(data)
    assert source.labels is not None and queries is not None
    for position in range(400):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(source.read(position)))))
        with torch.inference_mode():
            embedded.append(encoder(pixels.permute(2, 0, 1)[None]).numpy()[0])
    # The archives are sorted by class.
    names = np.array([int(str(label).removeprefix("class-")) for label in source.labels])
    assert sorted(names[queries]) == sorted(labels[300:])
    every = np.stack(embedded)
    expected = headline_accuracy(every[:300], names[:300], every[300:], names[300:])
    # One tie may fall either way.
    assert rows[-1]["knn"] == pytest.approx(expected, abs=0.011)

    # The run has ended, so the table is printed again.
    third = run(recipe(), data, tmp_path, 10, 0.1, "cpu")
    assert short(third) == short(second)
    assert capsys.readouterr().out.split("| figure |")[1] == printed.split("| figure |")[1]


@pytest.mark.slow("runs the benchmark in a process of its own and lets it save")
def test_terminated_it_saves_and_needs_nothing_that_the_machine_lacks(data: Path, tmp_path: Path) -> None:
    program = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT}))\n"
        "runpy.run_module('benchmarks.cifar10_gpu', run_name='__main__')"
    )
    flags = f"--data {data} --state {tmp_path} --minutes 5 --total-minutes 5 --batch-size 32 --backbone small-cnn"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *flags.split(), "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    seen = b""
    # The progress bar shows a loss after step 20.
    while b"pretraining" not in seen or b"loss" not in seen:
        seen += os.read(process.stderr.fileno(), 1000) or pytest.fail(seen.decode())
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    saved = read_checkpoint(tmp_path)
    assert saved is not None and saved.progress.step >= 20


@pytest.mark.slow("begins a run of the benchmark")
def test_without_test_pictures_some_are_held_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, state = tmp_path / "given", tmp_path / "state"
    given.mkdir()
    write_zip(given / "train.zip", range(420))
    run(recipe(), given, state, 0.01, 0.02, "cpu")
    assert "The queries are the held-out training pictures" in capsys.readouterr().out
    # The test archive comes too late.
    (given / "test.zip").symlink_to(data / "test.zip")
    with pytest.raises(InvalidRequest, match=r"begun with source .*train\.zip, now it is train\.zip and test\.zip"):
        run(recipe(), given, state, 0.01, 0.02, "cpu")


@pytest.mark.slow("begins a run of the benchmark")
def test_another_run_is_refused_in_one_sentence(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recipe(), data, tmp_path, 0.01, 0.02, "cpu")
    with pytest.raises(InvalidRequest, match="begun with method simclr, now it is supcon"):
        run(recipe("supcon"), data, tmp_path, 0.01, 0.02, "cpu")
    with pytest.raises(InvalidRequest, match=r"begun with minutes 0\.02, now it is 0\.03"):
        run(recipe(), data, tmp_path, 0.01, 0.03, "cpu")
    with pytest.raises(InvalidRequest, match="above 0"):
        run(recipe(), data, tmp_path, 0, 0.02, "cpu")
    with pytest.raises(InvalidSource, match=r"train\.zip: no such file"):
        run(recipe(), tmp_path, tmp_path / "other", 0.01, 0.02, "cpu")

    capsys.readouterr()
    with pytest.raises(typer.Exit) as exit:
        main(data, tmp_path, 0.01, 0.02, "byol", 2, 32, 0.03, "small-cnn", "cpu")
    printed = capsys.readouterr()
    assert exit.value.exit_code == 2 and printed.out == ""
    assert printed.err.startswith("cifar10_gpu: ") and printed.err.count("\n") == 1


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the calls that make a GPU's host wait: copies between devices and reads of a number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = {value.device for value in (*args, result) if isinstance(value, Tensor) and value.dim()}
        if len(devices) > 1 or any(word in str(function) for word in ("local_scalar", "nonzero", "masked_select")):
            self.seen.append(str(function))
        return result


@pytest.fixture
def no_fakes_left() -> Iterator[None]:
    """The test below fills augment's tables for a device with fake tensors."""
    yield
    for function in vars(augment).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.usefixtures("no_fakes_left")
@pytest.mark.parametrize(("name", "views"), [("simclr", 2), ("simclr", 4), ("supcon", 2)])
def test_a_step_on_a_gpu_stays_there_and_is_not_waited_for(name: str, views: int) -> None:
    """On tensors that have a shape and a device, cuda, and no content: they need no GPU."""
    told = recipe(name, views)
    with FakeTensorMode(), torch.device("cuda"):
        method = build_method(told, build_backbone("small-cnn", 3, 32), 100).train()
        pixels, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.long)
        chosen, mean, std = torch.arange(32), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        for attempt in range(2):
            with Waits() as waits:
                # None: a generator on a GPU cannot be made without one.
                made = make_views(pixels[chosen], told, mean, std, None)  # type: ignore[arg-type]
                local = make_views(pixels[chosen], told, mean, std, None, local=True)  # type: ignore[arg-type]
                result = method.step(Batch(made, chosen, labels[chosen]))
                method.update(0.5)
            # The first attempt fills augment's tables.
            assert attempt == 0 or waits.seen == []
        assert local.shape == (4, 32, 3, 16, 16)
        for some in (made, local):
            assert some.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert result.loss.device.type == result.embeddings.device.type == "cuda"
