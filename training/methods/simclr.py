"""SimCLR. Source: Chen et al., A Simple Framework for Contrastive Learning, arXiv:2002.05709."""

from training.losses import nt_xent
from training.methods.method import Batch, Projected, Step, positive_cosine


class SimCLR(Projected):
    """NT-Xent on z = g(f(x)), with f the backbone and g the projection head."""

    def step(self, batch: Batch) -> Step:
        """Return NT-Xent over all views."""
        h, z = self.project(batch.views)
        return Step(nt_xent(z, self.recipe.simclr.temperature), h.detach(), positive_cosine(z))
