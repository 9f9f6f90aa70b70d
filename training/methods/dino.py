"""DINO. Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv:2104.14294."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones import Backbone, mlp, output_dimension
from training.distributed import encode
from training.losses import dino, sinkhorn_center
from training.methods.method import Batch, Method, Step, follow, momentum_copy, positive_cosine
from training.recipe import Recipe


class DINO(Method):
    """The student g_θs predicts the teacher g_θt, which follows it with momentum λ. No negatives, no predictor.

    Centring keeps the teacher's outputs from one prototype for all pictures, sharpening from all prototypes alike.
    """

    multi_crop = True
    center: Tensor

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        super().__init__(recipe, backbone, count)
        if recipe.dino.local_views:
            output_dimension(backbone.module, recipe.backbone, recipe.channels, recipe.local_side)
        self.head = Head(backbone.dimension, *recipe.projection, recipe.dino.prototypes)
        self.teacher_backbone, self.teacher_head = momentum_copy(self.backbone), momentum_copy(self.head)
        self.register_buffer("center", torch.zeros(recipe.dino.prototypes))  # (K,)

    def step(self, batch: Batch) -> Step:
        """Return the cross entropy of the teacher's global views and all views of the student; move the centre."""
        s = self.recipe.dino
        self.head.last.weight.requires_grad_(batch.progress >= s.frozen)
        h = encode(self.backbone, batch.views)  # (VN, D)
        every = h if batch.local is None else torch.cat([h, encode(self.backbone, batch.local)])
        student = self.head(every).unflatten(0, (-1, len(batch.positions)))  # (V + L, N, K)
        with torch.no_grad():
            teacher = self.teacher_head(encode(self.teacher_backbone, batch.views)).float()
            teacher = teacher.unflatten(0, (len(batch.views), -1))  # (V, N, K)
        first, later = s.teacher_temperature
        sharpness = first + (later - first) * min(1.0, batch.progress / max(s.teacher_warmup, 1e-9))
        if s.centering == "sinkhorn":
            self.center.copy_(sinkhorn_center(teacher.flatten(0, 1), sharpness))
        loss = dino(student, teacher, self.center, s.temperature, sharpness)
        if s.centering == "mean":
            self.center.lerp_(teacher.mean((0, 1)), 1 - s.center_momentum)
        return Step(loss, h.detach(), positive_cosine(student))

    def update(self, progress: float) -> None:
        """Move the teacher: θ_t ← λ·θ_t + (1 − λ)·θ_s, with λ on a cosine from λ_base to 1."""
        momentum = 1 - (1 - self.recipe.dino.momentum) * (math.cos(math.pi * progress) + 1) / 2
        follow(self.teacher_backbone, self.backbone, momentum)
        follow(self.teacher_head, self.head, momentum)


class Head(nn.Module):
    """An MLP of three layers, its output scaled to unit length, and a last layer with weight norm and no gains."""

    def __init__(self, dimension: int, hidden: int, output: int, prototypes: int) -> None:
        super().__init__()
        # Without the last batch norm the loss of short runs climbed to ln K, that of uniform outputs.
        self.layers = mlp(dimension, hidden, hidden, output)
        self.last = nn.Linear(output, prototypes, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return (M, K) cosines of the projections of h (M, D) and the prototypes."""
        return F.linear(F.normalize(self.layers(h), dim=1), F.normalize(self.last.weight, dim=1))
