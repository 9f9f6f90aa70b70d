"""The interface between the loop and a method: views of a batch go in, a loss and its diagnostics come out."""

from abc import ABC, abstractmethod
from copy import deepcopy
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones import Backbone, mlp
from training.batch_norms import synchronise
from training.distributed import encode
from training.recipe import Recipe

_Module = TypeVar("_Module", bound=nn.Module)


class Captioned(NamedTuple):
    """The captions of a batch's N pictures, one for each; those that are the same are encoded once.

    Attributes:
        tokens: (M, T) int64, of M distinct texts.
        mask: (M, T) int64, 1 for a token and 0 for padding.
        which: (N,) int64, each picture's row in tokens.
        groups: (N,) int64; texts of one group say the same.
    """

    tokens: Tensor
    mask: Tensor
    which: Tensor
    groups: Tensor


class Batch(NamedTuple):
    """The input of a method.

    Attributes:
        views: (V, N, C, S, S) float32, normalised; [v, n] is view v of picture n. Of several processes each has the
            views of its share of the N pictures, and `encode` returns the embeddings of all.
        positions: (N,) int64 positions of the pictures in their source.
        labels: (N,) int64, −1 for a picture without a label; or None if the source has none.
        local: (L, N, C, s, s) float32, normalised: local views, for a multi-crop method; a share, as the views.
        progress: share of the run that is done, 0..1.
        captions: of the pictures, for a method that learns from them. With a locked backbone the views are its
            embeddings, (1, N, D).
    """

    views: Tensor
    positions: Tensor
    labels: Tensor | None
    local: Tensor | None = None
    progress: float = 0.0
    captions: Captioned | None = None


class Step(NamedTuple):
    """The output of a method for one batch.

    Attributes:
        loss: scalar, differentiable, float32.
        embeddings: (V · N, D) backbone outputs, detached; the loop watches them for collapse.
        diagnostics: scalars for the log.
    """

    loss: Tensor
    embeddings: Tensor
    diagnostics: dict[str, Tensor]


class Method(nn.Module, ABC):
    """A contrastive method. Its state_dict holds all that a resumed run needs.

    Attributes:
        needs_labels: of "all" pictures of a batch, of "some" pictures of the source, or None.
        needs_captions: whether a batch has captions.
        multi_crop: whether a batch has local views, as the recipe's table `dino` says.
        synchronised: whether the backbone's batch norms compute their statistics over all processes.
        backbone: f, the part that is exported in the end.
    """

    needs_labels: ClassVar[Literal["all", "some"] | None] = None
    needs_captions: ClassVar[bool] = False
    multi_crop: ClassVar[bool] = False
    synchronised: ClassVar[bool] = True

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        """Build the method around a backbone, for a source of `count` pictures."""
        super().__init__()
        self.recipe, self.count = recipe, count
        self.backbone = backbone.module
        if self.synchronised:
            synchronise(self.backbone)

    @abstractmethod
    def step(self, batch: Batch) -> Step:
        """Return the loss of a batch."""

    def update(self, progress: float) -> None:
        """Follow an optimizer step, at `progress` (0..1) of the run. Momentum encoders move here."""


class Projected(Method):
    """A method with a projection head g behind the backbone f: the loss sees z = g(f(x)), the encoder is h = f(x)."""

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        super().__init__(recipe, backbone, count)
        self.head = self.build_head(backbone.dimension)

    def build_head(self, dimension: int) -> nn.Module:
        """Return g: one hidden layer, as in SimCLR."""
        return mlp(dimension, *self.recipe.projection)

    def project(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Return h (V · N, D) and z (V, N, P) of views (V, N, C, S, S), of which each process has a share."""
        h = encode(self.backbone, views)
        return h, self.head(h).unflatten(0, (len(views), -1))


def momentum_copy(module: _Module) -> _Module:
    """Return a copy that receives no gradient; follow() moves it."""
    return deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the target's weights: ξ ← m·ξ + (1 − m)·θ. Running statistics of batch norms are each network's own."""
    for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
        xi.lerp_(theta, 1 - momentum)


def positive_cosine(z: Tensor) -> dict[str, Tensor]:
    """Return the diagnostic that all methods share: mean cosine of a picture's first two views, z (V, N, P)."""
    return {"positive_cosine": F.cosine_similarity(z[0].detach().float(), z[1].detach().float(), dim=1).mean()}
