"""What every loss reads: squared distances between embeddings, and which pairs are negatives.

All losses work on squared Euclidean distances, computed once per step. For unit vectors d² = 2 - 2 cos.
"""

import torch
from torch import Tensor


def squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """Squared Euclidean distance of every row of `u` to every row of `v`.

    Computed as ‖u‖² + ‖v‖² - 2 u·v in float32 or wider, also inside an autocast region, and never below 0.

    Args:
        u: (N, E).
        v: (M, E).

    Returns:
        (N, M) float32; float64 where an input is float64.
    """
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        u, v = u.to(dtype), v.to(dtype)
        norms = u.square().sum(1)[:, None] + v.square().sum(1)[None, :]  # (N, M)
        return torch.addmm(norms, u, v.T, alpha=-2.0).clamp_min(0.0)


def negative_pairs(image_ids: Tensor) -> Tensor:
    """Which pairs (i, j) are negatives: those that show different images.

    Args:
        image_ids: (B,) int64.

    Returns:
        (B, B) bool, symmetric, False on the diagonal.
    """
    return image_ids[:, None] != image_ids[None, :]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries of `values` where `mask` is True; 0 where it is nowhere True.

    Args:
        values: any shape.
        mask: bool, the same shape.
    """
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp_min(1)


def mean_distances(distances: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distance of the pairs, and of the negatives.

    Args:
        distances: (B, B) squared distances, row i's pair on the diagonal.
        negatives: (B, B) bool.

    Returns:
        Two scalars; the second is 0 where there are no negatives.
    """
    return distances.diagonal().mean(), masked_mean(distances, negatives)
