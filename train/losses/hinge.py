"""Hinge over squared distances, both directions: VSE0 and VSE++ with a margin that may adapt (LESS 4).

An anchor i with its pair at d²_ii and a negative j violates by h_ij = [m_ij + d²_ii - d²_ij]₊. `hardest` takes
each anchor's largest violation (VSE++, Faghri et al., BMVC 2018), `all` the mean over the negatives that violate,
`weighted` (ours) that mean with weights h_ij², held constant, which is between the two. A mean, unlike the sum of
VSE0, is of the order of the largest violation whatever the batch, so the gradient keeps its size when the warm-up
ends.
"""

from torch import Tensor, nn

from train.config import HingeConfig, Mining
from train.margin import Margin


def hinge(distances: Tensor, negatives: Tensor, margin: Tensor, mining: Mining) -> Tensor:
    """Mean over anchors, summed over image-to-text and text-to-image.

    Args:
        distances: (B, B) squared distances, images in rows, captions in columns, pairs on the diagonal.
        negatives: (B, B) bool; an anchor without negatives adds 0.
        margin: a scalar or (B, B), in squared distance.
        mining: how an anchor's violations become one number.

    Returns:
        A scalar, at least 0.
    """
    pair = distances.diagonal()
    total = distances.new_zeros(())
    for anchors, over in ((pair[:, None], 1), (pair[None, :], 0)):  # images, then captions, as anchors
        violation = (margin + anchors - distances).clamp_min(0.0).masked_fill(~negatives, 0.0)  # (B, B)
        total = total + _reduced(violation, over, mining).mean()
    return total


def _reduced(violation: Tensor, over: int, mining: Mining) -> Tensor:
    """One number (B,) an anchor."""
    if mining == "hardest":
        return violation.amax(over)
    weight = violation.detach() ** 2 if mining == "weighted" else (violation > 0).float()
    return (weight * violation).sum(over) / weight.sum(over).clamp_min(1e-12)


class HingeLoss(nn.Module):
    """The hinge with its margin and its warm-up on all negatives."""

    def __init__(self, config: HingeConfig) -> None:
        super().__init__()
        self.config = config
        self.margin = Margin(config.margin)

    def forward(self, distances: Tensor, negatives: Tensor, semantic: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """The loss and the margin it used.

        Args:
            distances: (B, B) squared distances, pairs on the diagonal.
            negatives: (B, B) bool.
            semantic: (B, S) frozen unit vectors of the captions.
            progress: share of training done, 0 to 1; below `warmup`, all negatives count.

        Returns:
            A scalar, and the margin: a scalar or (B, B).
        """
        margin = self.margin(distances, negatives, semantic)
        mining = self.config.mining if progress >= self.config.warmup else "all"
        return hinge(distances, negatives, margin, mining), margin
