"""Hinge over squared distances, both directions: VSE0 and VSE++ with a margin that may adapt (LESS 4).

An anchor i with its pair at d²_ii and a negative j violates by [m_ij + d²_ii - d²_ij]₊. `hardest` takes each
anchor's largest violation (VSE++, Faghri et al., BMVC 2018), `all` the mean over the negatives that violate.
That mean, unlike the sum of VSE0, is of the order of the largest violation whatever the batch, so the
gradient keeps its size when the warm-up ends.
"""

from torch import Tensor, nn

from train.config import HingeConfig
from train.margin import Margin


def hinge(distances: Tensor, negatives: Tensor, margin: Tensor, *, hardest: bool) -> Tensor:
    """Mean over anchors, summed over image-to-text and text-to-image.

    Args:
        distances: (B, B) squared distances, images in rows, captions in columns, pairs on the diagonal.
        negatives: (B, B) bool; an anchor without negatives adds 0.
        margin: a scalar or (B, B), in squared distance.
        hardest: the largest violation of each anchor; otherwise the mean of its violations.

    Returns:
        A scalar, at least 0.
    """
    pair = distances.diagonal()
    total = distances.new_zeros(())
    for anchors, over in ((pair[:, None], 1), (pair[None, :], 0)):  # images, then captions, as anchors
        violation = (margin + anchors - distances).clamp_min(0.0).masked_fill(~negatives, 0.0)  # (B, B)
        each = violation.amax(over) if hardest else violation.sum(over) / (violation > 0).sum(over).clamp_min(1)
        total = total + each.mean()
    return total


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
        hardest = self.config.mining == "hardest" and progress >= self.config.warmup
        return hinge(distances, negatives, margin, hardest=hardest), margin
