"""Contrastive losses: pure functions on tensors, computed in float32, each with its paper's symbols."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Mining = Literal["hard", "semi-hard"]


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross entropy over the V·N views of N pictures.

    Each view's positives are the other views of its picture; the views of other pictures are its negatives.
    With two views this is SimCLR's loss; with more, the cross entropies of all positives are averaged.
    Identical embeddings everywhere give ln(V·N − 1).

    Args:
        z: (V, N, P) projections, [v, n] of view v of picture n; any scale, any float dtype. V, N >= 2.
        temperature: τ > 0.

    Returns:
        Scalar float32, the mean over all views.

    Cost: a (VN, VN) float32 matrix.
    Source: Chen et al., arXiv:2002.05709, equation 1.
    """
    views, count = z.shape[:2]
    return supcon(z.flatten(0, 1), torch.arange(count, device=z.device).repeat(views), temperature)


def supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss, the form with the sum outside of the logarithm.

    Each row's positives are the other rows of its label. A row without positives does not count in the mean; if no row
    has a positive, the loss is 0.

    Args:
        z: (M, P) projections; any scale, any float dtype.
        labels: (M,) integers.
        temperature: τ > 0.

    Returns:
        Scalar float32.

    Cost: an (M, M) float32 matrix.
    Source: Khosla et al., arXiv:2004.11362, equation 2 (L_out).
    """
    with _float32(z):
        z = F.normalize(z.float(), dim=1)  # (M, P)
        similarity = z @ z.T / temperature  # (M, M)
        # No row is its own negative.
        similarity.fill_diagonal_(-torch.inf)
        positive = _positives(labels)
        # This removes the −inf of the diagonal as well.
        log_share = similarity.log_softmax(1).masked_fill(~positive, 0)
        counts = positive.sum(1)  # (M,)
        anchors = counts > 0
        return -(log_share.sum(1) / counts.clamp(min=1)).sum() / anchors.sum().clamp(min=1)


def info_nce(
    queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float, allowed: Tensor | None = None
) -> Tensor:
    """Return InfoNCE: each query has one positive and explicit negatives.

    Args:
        queries, positives: (N, P), row n of one belongs to row n of the other; any scale.
        negatives: (M, P), shared by all queries.
        temperature: τ > 0.
        allowed: (N, M) bool, which negatives count for which query; None: all.

    Returns:
        Scalar float32; identical embeddings everywhere give ln(1 + M).

    Cost: an (N, 1 + M) float32 matrix.
    Source: van den Oord et al., arXiv:1807.03748, equation 4; He et al., arXiv:1911.05722, equation 1.
    """
    with _float32(queries):
        q, k, n = (F.normalize(rows.float(), dim=1) for rows in (queries, positives, negatives))
        others = q @ n.T  # (N, M)
        if allowed is not None:
            others = others.masked_fill(~allowed, -torch.inf)
        logits = torch.cat([(q * k).sum(1, keepdim=True), others], 1) / temperature  # (N, 1 + M)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Return D(p, z) = −cos(p, z), the mean over rows; no gradient flows into z.

    Args:
        p: (N, P) predictions.
        z: (N, P) targets.

    Source: Chen and He, arXiv:2011.10566, equation 1. BYOL's loss (Grill et al., arXiv:2006.07733, equation 2)
    is 2 + 2·D.
    """
    with _float32(p):
        return -F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()


