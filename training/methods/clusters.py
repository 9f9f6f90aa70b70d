"""Positives by cluster: pseudo-labels from k-means on the embeddings. Source: Caron et al., arXiv:1807.05520;
the loss is SupCon's, Khosla et al., arXiv:2004.11362."""

import torch
from torch import Tensor
from torch.nn import functional as F

from training.backbones import Backbone
from training.distributed import copy_first
from training.losses import supcon
from training.methods.method import Batch, Projected, Step, positive_cosine
from training.recipe import Recipe


class Clusters(Projected):
    """Pictures of one cluster are positives. They are clustered every E epochs; until the first time it is SimCLR.

    The bank keeps each picture's embedding from its last batch, so a clustering needs no pass over the pictures.

    Cost: count · D float16.
    """

    bank: Tensor
    assignment: Tensor
    seen: Tensor

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        super().__init__(recipe, backbone, count)
        self.register_buffer("bank", torch.zeros(count, backbone.dimension, dtype=torch.float16))
        # A picture without a cluster has a pseudo-label of its own, above those of the clusters.
        self.register_buffer("assignment", recipe.clusters.clusters + torch.arange(count))
        # Pictures since the last clustering.
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def step(self, batch: Batch) -> Step:
        """Return SupCon's loss with the clusters as labels."""
        if self.seen >= self.recipe.clusters.every * self.count:
            self._cluster()
        h, z = self.project(batch.views)
        labels = self.assignment[batch.positions]  # (N,)
        with torch.no_grad():
            mean = F.normalize(h.detach().float(), dim=1).view(*z.shape[:2], -1).mean(0)  # (N, D)
            self.bank[batch.positions] = F.normalize(mean, dim=1).half()
            self.seen += len(mean)
        loss = supcon(z.flatten(0, 1), labels.repeat(len(z)), self.recipe.clusters.temperature)
        clustered = (labels < self.recipe.clusters.clusters).float().mean()
        diagnostics = positive_cosine(z) | {"clustered": clustered}
        return Step(loss, h.detach(), diagnostics)

    def _cluster(self) -> None:
        # Imported late: only this method needs it, and its import takes seconds.
        from sklearn.cluster import MiniBatchKMeans

        # The last pictures of an epoch fill no batch, so some may have no embedding yet.
        filled = self.bank.abs().sum(1) > 0
        embeddings = self.bank[filled].float().cpu().numpy()
        k = min(self.recipe.clusters.clusters, len(embeddings))
        means = MiniBatchKMeans(k, batch_size=4096, n_init=1, random_state=self.recipe.seed % 2**32)
        found = torch.from_numpy(means.fit_predict(embeddings)).to(self.assignment)
        self.assignment[filled] = found
        # Threads add in any order, so the clusters of two processes may differ.
        copy_first(self.assignment)
        self.seen.zero_()
