"""The GPU benchmark on a CPU, with a tiny network and digits: what can be proved of it without a GPU."""

import io
import math
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cifar10_gpu
from benchmarks.cifar10_gpu import (
    batches,
    build_recipe,
    knn_accuracy,
    load_pictures,
    main,
    make_views,
    next_due,
    quicker,
    rate,
    run,
    views_per_s,
)
from service.encoding.voting import headline_accuracy
from service.errors import InvalidRequest, InvalidSource
from tests.conftest import ROOT
from training import augment
from training.backbones import build_backbone
from training.checkpoint import read_checkpoint
from training.export import Encoder
from training.methods import Batch, Method, build_method
from training.recipe import Recipe

CPU = torch.device("cpu")
# Not on the machine with the GPU, or not promised to be.
ABSENT = ("pydantic_settings", "fastapi", "faiss", "apsw", "bentoml", "onnxruntime", "sklearn", "matplotlib")


def recipe(method: str = "simclr", views: int = 2) -> Recipe:
    return build_recipe(method, views, 32, 0.03, "small-cnn")


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
    """300 digits to train on, 100 others to ask about."""
    folder = tmp_path_factory.mktemp("data")
    write_zip(folder / "train.zip", range(300))
    write_zip(folder / "test.zip", range(300, 400))
    return folder


