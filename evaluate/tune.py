"""What is chosen on validation after training, and stored with the model."""

import torch
from torch import Tensor

from evaluate.protocols import evaluate_full
from train.embeddings import Embeddings
from train.hosts import DualEncoder
from train.local import combine

SHARES = tuple(step / 20 for step in range(20))
"""Shares that are tried; 1 would leave the global half unused."""


@torch.no_grad()
def tune_share(model: DualEncoder, images: Embeddings, captions: Embeddings, owner: Tensor, *, tile: int) -> float:
    """The local half's share w of the similarity (HIER) with the best rSum; the model keeps it.

    Args:
        model: with a local space.
        images: N images of the validation split.
        captions: its M captions.
        owner: (M,) row of each caption's image.
        tile: rows scored at once.

    Returns:
        w; the smallest of those that are equally good.
    """

    def rsum(share: float) -> float:
        one, other = (combine(side.vector, side.local, share) for side in (images, captions))
        return evaluate_full(one, other, owner, split="", tile=tile).rsum

    best = max(SHARES, key=rsum)
    model.share.fill_(best)
    return best
