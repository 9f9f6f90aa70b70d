"""The choice of a device, and the trial that decides whether the backbone is compiled."""

from typing import Any

import pytest
import torch
from torch import nn

from training import device
from training.backbones import build_backbone
from training.device import choose_device, choose_precision, compile_if_faster, steps_per_s
from training.methods import Batch, Method, build_method
from training.recipe import Recipe


def test_a_device_by_name() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def method(tiny_recipe: Recipe) -> Method:
    torch.manual_seed(0)
    return build_method(tiny_recipe, build_backbone("small-cnn", 1, 8), 100).train()


def test_a_backbone_that_is_frozen_as_a_whole_is_timed_too(tiny_recipe: Recipe) -> None:
    backbone = build_backbone("small-cnn", 1, 8).module.requires_grad_(False)
    assert choose_precision(tiny_recipe, backbone, torch.device("cpu")) in ("float32", "bfloat16")


@pytest.mark.parametrize(("plain", "compiled"), [(2.0, 1.0), (1.0, 2.0), (1.0, None)])
def test_the_backbone_is_compiled_if_that_is_faster(
    plain: float, compiled: float | None, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paces are given; compilation does not start before a first batch."""
    found = iter([plain, compiled])

    def pace(*_: Any) -> float:
        if (told := next(found)) is None:
            raise RuntimeError("no compiler here")
        return told

    monkeypatch.setattr(device, "steps_per_s", pace)
    faster = compiled is not None and compiled > plain
    assert compile_if_faster(method, lambda: None) == faster
    assert (method.backbone._compiled_call_impl is not None) == faster


def test_a_trial_leaves_weights_and_gradients_as_they_were(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    # The trial runs without a compilation, which would take half a minute.
    monkeypatch.setattr(nn.Module, "compile", lambda _, **__: None)
    views, count = torch.rand(2, 32, 1, 8, 8), 0

    def learn() -> None:
        nonlocal count
        count += 1
        method.step(Batch(views, torch.arange(32), None)).loss.backward()  # type: ignore[no-untyped-call]

    assert steps_per_s(method, learn) > 0
    before = {name: value.clone() for name, value in method.state_dict().items()}
    compile_if_faster(method, learn)
    assert count == 3 * 20
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(weight.grad is None for weight in method.parameters())
