"""Symmetric InfoNCE over the batch with a learned temperature (CLIP, Radford et al., ICML 2021).

The logits are -d² / 2τ. For unit vectors -d²/2 = cos - 1, so the loss equals that of the logits cos / τ.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import InfoNCEConfig, SettingsError

MAX_SCALE = 100.0  # CLIP's bound on 1 / τ


class InfoNCELoss(nn.Module):
    """Softmax over captions for each image, and over images for each caption.

    The scale 1 / τ is kept as its logarithm, learned, and held at or below 100 by moving the parameter
    itself, as CLIP does: a clamp on its value would leave it without gradient once beyond.

    Raises:
        SettingsError: on a first temperature outside [1/100, infinity).
    """

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        if config.temperature < 1 / MAX_SCALE:
            raise SettingsError(f"found InfoNCE temperature {config.temperature}; expected at least {1 / MAX_SCALE}")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)), requires_grad=config.learn)

    @property
    def temperature(self) -> Tensor:
        """The present τ, a scalar without gradient."""
        return self.log_scale.detach().neg().exp()

    def forward(self, distances: Tensor, negatives: Tensor) -> Tensor:
        """Mean cross-entropy of both directions.

        Args:
            distances: (B, B) squared distances, images in rows, captions in columns, pairs on the diagonal.
            negatives: (B, B) bool; entries that are neither negatives nor the pair leave the softmax.

        Returns:
            A scalar, at least 0.
        """
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        pair = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
        logits = (-0.5 * self.log_scale.exp() * distances).masked_fill(~(negatives | pair), -math.inf)
        target = torch.arange(len(distances), device=distances.device)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
