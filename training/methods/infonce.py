"""InfoNCE with explicit negatives. Source: van den Oord et al., Contrastive Predictive Coding, arXiv:1807.03748."""

import torch
from torch import Tensor

from training.losses import info_nce
from training.methods.method import Batch, Projected, Step, positive_cosine


class InfoNCE(Projected):
    """The query is a picture's first view, its positive another picture of its label; other labels are negatives."""

    needs_labels = "all"

    def step(self, batch: Batch) -> Step:
        """Return the mean loss of the first view against each other view."""
        assert batch.labels is not None
        h, z = self.project(batch.views)
        partner = next_of_label(batch.labels)  # (N,)
        unlike = batch.labels[:, None] != batch.labels  # (N, N)
        temperature = self.recipe.infonce.temperature
        losses = [info_nce(z[0], keys[partner], keys, temperature, unlike) for keys in z[1:]]
        return Step(torch.stack(losses).mean(), h.detach(), positive_cosine(z))


def next_of_label(labels: Tensor) -> Tensor:
    """Return for each of (N,) labels the index of the next equal one, cyclically; its own if it is the only one."""
    count = len(labels)
    places = torch.arange(count, device=labels.device)
    # A distance of 1 is the next place, N the place itself.
    ahead = (places - places[:, None] - 1) % count + 1  # (N, N)
    return ahead.masked_fill(labels[:, None] != labels, count + 1).argmin(1)
