"""SimSiam. Source: Chen and He, Exploring Simple Siamese Representation Learning, arXiv:2011.10566."""

from itertools import permutations

import torch
from torch import nn

from training.backbones import Backbone, mlp
from training.losses import negative_cosine
from training.methods.method import Batch, Projected, Step, positive_cosine
from training.recipe import Recipe


class SimSiam(Projected):
    """f is backbone and projection MLP, h the prediction MLP. The loss is −cos(h(z₁), z₂), no gradient through z₂."""

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        super().__init__(recipe, backbone, count)
        output = recipe.projection[-1]
        self.predictor = mlp(output, recipe.simsiam.predictor, output, last_norm=False)

    def build_head(self, dimension: int) -> nn.Module:
        """Return the projection MLP: two hidden layers, and batch norm after the last one as well."""
        hidden, output = self.recipe.projection
        return mlp(dimension, hidden, hidden, output)

    def step(self, batch: Batch) -> Step:
        """Return D(p, z) over all ordered pairs of views."""
        embeddings, z = self.project(batch.views)
        p = self.predictor(z.flatten(0, 1)).view_as(z)  # (V, N, P)
        losses = [negative_cosine(p[i], z[j]) for i, j in permutations(range(len(p)), 2)]
        return Step(torch.stack(losses).mean(), embeddings.detach(), positive_cosine(z))
