"""One paper a file. A method is a module with `backbone` and step(views) → Step; the loop knows nothing else."""

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from training.recipe import Recipe


class Step(NamedTuple):
    """What a method makes of one batch.

    loss: scalar, differentiable, float32.
    embeddings: (V * N, D) backbone outputs, detached; the loop watches them for collapse.
    """

    loss: Tensor
    embeddings: Tensor


class Method(Protocol):
    """The interface between the loop and a paper."""

    backbone: nn.Module

    def step(self, views: Tensor) -> Step:
        """Return the loss of a batch's views, (V, N, C, S, S) float32."""
        ...


def build_method(recipe: Recipe, backbone: nn.Module, dimension: int) -> "Method":
    """Build the recipe's method around a backbone whose output has `dimension` columns."""
    from training.methods.simclr import SimCLR  # here: every method imports Step from this package

    return {"simclr": SimCLR}[recipe.method](recipe, backbone, dimension)
