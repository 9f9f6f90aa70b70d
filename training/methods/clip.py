"""CLIP. Source: Radford et al., arXiv:2103.00020; its sigmoid form: SigLIP, Zhai et al., arXiv:2303.15343.

With the backbone `locked` it is locked-image tuning: Zhai et al., LiT, arXiv:2111.07991.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from training.backbones import Backbone
from training.distributed import encode
from training.losses import clip, siglip
from training.methods.method import Batch, Method, Step
from training.recipe import LOCKED, Recipe
from training.text_encoder import TextEncoder

# 1/τ is at most so much, by the paper: larger ones made its training unstable.
_MOST_SCALE = 100.0


class CLIP(Method):
    """Pictures and texts, each with a linear projection into one space. The temperature learns as log(1/τ).

    The projection of the pictures is a part of the exported encoder. A locked encoder has none: texts learn its space.
    """

    needs_captions = True

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        super().__init__(recipe, backbone, count)
        dimension = backbone.dimension
        if recipe.backbone != LOCKED:
            dimension = recipe.clip.dimension
            self.backbone = nn.Sequential(self.backbone, nn.Linear(backbone.dimension, dimension, bias=False))
        self.text = TextEncoder(recipe.text, dimension)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(recipe.clip.temperature)))
        self.sigmoid = recipe.clip.loss == "sigmoid"
        if self.sigmoid:
            self.bias = nn.Parameter(torch.tensor(recipe.clip.bias))

    def step(self, batch: Batch) -> Step:
        """Return the loss of all views against the captions of their pictures."""
        assert batch.captions is not None
        tokens, mask, which, groups = batch.captions
        views = len(batch.views)
        images = encode(self.backbone, batch.views)  # (V · N, P)
        texts = self.text(tokens, mask)[which].repeat(views, 1)  # (V · N, P)
        groups = groups.repeat(views)
        scale = self.log_scale.exp()
        loss = siglip(images, texts, scale, self.bias, groups) if self.sigmoid else clip(images, texts, scale, groups)
        cosine = F.cosine_similarity(images.detach().float(), texts.detach().float(), dim=1).mean()
        return Step(loss, images.detach(), {"positive_cosine": cosine, "logit_scale": scale.detach()})

    @torch.no_grad()
    def update(self, progress: float) -> None:  # noqa: ARG002
        """Keep 1/τ at 100 or below."""
        self.log_scale.clamp_(max=math.log(_MOST_SCALE))

    def scales(self) -> dict[str, float]:
        """Return what turns cosines into logits: logit_scale, and logit_bias of the sigmoid."""
        found = {"logit_scale": float(self.log_scale.detach().exp())}
        return found | ({"logit_bias": float(self.bias.detach())} if self.sigmoid else {})
