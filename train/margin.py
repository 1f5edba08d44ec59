"""The margin of a ranking loss: fixed, following the gap that training has opened, or shaped by caption similarity.

Implements the adaptive margin that LESS describes (Malali & Keller, TPAMI 2022; docs/methods.md, LESS 4), in squared
distance:

- fixed: m = start
- A: m = clip(weight · EMA(mean d²_neg - mean d²_pos), low, high)
- B: m_ij = start · (1 - r_ij), with r_ij the cosine of the frozen vectors of captions i and j
- C: m_ij = A · (1 - r_ij): the scale adapts over time, the shape per pair
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import MarginConfig, SettingsError
from train.losses.distances import mean_distances


class Margin(nn.Module):
    """A margin that no gradient reaches; its moving average is part of the checkpoint.

    The average starts at start / weight, so that the margin starts from `start` and nothing pulls it to zero.
    It moves in training mode only, and not on a batch without negatives.

    Raises:
        SettingsError: on a negative start, and a weight, decay or range that forms A and C cannot use.
    """

    average: Tensor

    def __init__(self, config: MarginConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptive = config.form in ("A", "C")
        self.pairwise = config.form in ("B", "C")
        if config.start < 0:
            raise SettingsError(f"found margin start {config.start}; expected 0 or more")
        if self.adaptive:
            if config.weight <= 0 or not 0 <= config.decay < 1 or config.low > config.high:
                raise SettingsError(
                    f"margin form {config.form}: found weight {config.weight}, decay {config.decay}, "
                    f"low {config.low}, high {config.high}; expected weight > 0, 0 <= decay < 1, low <= high"
                )
            self.register_buffer("average", torch.tensor(config.start / config.weight))

    @torch.no_grad()
    def forward(self, distances: Tensor, negatives: Tensor, semantic: Tensor) -> Tensor:
        """The margin for this batch, after the average has seen it.

        Args:
            distances: (B, B) squared distances, row i's pair on the diagonal.
            negatives: (B, B) bool.
            semantic: (B, S) frozen vectors of the captions, of any length; read by forms B and C only.

        Returns:
            A scalar for `fixed` and A, (B, B) for B and C.

        Raises:
            SettingsError: when forms B or C get captions without vectors.
        """
        scale = self._follow(distances, negatives) if self.adaptive else distances.new_tensor(self.config.start)
        if not self.pairwise:
            return scale
        if semantic.shape[1] == 0:
            raise SettingsError(
                f"margin form {self.config.form} compares captions, but they come without frozen vectors; "
                "give the batch a sentence column, or choose form fixed or A"
            )
        with torch.autocast(semantic.device.type, enabled=False):
            vectors = F.normalize(semantic.to(distances.dtype), dim=1)
            return scale * (1.0 - vectors @ vectors.T)

    def _follow(self, distances: Tensor, negatives: Tensor) -> Tensor:
        if self.training:
            positive, negative = mean_distances(distances, negatives)
            step = (1.0 - self.config.decay) * (negative - positive - self.average)
            self.average += torch.where(negatives.any(), step, 0.0)
        return (self.config.weight * self.average).clamp(self.config.low, self.config.high)