class Ticking:
    """A clock that goes on by a fifth of a second whenever it is read: so long is a step, however busy the machine."""

    def __init__(self) -> None:
        self._ticks = 0

    def perf_counter(self) -> float:
        self._ticks += 1
        return self._ticks / 5


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes by in steps, with four evaluations in a run."""
    monkeypatch.setattr(cifar10_gpu, "time", Ticking())
    monkeypatch.setattr(cifar10_gpu, "_EVALUATIONS", 4)


def test_a_second_call_goes_on_where_the_first_stopped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(recipe(), data, tmp_path, 0.05, 0.1, "cpu")
    printed = capsys.readouterr().out
    assert 3 <= first.seconds < 3.5 and first.step > 10
    assert "| minutes to 0.90 " in printed and "| latest weighted 20-NN" in printed and "(test set)" in printed
    assert "SimCLR, self-supervised" in printed

    empty = tmp_path / "empty"  # the pictures have been decoded already
    empty.mkdir()
    second = run(recipe(), empty, tmp_path, 0.05, 0.1, "cpu")
    printed = capsys.readouterr().out
    assert 6 <= second.seconds < 6.5 and second.step > first.step + 10
    assert second.elapsed > first.elapsed > first.seconds
    assert second.history[: len(first.history)] == first.history
    assert [round(row["minutes"] / 0.025) for row in second.history] == [1, 2, 3, 4]
    assert f"| final {cifar10_gpu._HEADLINE} | {second.history[-1]['accuracy'][cifar10_gpu._HEADLINE]:.4f}" in printed
    assert all(row["accuracy"][cifar10_gpu._HEADLINE] > 0.5 for row in second.history)  # 0.1 is chance
    assert second.history[-1]["loss"] < 0.95 * math.log(2 * 32 - 1)  # of embeddings that are all alike

    third = run(recipe(), data, tmp_path, 0.05, 0.1, "cpu")  # it has ended: the table again
    assert (third.step, third.history) == (second.step, second.history)


@pytest.mark.parametrize(("watched", "minutes"), [(1, 0.01), (1, 0.0133), (2, 0.01), (50, 0.01)])
def test_a_call_ends_with_a_knn_and_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: int, minutes: float
) -> None:
    """Whether a step or waiting for the GPU after it is what uses the time up."""
    monkeypatch.setattr(cifar10_gpu, "_WATCHED", watched)
    done = run(recipe(), data, tmp_path, minutes, 1, "cpu")
    saved = read_checkpoint(tmp_path)
    assert saved is not None and saved["step"] == done.step
    assert [row["minutes"] for row in done.history] == [done.seconds / 60]


def test_its_encoder_is_the_one_that_was_measured(data: Path, tmp_path: Path) -> None:
    done = run(recipe("supcon", 3), data, tmp_path, 0.01, 0.01, "cpu")
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    backbone = build_backbone(content["backbone"], content["channels"], content["side"], str(tmp_path / "encoder.pt"))
    encoder = Encoder(backbone.module, content["mean"], content["std"], content["channels"]).eval()
    train, test = load_pictures(data, tmp_path, "train"), load_pictures(data, tmp_path, "test")
    assert train is not None and test is not None
    with torch.inference_mode():
        bank, queries = encoder(train.pixels).numpy(), encoder(test.pixels).numpy()
    expected = headline_accuracy(bank, train.labels.numpy(), queries, test.labels.numpy())
    assert done.history[-1]["accuracy"][cifar10_gpu._HEADLINE] == pytest.approx(expected, abs=0.011)  # one tie
    assert train.names == [f"class-{digit}" for digit in range(10)]
    assert train.labels.tolist() == sorted(load_digits().target[:300].tolist())


def test_terminated_it_saves_and_needs_nothing_that_the_machine_lacks(data: Path, tmp_path: Path) -> None:
    program = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT}))\n"
        "runpy.run_module('benchmarks.cifar10_gpu', run_name='__main__')"
    )
    flags = f"--data {data} --state {tmp_path} --minutes 0.4 --total-minutes 0.4 --batch-size 32 --backbone small-cnn"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *flags.split(), "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    begun = process.stdout.readline()  # after the first k-NN
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "minutes, loss" in begun and "| views/s of the loop |" in printed
    saved = read_checkpoint(tmp_path)
    assert saved is not None and saved["step"] > 0
    later = run(recipe(), data, tmp_path, 0.01, 0.4, "cpu")
    assert later.step > saved["step"] and later.seconds < 24


def test_without_test_pictures_some_are_held_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, state = tmp_path / "given", tmp_path / "state"
    given.mkdir()
    (given / "train.zip").symlink_to(data / "train.zip")
    run(recipe(), given, state, 0.01, 0.02, "cpu")
    assert "held-out training pictures" in capsys.readouterr().out
    (given / "test.zip").symlink_to(data / "test.zip")  # comes with the second call
    done = run(recipe(), given, state, 0.01, 0.02, "cpu")
    asked = [row["queries"] for row in done.history]
    assert asked[0] == "held-out training pictures" and asked[-1] == "test set"
    assert done.held_out  # it was never trained on, and is not from now on


def test_another_run_is_refused_in_one_sentence(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recipe(), data, tmp_path, 0.01, 0.02, "cpu")
    with pytest.raises(InvalidRequest, match="begun with method simclr, now it is supcon"):
        run(recipe("supcon"), data, tmp_path, 0.01, 0.02, "cpu")
    with pytest.raises(InvalidRequest, match=r"begun with total_minutes 0\.02, now it is 0\.03"):
        run(recipe(), data, tmp_path, 0.01, 0.03, "cpu")
    with pytest.raises(InvalidRequest, match="above 0"):
        run(recipe(), data, tmp_path, 0, 0.02, "cpu")
    with pytest.raises(InvalidSource, match="no such folder"):
        run(recipe(), data / "nowhere", tmp_path, 0.01, 0.02, "cpu")
    with pytest.raises(InvalidSource, match=r"train\.zip: no such file"):
        run(recipe(), tmp_path, tmp_path / "other", 0.01, 0.02, "cpu")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "train.zip").symlink_to(data / "test.zip")
    with pytest.raises(InvalidSource, match="not those that"):
        run(recipe(), swapped, tmp_path, 0.01, 0.02, "cpu")

    capsys.readouterr()
    with pytest.raises(typer.Exit) as exit:
        main(data, tmp_path, 0.01, 0.02, "byol", 2, 32, 0.03, "small-cnn", "cpu")
    printed = capsys.readouterr()
    assert exit.value.exit_code == 2 and printed.out == ""
    assert printed.err.startswith("cifar10_gpu: ") and printed.err.count("\n") == 1


@pytest.mark.parametrize(("count", "size"), [(10, 3), (12, 4), (5, 5)])
def test_batches_go_on_anywhere_and_miss_no_picture_but_the_last_few(count: int, size: int) -> None:
    straight = [batch.tolist() for batch in islice(batches(count, size, 0, CPU), 9)]
    for start in range(9):
        assert [batch.tolist() for batch in islice(batches(count, size, start, CPU), 9 - start)] == straight[start:]
    an_epoch = count // size
    first, second = straight[:an_epoch], straight[an_epoch : 2 * an_epoch]
    for epoch in (first, second):
        assert len({position for batch in epoch for position in batch}) == size * an_epoch
    assert first != second


def test_the_rate_and_the_evaluations_follow_the_time() -> None:
    assert rate(0) == 0 and rate(0.005) == pytest.approx(0.5, abs=1e-3)
    assert rate(0.5) == pytest.approx(0.5)
    assert rate(1) == rate(1.01) == 0
    assert [next_due(seconds, 100.0) for seconds in (0, 24.9, 25, 99)] == [25, 25, 50, 100]


def test_knn_is_the_headline_figure_and_scikit_learns() -> None:
    random = Generator().manual_seed(0)
    centres = torch.randn(6, 12, generator=random)

    def clouds(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 6
        return F.normalize(centres[labels] + 1.5 * torch.randn(count, 12, generator=random), dim=1), labels

    (bank, labels), (queries, asked) = clouds(500), clouds(1200)
    ours = knn_accuracy(bank, labels, queries, asked, 20, 0.07)
    assert 0.3 < ours < 0.95
    assert ours == pytest.approx(headline_accuracy(*(part.numpy() for part in (bank, labels, queries, asked))))
    for k, temperature in ((10, math.inf), (200, 0.1)):

        def weigh(distances: Any, temperature: float = temperature) -> Any:
            return np.exp((1 - distances) / temperature)

        peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weigh).fit(bank, labels)
        assert knn_accuracy(bank, labels, queries, asked, k, temperature) == pytest.approx(
            float(peer.score(queries, asked)), abs=0.005
        )  # ties


def small_method() -> Method:
    torch.manual_seed(0)
    return build_method(recipe(), build_backbone("small-cnn", 3, 32), 100)


@pytest.mark.parametrize(("eager", "compiled"), [(2.0, 1.0), (1.0, 2.0), (1.0, None)])
def test_the_backbone_is_compiled_where_that_pays(eager: float, compiled: float | None) -> None:
    """What is timed is told here; nothing is compiled before a first batch."""
    method, found = small_method(), iter([eager, compiled])

    def trial(tried: Method) -> float:
        pace = next(found)
        if pace is None:
            raise RuntimeError("no compiler here")
        return pace

    assert (quicker(method, trial) is method) == (compiled is not None and compiled > eager)


def test_a_trial_leaves_the_weights_as_they_were() -> None:
    method = small_method().train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    pixels = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)

    def learn() -> Any:
        views = make_views(pixels, recipe(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1), Generator().manual_seed(0))
        result = method.step(Batch(views, torch.arange(32), None))
        result.loss.backward()  # type: ignore[no-untyped-call]
        return result

    assert views_per_s(learn, method, recipe()) > 0
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(weight.grad is None for weight in method.parameters())


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what makes a GPU's host wait: a tensor from one device to another, a number asked for."""

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
    """What augment keeps for a device is made of fake tensors in the test below."""
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
                result = method.step(Batch(made, chosen, labels[chosen]))
                method.update(0.5)
            assert attempt == 0 or waits.seen == []  # the first fills augment's tables
        assert made.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert result.loss.device.type == result.embeddings.device.type == "cuda"
