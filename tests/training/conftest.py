"""One tiny encoder, pretrained on scikit-learn's digits and exported once for all tests of the training room."""

import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from service.encoding.card import Card, read_card
from training.pretrain import pretrain
from training.recipe import Recipe, read_recipe

TINY_RECIPE = """
# Seconds on one core: small enough for every test run.
method = "simclr"
backbone = "small-cnn"
side = 8
channels = 1
epochs = 2
batch_size = 64
learning_rate = 2e-3
weight_decay = 1e-4
warmup = 4
projection = [32, 16]
seed = 0

[augmentation]
rotation = 15
scale = 0.2
shift = 0.08
erase = 0.2
"""


# pytorch-metric-learning, our oracle, would load this module. It replaces the search of every FAISS index in the
# process by one of another signature, and neither we nor the tests need it.
sys.modules.setdefault("faiss.contrib.torch_utils", ModuleType("faiss.contrib.torch_utils"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Pictures of 8×8 gain nothing from threads, and sums in one order repeat to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tiny_recipe_file: Path) -> Recipe:
    return read_recipe(str(tiny_recipe_file))


@pytest.fixture(scope="session")
def tiny_model(tiny_recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small-cnn trained on digits for two epochs; its parents did not exist before."""
    root = tmp_path_factory.mktemp("tiny")
    out = root / "new" / "models" / "tiny"
    # The precision is set, so that no timing decides it.
    recipe = read_recipe(str(tiny_recipe_file), ["precision=float32"])
    pretrain("digits", recipe, out, None, "cpu", root)
    return out


@pytest.fixture(scope="session")
def tiny_card(tiny_model: Path) -> Card:
    return read_card(tiny_model)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block the network: the proxy is a port on which no process listens."""
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
        monkeypatch.setenv(variable.upper(), "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    # The opener keeps its proxies for the rest of the process.
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.fixture
def paint() -> Callable[..., bytes]:
    """paint(path, height, width, seed, grey) writes a picture of random colours and returns the file's bytes."""

    def write(path: Path, height: int = 12, width: int = 12, seed: int = 0, grey: bool = False) -> bytes:
        shape = (height, width) if grey else (height, width, 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
        return path.read_bytes()

    return write
