"""What every loss reads: squared distances between embeddings, and which pairs are negatives.

All losses work on squared distances, computed once per step. For unit vectors d² = 2 - 2 cos.

A ranking loss ranks one *direction* at a time, as a `Rank`: B anchors of one modality, the distance of each to its own
partner, and N candidates of the other modality, of which some are negatives. A batch is ranked in both directions, and
so is a memory bank, whose candidates nobody is the anchor of.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from train.embeddings import Distances, Embeddings

Rank = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(positive, distances, negatives, margin) -> a scalar, at least 0: the loss of one direction, a mean over anchors.

- positive: (B,) squared distance of each anchor to its own partner.
- distances: (B, N) squared distances of the anchors to the candidates.
- negatives: (B, N) bool; what is not a negative is not looked at, so a partner may stand among the candidates.
- margin: a scalar or (B, N), in squared distance: negatives count as this much closer than they are.
"""


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


def pair_distances(distances: Distances, image: Embeddings, text: Embeddings, block: int = 16) -> Tensor:
    """Squared distances of pairs alone: the diagonal of the host's distances, without the whole matrix.

    Args:
        distances: the host's.
        image: N images, at least one.
        text: their N captions.
        block: rows that are compared with each other at once, so the cost is N · block comparisons, not N².

    Returns:
        (N,).
    """

    def pairs_from(first: int) -> Tensor:
        def rows(values: Tensor) -> Tensor:
            return values[first : first + block]

        return distances(image.map(rows), text.map(rows)).diagonal()

    return torch.cat([pairs_from(first) for first in range(0, len(image), block)])


def share_no_image(image_ids: Tensor, mixed_ids: Tensor, others: Tensor, mixed_others: Tensor) -> Tensor:
    """Which rows are negatives: those that have no image in common, neither shown nor mixed in.

    Args:
        image_ids: (B,) int64.
        mixed_ids: (B,) int64, `image_ids` again where nothing is mixed.
        others: (N,) int64, images of the candidates.
        mixed_others: (N,) int64.

    Returns:
        (B, N) bool.
    """
    apart = image_ids[:, None] != others
    for one, other in ((image_ids, mixed_others), (mixed_ids, others), (mixed_ids, mixed_others)):
        apart &= one[:, None] != other
    return apart


def negative_pairs(image_ids: Tensor, mixed_ids: Tensor) -> Tensor:
    """Which pairs (i, j) of a batch are negatives: see `share_no_image`.

    Args:
        image_ids: (B,) int64.
        mixed_ids: (B,) int64, `image_ids` again where nothing is mixed.

    Returns:
        (B, B) bool, symmetric, False on the diagonal.
    """
    return share_no_image(image_ids, mixed_ids, image_ids, mixed_ids)


def both_directions(rank: Rank, distances: Tensor, negatives: Tensor, margin: Tensor) -> Tensor:
    """The ranking loss of a batch: image to text plus text to image.

    Args:
        rank: one direction.
        distances: (B, B) squared distances, images in rows, captions in columns, pairs on the diagonal.
        negatives: (B, B) bool.
        margin: a scalar or (B, B).

    Returns:
        A scalar, at least 0.
    """
    pair = distances.diagonal()
    return rank(pair, distances, negatives, margin) + rank(pair, distances.T, negatives.T, margin.t())


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
