"""Triplet loss. Source: Schroff et al., FaceNet, arXiv:1503.03832; Hermans et al., arXiv:1703.07737."""

from training.losses import triplet
from training.methods.method import Batch, Projected, Step, positive_cosine


class Triplet(Projected):
    """Anchors, positives and negatives are mined by label among all views of the batch."""

    needs_labels = "all"

    def step(self, batch: Batch) -> Step:
        """Return the loss of the mined triplets."""
        assert batch.labels is not None
        h, z = self.project(batch.views)
        settings = self.recipe.triplet
        loss = triplet(z.flatten(0, 1), batch.labels.repeat(len(z)), settings.margin, settings.mining)
        return Step(loss, h.detach(), positive_cosine(z))
