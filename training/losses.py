"""Contrastive losses: pure functions on tensors, computed in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross entropy over the 2N views of N pictures.

    Each view's positive is the other view of its picture; the 2N − 2 views of other pictures are its
    negatives. Identical embeddings everywhere give ln(2N − 1).

    Args:
        z1, z2: (N, P) projections, row n of both from picture n; any scale, any float dtype. N >= 2.
        temperature: τ > 0.

    Returns:
        Scalar float32, the mean over the 2N views.

    Cost: a (2N, 2N) float32 matrix.
    Source: Chen et al., arXiv:2002.05709, equation 1.
    """
    count = len(z1)
    # Autocast would take the product and the softmax back to bfloat16.
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2N, P)
        similarity = z @ z.T / temperature  # (2N, 2N)
        similarity.fill_diagonal_(-torch.inf)  # a view is not its own negative
        positive = (torch.arange(2 * count, device=z.device) + count) % (2 * count)  # n ↔ n + N
        return F.cross_entropy(similarity, positive)
