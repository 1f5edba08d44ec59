"""Hinge over squared distances: VSE0 and VSE++ with a margin that may adapt, as in LESS.

An anchor i with its partner at d²_i and a negative j violates by h_ij = [m_ij + d²_i - d²_ij]₊. `hardest` takes each
anchor's largest violation (the max of hinges, VSE++, Faghri et al., BMVC 2018, equation 6), `sum` adds all of them up
(their baseline VSE0, equation 5), `mean` (ours) is the mean over the negatives that violate, and `weighted` (ours)
weights that mean by h_ij², held constant. The last two are of the order of the largest violation whatever the batch, so
the gradient keeps its size when a warm-up on the mean ends.
"""

from torch import Tensor, nn

from train.config import HingeConfig, Mining, SettingsError
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
    if mining == "sum":
        return violation.sum(1).mean()
    weight = violation.detach() ** 2 if mining == "weighted" else (violation > 0).float()
    return ((weight * violation).sum(1) / weight.sum(1).clamp_min(1e-12)).mean()


class HingeLoss(nn.Module):
    """The hinge with its margin and its warm-up on the mean over all negatives.

    Raises:
        SettingsError: on a warm-up that is no share of training, and see `Margin`.
    """

    def __init__(self, config: HingeConfig) -> None:
        super().__init__()
        if not 0 <= config.warmup <= 1:
            raise SettingsError(f"found hinge warmup {config.warmup}; expected a share of training, 0 to 1")
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
            progress: share of training done, 0 to 1; below `warmup` nothing is mined or weighted.

        Returns:
            A scalar, at least 0.
        """
        waits = self.config.mining in ("hardest", "weighted") and progress < self.config.warmup
        mining: Mining = "mean" if waits else self.config.mining
        return hinge(positive, distances, negatives, margin, mining)
