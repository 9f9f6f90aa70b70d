"""SimCLR. Source: Chen et al., A Simple Framework for Contrastive Learning, arXiv:2002.05709."""

from torch import Tensor, nn

from training.backbones import projection_head
from training.losses import nt_xent
from training.methods import Step
from training.recipe import Recipe


class SimCLR(nn.Module):
    """f(·) backbone, g(·) projection head; NT-Xent on z = g(f(x)). h = f(x) is what is kept."""

    def __init__(self, recipe: Recipe, backbone: nn.Module, dimension: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = projection_head(dimension, *recipe.projection)
        self.temperature = recipe.temperature

    def step(self, views: Tensor) -> Step:
        """Return NT-Xent over two views, (2, N, C, S, S)."""
        h = self.backbone(views.flatten(0, 1))  # (2N, D)
        z1, z2 = self.head(h).chunk(2)  # (N, projection) each
        return Step(nt_xent(z1, z2, self.temperature), h.detach())
