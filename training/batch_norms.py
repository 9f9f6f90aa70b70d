"""Batch norms whose statistics are those of the whole batch, of which each process has a share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from training.backbones import mix_in
from training.distributed import count


def synchronise(network: nn.Module) -> None:
    """Make the batch norms of a network compute their statistics over all processes, in place; nothing if it is alone.

    Those that are frozen stay so.
    """
    if count() > 1:
        for module in list(network.modules()):
            if isinstance(module, _BatchNorm):
                mix_in(module, SyncedBatchNorm)


class SyncedBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm on a GPU, and the same on a CPU, where torch has none; ordinary in eval mode."""

    process_group = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input (N, C, …), equal shares of N in every process."""
        if self.training and input.device.type == "cpu":
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            normalised: Tensor = _Normalise.apply(
                input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
            )
        else:
            normalised = super().forward(input)
        # A norm of timm has both, and its own forward is not called.
        for name in ("drop", "act"):
            following = getattr(self, name, None)
            normalised = normalised if following is None else following(normalised)
        return normalised


class _Normalise(torch.autograd.Function):
    """y = w · (x − μ) / √(σ² + ε) + b, with μ and σ² over the batch, the places and the processes.

    Source: Ioffe and Szegedy, arXiv:1502.03167, section 3, for both directions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        over = [0, *range(2, x.ndim)]
        own = torch.stack(torch.var_mean(x.float(), over, correction=0))  # (2, C): σ², μ of this process
        every = [torch.empty_like(own) for _ in range(count())]
        dist.all_gather(every, own)
        variances, means = torch.stack(every, 1)  # (processes, C) each
        mean = means.mean(0)
        # The shares are equal, so the variance is the mean of the own ones plus that of the means.
        var = (variances + (means - mean).square()).mean(0)
        size = x.numel() // x.shape[1] * count()
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (size / max(1, size - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.size, ctx.over = size, over
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.ndim - 2))
        dy = gradients[0].float()
        unit = (x.float() - mean.view(shape)) * scale.view(shape)  # x̂
        own = torch.stack([dy.sum(ctx.over), (dy * unit).sum(ctx.over)])  # (2, C)
        whole = own.clone()
        dist.all_reduce(whole)
        of_mean, of_var = (sums.view(shape) / ctx.size for sums in whole)
        factor = scale if weight is None else scale * weight
        dx = (dy - of_mean - unit * of_var) * factor.view(shape)
        return dx.to(x.dtype), None if weight is None else own[1], None if weight is None else own[0], *[None] * 4
