"""InfoNCE with a learned temperature (CLIP, Radford et al., ICML 2021), negatives weighted by hardness (SEDE 3).

The scores are s = -d²/2, which for unit vectors is cos - 1, so that the loss equals that of cosines. An anchor costs

    -log( e^{s⁺/τ} / (e^{s⁺/τ} + Σ_j w_j e^{s_j/τ}) ),   w_j = N · softmax_j(β s_j),  held constant,

over its N negatives. With β = 0 all w_j are 1. A margin m lifts the negatives' s_j by m/2 inside the exponent, not in
w_j.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import InfoNCEConfig, SettingsError
from train.margin import Margin

MAX_SCALE = 100.0  # CLIP's bound on 1 / τ


class InfoNCELoss(nn.Module):
    """Softmax over an anchor's partner and its negatives.

    The scale 1 / τ is kept as its logarithm, learned, and held at or below 100 by moving the parameter
    itself, as CLIP does: a clamp on its value would leave it without gradient once beyond.

    Raises:
        SettingsError: on a first temperature outside [1/100, infinity), or a hardness below 0.
    """

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        if config.temperature < 1 / MAX_SCALE:
            raise SettingsError(f"found InfoNCE temperature {config.temperature}; expected at least {1 / MAX_SCALE}")
        if config.hardness < 0:
            raise SettingsError(
                f"found InfoNCE hardness {config.hardness}; expected 0 (all negatives alike) or more (near ones first)"
            )
        self.hardness = config.hardness
        self.margin = Margin(config.margin)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)), requires_grad=config.learn)

    def learned(self) -> dict[str, Tensor]:
        """The present `temperature` τ, a scalar without gradient."""
        return {"temperature": self.log_scale.detach().neg().exp()}

    def forward(self, positive: Tensor, distances: Tensor, negatives: Tensor, margin: Tensor) -> Tensor:
        """One direction, half the mean over anchors: as in CLIP, the two directions of a batch are averaged.

        Args:
            positive: (B,) squared distance of each anchor to its partner.
            distances: (B, N) squared distances to the candidates.
            negatives: (B, N) bool; an anchor without negatives adds 0.
            margin: a scalar or (B, N).

        Returns:
            A scalar, at least 0.
        """
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        scale = self.log_scale.exp()
        logits = -0.5 * scale * (distances - margin)  # (B, N)
        if self.hardness:
            logits = logits + self._log_weights(distances.detach(), negatives)
        logits = torch.cat(((-0.5 * scale * positive)[:, None], logits.masked_fill(~negatives, -math.inf)), 1)
        partner = torch.zeros(len(positive), dtype=torch.int64, device=positive.device)
        return 0.5 * F.cross_entropy(logits, partner)

    def _log_weights(self, distances: Tensor, negatives: Tensor) -> Tensor:
        """Logarithms of w (B, N); what stands where there is no negative has no meaning."""
        scores = (-0.5 * self.hardness * distances).masked_fill(~negatives, -torch.finfo(distances.dtype).max)
        return scores.log_softmax(1) + negatives.sum(1, keepdim=True).clamp_min(1).log()
