"""Attention-guided erasing: what the other modality attends to is enough, the rest is not (SEDE 1).

The erased view of an image keeps only the parts that its caption *attends to* (it removes the others: the opposite of
methods that erase the most attended parts to find more of the object); likewise of a caption guided by its image. With
X̄, T̄ the views that keep only the other parts, s = -d² of a pair and [x]₊ = max(x, 0),

    L = ½ (rank(X kept, T) + rank(X, T kept)) + η · ½ (mean [s(X̄, T) - s(X, T)]₊ + mean [s(X, T̄) - s(X, T)]₊)

where rank is the ranking loss of a batch, and the means are over the rows that have other parts. Implements the
described component of SEDE (Pan & Huang, IJMIR 2022); the half is ours, so that L has the size of one ranking loss.
"""

from collections.abc import Callable

from torch import Tensor

from train.embeddings import Distances, Embeddings, Erased
from train.losses.distances import pair_distances

_ROUNDING = 1e-5  # equal weights must not fall below their own rounded mean


def attended(weights: Tensor, mask: Tensor, keep: float) -> Tensor:
    """Which parts stay: those with a_k ≥ keep · mean(a) over the real parts, and always the most attended one.

    Args:
        weights: (B, K) attention on each part, at least 0 where a part is real; what stands elsewhere is not read.
        mask: (B, K) bool, True where a part is real.
        keep: gamma; 0 keeps all, 1 those that are attended at least as much as the mean, more keeps fewer.

    Returns:
        (B, K) bool, nowhere True where mask is False. A row with real parts keeps at least one.
    """
    real = weights.detach().float().masked_fill(~mask, 0.0)
    mean = real.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)  # (B, 1)
    largest = real.amax(1, keepdim=True)
    return mask & ((real >= keep * mean * (1 - _ROUNDING)) | (real == largest))


def erasing(
    image: Embeddings,
    text: Embeddings,
    erased: Erased,
    distances: Distances,
    rank: Callable[[Tensor], Tensor],
    full: Tensor,
    irrelevant: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss; see the file's docstring.

    Args:
        image: B whole images.
        text: B whole captions.
        erased: their erased views.
        distances: the host's.
        rank: (B, B) squared distances -> the ranking loss of a batch, both directions.
        full: (B,) squared distance of each whole image to its whole caption.
        irrelevant: η.

    Returns:
        A scalar, at least 0, and its parts before their weights: `kept`, `irrelevant`; scalars without gradient.
    """
    kept = 0.5 * (rank(distances(erased.image_kept, text)) + rank(distances(image, erased.text_kept)))
    nearer = 0.5 * (
        _nearer(erased.image_dropped, text, erased.image_partial, distances, full)
        + _nearer(image, erased.text_dropped, erased.text_partial, distances, full)
    )
    return kept + irrelevant * nearer, {"kept": kept.detach(), "irrelevant": nearer.detach()}


def _nearer(image: Embeddings, text: Embeddings, partial: Tensor, distances: Distances, full: Tensor) -> Tensor:
    """Mean over partial rows of how much nearer the pair is than the whole one."""
    rows = partial.nonzero()[:, 0]  # (P,)
    if len(rows) == 0:
        return full.new_zeros(())
    found = pair_distances(distances, image.map(lambda x: x[rows]), text.map(lambda x: x[rows]))  # (P,)
    return (full[rows] - found).clamp_min(0.0).mean()
