"""Hinge over squared distances: VSE0 and VSE++ with a margin that may adapt (LESS 4).

An anchor i with its partner at d²_i and a negative j violates by h_ij = [m_ij + d²_i - d²_ij]₊. `hardest` takes each
anchor's largest violation (the max of hinges, VSE++, Faghri et al., BMVC 2018, equation 6), `all` the mean over the
negatives that violate, `weighted` (ours) that mean with weights h_ij², held constant, which is between the two. `all`
stands for their baseline VSE0, the sum of hinges (equation 5), divided by the number of violations: unlike the sum it
is of the order of the largest violation whatever the batch, so the gradient keeps its size when the warm-up ends.
"""

from torch import Tensor, nn

from train.config import HingeConfig, Mining
from train.margin import Margin


def hinge(positive: Tensor, distances: Tensor, negatives: Tensor, margin: Tensor, mining: Mining) -> Tensor:
    """One direction: mean over anchors.

    Args:
        positive: (B,) squared distance of each anchor to its partner.
        distances: (B, N) squared distances to the candidates.
        negatives: (B, N) bool; an anchor without negatives adds 0.
        margin: a scalar or (B, N), in squared distance.
        mining: how an anchor's violations become one number.

    Returns:
        A scalar, at least 0.
    """
    violation = (margin + positive[:, None] - distances).clamp_min(0.0).masked_fill(~negatives, 0.0)  # (B, N)
    if mining == "hardest":
        return violation.amax(1).mean()
    weight = violation.detach() ** 2 if mining == "weighted" else (violation > 0).float()
    return ((weight * violation).sum(1) / weight.sum(1).clamp_min(1e-12)).mean()


class HingeLoss(nn.Module):
    """The hinge with its margin and its warm-up on all negatives."""

    def __init__(self, config: HingeConfig) -> None:
        super().__init__()
        self.config = config
        self.margin = Margin(config.margin)

    def forward(
        self, positive: Tensor, distances: Tensor, negatives: Tensor, margin: Tensor, progress: float
    ) -> Tensor:
        """One direction, a `Rank` once `progress` is given.

        Args:
            positive: (B,) squared distance of each anchor to its partner.
            distances: (B, N) squared distances to the candidates.
            negatives: (B, N) bool.
            margin: a scalar or (B, N).
            progress: share of training done, 0 to 1; below `warmup`, all negatives count.

        Returns:
            A scalar, at least 0.
        """
        mining = self.config.mining if progress >= self.config.warmup else "all"
        return hinge(positive, distances, negatives, margin, mining)
