"""MoCo v2. Source: He et al., arXiv:1911.05722; Chen et al., Improved Baselines, arXiv:2003.04297."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.errors import InvalidRequest
from training.backbones import Backbone, mix_in, mlp
from training.distributed import count as processes
from training.distributed import encode, gather, mean_statistics, own_part
from training.losses import info_nce
from training.methods.method import Batch, Method, Step, follow, momentum_copy, positive_cosine
from training.recipe import Recipe


class MoCo(Method):
    """f_q learns and f_k follows with momentum m. A query q has its key k₊ as positive, K earlier keys as negatives.

    The first view gives the key, every other view a query. Batch norms have statistics for each part of a batch; of
    several processes each has its share of the parts.
    """

    synchronised = False

    queue: Tensor
    pointer: Tensor

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        super().__init__(recipe, backbone, count)
        if recipe.moco.splits % processes():
            raise InvalidRequest(
                f"moco.splits is {recipe.moco.splits}, and {processes()} processes divide these parts of a batch among "
                f"them: expected a multiple of {processes()}"
            )
        split_batch_norms(self.backbone, recipe.moco.splits // processes())
        self.head = mlp(backbone.dimension, *recipe.projection, norm=False)
        self.key_backbone, self.key_head = momentum_copy(self.backbone), momentum_copy(self.head)
        keys = torch.randn(recipe.moco.queue, recipe.projection[-1])
        self.register_buffer("queue", F.normalize(keys, dim=1))  # (K, P)
        # Index of the oldest key.
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def step(self, batch: Batch) -> Step:
        """Return InfoNCE of the queries against their keys and the queue; then enqueue the keys."""
        k = self._keys(batch.views[0])  # (N, P)
        h = encode(self.backbone, batch.views[1:])  # ((V−1)N, D)
        q = self.head(h)  # ((V−1)N, P)
        keys = k.repeat(len(batch.views) - 1, 1)
        # Autograd needs the queue as it is now, and _enqueue changes it before the backward pass.
        loss = info_nce(q, keys, self.queue.clone(), self.recipe.moco.temperature)
        diagnostics = positive_cosine(torch.stack([q[: len(k)], k]))
        self._enqueue(k)
        return Step(loss, h.detach(), diagnostics)

    def update(self, progress: float) -> None:  # noqa: ARG002
        """Move the key encoder: θ_k ← m·θ_k + (1 − m)·θ_q, with a constant m."""
        follow(self.key_backbone, self.backbone, self.recipe.moco.momentum)
        follow(self.key_head, self.head, self.recipe.moco.momentum)
        mean_statistics(self.backbone)
        mean_statistics(self.key_backbone)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Return keys (N, P) of a view (N, C, S, S).

        The pictures are shuffled first: no key shares its batch-norm statistics with its query, which would give the
        query away.
        """
        pictures = gather(view[None])  # (1, N, C, S, S)
        order = torch.randperm(pictures.shape[1]).to(view.device)
        k = self.key_head(encode(self.key_backbone, own_part(pictures[:, order])))
        return F.normalize(k.float(), dim=1)[order.argsort()]

    @torch.no_grad()
    def _enqueue(self, k: Tensor) -> None:
        kept = k[-len(self.queue) :]
        places = (self.pointer + torch.arange(len(kept), device=k.device)) % len(self.queue)
        self.queue[places] = kept
        self.pointer.copy_((self.pointer + len(kept)) % len(self.queue))


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm with statistics for each of `splits` parts of a batch, as on so many GPUs; ordinary in eval mode."""

    splits = 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # A part needs two pictures, because one alone has no variance.
        parts = input.tensor_split(max(1, min(self.splits, len(input) // 2)))
        return torch.cat([super(SplitBatchNorm, self).forward(part) for part in parts])


def split_batch_norms(module: nn.Module, splits: int) -> None:
    """Replace a module's batch norms by split ones, in place.

    A batch norm over the whole batch leaks which key belongs to which query (He et al., section 3.3): the model lowers
    its loss by matching batch statistics instead of pictures.
    """
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            # A norm of timm has an activation, too, which its own class computes.
            mix_in(child, SplitBatchNorm)
            child.splits = splits  # type: ignore[assignment]
