"""Where a run computes, in which precision, and whether its backbone is compiled."""

import math
import sys
import time
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from service.errors import InvalidRequest
from training.distributed import local_device
from training.methods import Method
from training.recipe import LOCKED, Recipe

# The first steps of a trial are not timed, because they include allocation and compilation.
_SETTLING, _TIMED = 5, 15
# bfloat16 that takes so many times as long on a few pictures will not be faster on a batch.
_FEW, _HOPELESS = (4, 16), 3


def choose_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        InvalidRequest: cuda was asked for and torch finds no GPU; or none for this process of several.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or auto")
    return local_device(torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"))


def choose_precision(recipe: Recipe, backbone: nn.Module, on: torch.device) -> str:
    """Return the recipe's precision. For "auto" on a CPU, time a copy of the backbone in float32 and in bfloat16."""
    if recipe.precision != "auto":
        return recipe.precision
    # There is nothing to time in a locked backbone.
    if recipe.backbone == LOCKED:
        return "float32"
    if on.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    tried = deepcopy(backbone)
    # Dropout draws numbers, and the run's own must not depend on the trial.
    with torch.random.fork_rng(devices=[]):
        # Where a CPU has no good bfloat16 kernel for a layer, a whole batch may take minutes; a few pictures show it.
        for count in _FEW:
            few = _seconds(tried, torch.randn(count, recipe.channels, recipe.side, recipe.side), 2)
            if few[True] > _HOPELESS * few[False]:
                return "float32"
        taken = _seconds(tried, torch.randn(recipe.batch_size, recipe.channels, recipe.side, recipe.side), 5)
    return "bfloat16" if taken[True] < 0.9 * taken[False] else "float32"


def _seconds(backbone: nn.Module, pictures: Tensor, times: int) -> dict[bool, float]:
    """Return the least time of a forward and backward pass on the CPU, with bfloat16 (True) and without."""
    seconds = {False: math.inf, True: math.inf}
    # Alternating and taking the least time of each keeps other load on the machine from deciding.
    for _ in range(times):
        for enabled in seconds:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                embeddings = backbone(pictures)
            # A backbone that is frozen as a whole has no gradient.
            if embeddings.requires_grad:
                embeddings.float().square().mean().backward()
            seconds[enabled] = min(seconds[enabled], time.perf_counter() - start)
    return seconds


def compile_if_faster(method: Method, learn: Callable[[], object]) -> bool:
    """Compile the method's backbone in place if a trial measures that to be faster; return whether it was.

    Args:
        method: its weights and buffers are put back after the trial.
        learn: makes the method's forward and backward pass of one batch.

    Cost: a compilation, which may take a minute, and 40 steps.
    """
    before = deepcopy(method.state_dict())
    plain, compiled, begun = steps_per_s(method, learn), 0.0, time.perf_counter()
    try:
        # Local views have a side of their own; dynamic shapes would be slower for both.
        method.backbone.compile(dynamic=False)
        compiled = steps_per_s(method, learn)
    # A compiler or a driver may raise any exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        print(f"the backbone cannot be compiled: {type(error).__name__}: {reason}", file=sys.stderr)
    took = time.perf_counter() - begun
    print(f"steps/s: {plain:.1f}, compiled {compiled:.1f} (in {took:.0f} s)", file=sys.stderr)
    method.zero_grad()
    method.load_state_dict(before)
    if compiled <= plain:
        # torch has no public way back from Module.compile.
        method.backbone._compiled_call_impl = None
    return compiled > plain


def steps_per_s(method: Method, learn: Callable[[], object]) -> float:
    """Return how many forward and backward passes a method makes a second, after a few that are not timed."""
    on = next(method.parameters()).device
    for number in range(_SETTLING + _TIMED):
        if number == _SETTLING:
            begun = now(on)
        learn()
        method.zero_grad()
    return _TIMED / (now(on) - begun)


def now(on: torch.device) -> float:
    """Return the time in seconds, after the device has finished all queued work."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter()
