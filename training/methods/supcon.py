"""SupCon. Source: Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362."""

import torch
from torch import Tensor

from training.losses import supcon
from training.methods.method import Batch, Projected, Step, positive_cosine


class SupCon(Projected):
    """The networks are SimCLR's. All views of all pictures of one label are positives of one another.

    The views of a picture without a label have only one another, as in SimCLR.
    """

    needs_labels = "some"

    def step(self, batch: Batch) -> Step:
        """Return L_out over all views."""
        assert batch.labels is not None
        h, z = self.project(batch.views)
        labels = apart(batch.labels)
        loss = supcon(z.flatten(0, 1), labels.repeat(len(z)), self.recipe.supcon.temperature)
        return Step(loss, h.detach(), positive_cosine(z))


def apart(labels: Tensor) -> Tensor:
    """Return labels (N,) with a number of its own, below −1, for each −1."""
    return torch.where(labels < 0, -2 - torch.arange(len(labels), device=labels.device), labels)