def dino(
    student: Tensor, teacher: Tensor, center: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the mean cross entropy H(P_t, P_s) over all pairs of a teacher's view and another view of the student.

    Args:
        student: (S, N, K) outputs; the first T views are those of the teacher.
        teacher: (T, N, K) outputs, no gradient flows into them; S, T >= 1 and S + T >= 3.
        center: (K,) float32, subtracted from the teacher's outputs.
        student_temperature, teacher_temperature: τ_s, τ_t > 0.

    Returns:
        Scalar float32; identical outputs everywhere and a center of 0 give ln K.

    Cost: O(S · T · N · K).
    Source: Caron et al., arXiv:2104.14294, equations 1 to 3 and algorithm 1.
    """
    with _float32(student):
        log_p = (student.float() / student_temperature).log_softmax(2)  # (S, N, K)
        targets = ((teacher.detach().float() - center) / teacher_temperature).softmax(2)  # (T, N, K)
        entropies = -(targets.flatten(1) @ log_p.flatten(1).T)  # (T, S)
        # A view does not teach itself.
        pairs = entropies.numel() - min(entropies.shape)
        return entropies.fill_diagonal_(0).sum() / (pairs * student.shape[1])


def sinkhorn_center(outputs: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Return the centre with which a batch of teacher's outputs uses all prototypes equally.

    The softmax of (outputs - centre) / temperature approaches the matrix of rows that sum to 1 and columns that sum to
    M / K by Sinkhorn-Knopp iterations.

    Args:
        outputs: (M, K) of the teacher; no gradient flows into them.
        temperature: τ_t > 0.
        iterations: alternating normalisations of rows and columns, >= 1.

    Returns:
        (K,) float32; identical outputs give themselves up to a constant, and so a uniform softmax.

    Cost: O(iterations · M · K).
    Source: Caron et al., SwAV, arXiv:2006.09882, section 3.1; in place of DINO's centre: Oquab et al., DINOv2,
        arXiv:2304.07193, section 4.
    """
    with _float32(outputs):
        scores = outputs.detach().float() / temperature  # (M, K)
        potential = scores.new_zeros(scores.shape[1])  # (K,)
        for _ in range(iterations):
            rows = (scores + potential).logsumexp(1, keepdim=True)  # (M, 1)
            potential = -(scores - rows).logsumexp(0)
        return -temperature * potential


def barlow_twins(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    """Return the distance of the views' cross-correlation matrix C from the identity.

    Args:
        z_a, z_b: (N, P), N >= 2; normalised here over the batch, column by column.
        lambd: λ, the weight of the terms off the diagonal.

    Returns:
        Scalar float32: Σ (1 − C_ii)² + λ Σ C_ij². Identical columns of one scale give P·(P − 1)·λ.

    Cost: O(N · P²).
    Source: Zbontar et al., arXiv:2103.03230, equations 1 and 2.
    """
    with _float32(z_a):
        a, b = (_standardise(z.float()) for z in (z_a, z_b))
        c = a.T @ b / len(a)  # (P, P)
        on, squares = c.diagonal(), c.square()
        return (1 - on).square().sum() + lambd * (squares.sum() - on.square().sum())


def vicreg(z_a: Tensor, z_b: Tensor, lambd: float, mu: float, nu: float) -> Tensor:
    """Return λ · invariance + μ · variance + ν · covariance.

    Args:
        z_a, z_b: (N, P), N >= 2, not normalised.
        lambd, mu, nu: weights of the mean squared distance of the views, of the hinge that keeps each column's
            standard deviation above 1, and of the squared covariances off the diagonal.

    Returns:
        Scalar float32.

    Cost: O(N · P²).
    Source: Bardes et al., arXiv:2105.04906, equations 1 to 6; the variance of both views is averaged, their
    covariance added, as in the authors' code.
    """
    with _float32(z_a):
        a, b = z_a.float(), z_b.float()
        invariance = F.mse_loss(a, b)
        variance, covariance = a.new_zeros(()), a.new_zeros(())
        for z in (a, b):
            variance = variance + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
            centred = z - z.mean(0)
            c = centred.T @ centred / (len(z) - 1)  # (P, P)
            covariance = covariance + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]
        return lambd * invariance + mu * variance + nu * covariance


def triplet(z: Tensor, labels: Tensor, margin: float, mining: Mining) -> Tensor:
    """Return the triplet loss max(0, d(a, p) − d(a, n) + margin) over triplets mined in the batch.

    d is the Euclidean distance of normalised rows. Hard: one triplet an anchor, with its farthest positive and its
    nearest negative. Semi-hard: for each pair (a, p) the nearest negative that is farther than p, or else the farthest
    negative.

    Args:
        z: (M, P); any scale.
        labels: (M,) integers.
        margin: > 0.
        mining: "hard" or "semi-hard".

    Returns:
        Scalar float32, the mean over the triplets; 0 without triplets.

    Cost: an (M, M) matrix, sorted for semi-hard.
    Source: Schroff et al., arXiv:1503.03832, equations 1 and 2 and section 3.2; Hermans et al.,
    arXiv:1703.07737, equation 5.
    """
    with _float32(z):
        distance = _distances(z)  # (M, M)
        positive, negative = _positives(labels), labels[:, None] != labels
        if mining == "hard":
            farthest = distance.masked_fill(~positive, -torch.inf).amax(1)  # (M,)
            nearest = distance.masked_fill(~negative, torch.inf).amin(1)  # (M,)
            some = positive.any(1) & negative.any(1)
            return F.relu(farthest - nearest + margin)[some].sum() / some.sum().clamp(min=1)
        # The choice of a negative needs no gradient.
        with torch.no_grad():
            ordered, order = distance.masked_fill(~negative, torch.inf).sort(1)  # (M, M)
            # The place of the first distance above d(a, p).
            farther = torch.searchsorted(ordered, distance, right=True)  # (M, M)
            last = (negative.sum(1, keepdim=True) - 1).clamp(min=0)
            chosen = order.gather(1, torch.minimum(farther, last))  # (M, M)
        some = positive & negative.any(1, keepdim=True)
        return F.relu(distance - distance.gather(1, chosen) + margin)[some].sum() / some.sum().clamp(min=1)


def margin_contrast(z: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the contrastive loss of pairs: ½ d² where labels agree, ½ max(0, margin − d)² where they differ.

    It is the mean over the pairs of equal labels plus the mean over the others: in a batch of many classes the unlike
    pairs are far more.

    Args:
        z: (M, P); normalised here, so d is in 0..2.
        labels: (M,) integers.
        margin: m > 0.

    Returns:
        Scalar float32. A kind of pair that does not occur adds 0.

    Cost: an (M, M) matrix.
    Source: Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006, equation 4.
    """
    with _float32(z):
        distance = _distances(z)
        positive, negative = _positives(labels), labels[:, None] != labels
        pull = distance.square()[positive].sum() / positive.sum().clamp(min=1)
        push = F.relu(margin - distance).square()[negative].sum() / negative.sum().clamp(min=1)
        return (pull + push) / 2


def clip(images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
    """Return CLIP's loss: cross entropy of the pictures over the texts and of the texts over the pictures, averaged.

    Row n of one belongs to row n of the other, and so do all rows of one group: texts that say the same are no
    negatives of each other's pictures. With positives P(n), each row costs −Σ log softmax over P(n), divided by
    |P(n)|. Where all groups differ, this is CLIP's equation.

    Args:
        images, texts: (N, P); any scale, any float dtype.
        scale: 1/τ, a scalar that may learn.
        groups: (N,) integers.

    Returns:
        Scalar float32; identical embeddings everywhere give ln N.

    Cost: an (N, N) float32 matrix.
    Source: Radford et al., arXiv:2103.00020, figure 3; with groups Yang et al., arXiv:2204.03610, equations 2 to 4.
    """
    with _float32(images):
        logits = scale.float() * _cosines(images, texts)  # (N, N)
        positive = groups[:, None] == groups
        weights = positive / positive.sum(1, keepdim=True)
        of_images, of_texts = (-(weights * rows.log_softmax(1)).sum(1).mean() for rows in (logits, logits.T))
        return (of_images + of_texts) / 2


def siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, groups: Tensor) -> Tensor:
    """Return SigLIP's loss: for each pair of a picture and a text, whether they belong together.

    Args:
        images, texts: (N, P), as in clip.
        scale, bias: t and b, scalars that may learn.
        groups: (N,) integers; a picture and a text of one group belong together.

    Returns:
        Scalar float32: −Σ log σ(z · (t · cosine + b)) over all pairs, divided by N, with z = 1 for pairs that belong
        together and −1 for others.

    Cost: an (N, N) float32 matrix.
    Source: Zhai et al., arXiv:2303.15343, equation 1 and algorithm 1.
    """
    with _float32(images):
        logits = scale.float() * _cosines(images, texts) + bias.float()  # (N, N)
        z = torch.where(groups[:, None] == groups, 1.0, -1.0)
        return -F.logsigmoid(z * logits).sum() / len(logits)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return (N, M) cosines of rows (N, P) and (M, P)."""
    return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T


def _float32(like: Tensor) -> torch.autocast:
    """Return a context without autocast, which would compute products and softmax in bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


def _positives(labels: Tensor) -> Tensor:
    """Return (M, M) bool: the labels are equal; False on the diagonal."""
    return (labels[:, None] == labels).fill_diagonal_(False)


def _standardise(z: Tensor) -> Tensor:
    """Scale columns to mean 0 and standard deviation 1 over the batch; a constant column becomes 0."""
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


def _distances(z: Tensor) -> Tensor:
    """Return (M, M) Euclidean distances of normalised rows; a floor keeps the gradient at 0 finite."""
    z = F.normalize(z.float(), dim=1)
    return (2 - 2 * z @ z.T).clamp(min=1e-8).sqrt()
