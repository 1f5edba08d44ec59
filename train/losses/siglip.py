"""SigLIP: every pair of an image and a caption is told apart from a match on its own (Zhai et al., ICCV 2023).

With the logit x_ij = s_ij / τ + b of image i and caption j, τ and b learned, the batch costs

    1/B Σ_i Σ_j log(1 + exp(-y_ij x_ij)),   y_ij = 1 for a pair, -1 for a negative

(their algorithm 1). Other captions of an image are neither and are left out. s = 1 - d²/2, for unit vectors the cosine.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import SettingsError, SigLIPConfig
from train.margin import Margin


class SigLIPLoss(nn.Module):
    """A sigmoid for each anchor's partner and for each of its negatives.

    Raises:
        SettingsError: on a first temperature that is not above 0.
    """

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        if config.temperature <= 0:
            raise SettingsError(f"found SigLIP temperature {config.temperature}; expected above 0")
        self.margin = Margin(config.margin)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)), requires_grad=config.learn)
        self.bias = nn.Parameter(torch.tensor(float(config.bias)), requires_grad=config.learn)

    def learned(self) -> dict[str, Tensor]:
        """The present `temperature` τ and `bias` b, scalars without gradient."""
        return {"temperature": self.log_scale.detach().neg().exp(), "bias": self.bias.detach().clone()}

    def forward(self, positive: Tensor, distances: Tensor, negatives: Tensor, margin: Tensor) -> Tensor:
        """One direction, half the mean over anchors of the sum over candidates: a batch counts each pair once.

        Args:
            positive: (B,) squared distance of each anchor to its partner.
            distances: (B, N) squared distances to the candidates.
            negatives: (B, N) bool.
            margin: a scalar or (B, N).

        Returns:
            A scalar, above 0.
        """
        scale = self.log_scale.exp()
        matched = scale * (1 - 0.5 * positive) + self.bias  # (B,)
        apart = scale * (1 - 0.5 * (distances - margin)) + self.bias  # (B, N)
        pushed = F.softplus(apart).masked_fill(~negatives, 0.0).sum(1)  # (B,)
        return 0.5 * (F.softplus(-matched) + pushed).mean()
