"""SupCon. Source: Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362."""

from training.losses import supcon
from training.methods.method import Batch, Projected, Step, positive_cosine


class SupCon(Projected):
    """The networks are SimCLR's. All views of all pictures of one label are positives of one another."""

    needs_labels = True

    def step(self, batch: Batch) -> Step:
        """Return L_out over all views."""
        assert batch.labels is not None
        h, z = self.project(batch.views)
        loss = supcon(z.flatten(0, 1), batch.labels.repeat(len(z)), self.recipe.supcon.temperature)
        return Step(loss, h.detach(), positive_cosine(z))
