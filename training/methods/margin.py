"""Contrastive loss of pairs. Source: Hadsell et al., Dimensionality Reduction by an Invariant Mapping, CVPR 2006."""

from training.losses import margin_contrast
from training.methods.method import Batch, Projected, Step, positive_cosine


class Margin(Projected):
    """G_W is backbone and head. Pairs are formed by label among all views of the batch."""

    needs_labels = "all"

    def step(self, batch: Batch) -> Step:
        """Return the loss of all pairs."""
        assert batch.labels is not None
        h, z = self.project(batch.views)
        loss = margin_contrast(z.flatten(0, 1), batch.labels.repeat(len(z)), self.recipe.margin.margin)
        return Step(loss, h.detach(), positive_cosine(z))
