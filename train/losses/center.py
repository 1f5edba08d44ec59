"""Center loss across modalities: an image and all its captions gather around one learned point (LESS 3).

½ mean_i ‖z_i - c_y(i)‖² + ½ mean_i ‖t_i - c_y(i)‖² (Wen et al., ECCV 2016, equation 2, as a mean over pairs).
"""

import torch
from torch import Tensor, nn

from train.centres import ConceptCentres
from train.config import CenterConfig


class CenterLoss(nn.Module):
    """Pull to the centres as they were before this batch; in training mode the centres then follow.

    Args:
        config: rate of the centres; the term's weight belongs to the objective.
        dim: E.
        concepts: C, how many centres.
    """

    def __init__(self, config: CenterConfig, dim: int, concepts: int) -> None:
        super().__init__()
        self.table = ConceptCentres(concepts, dim, config.rate)

    def forward(self, image: Tensor, text: Tensor, concepts: Tensor) -> Tensor:
        """The loss; see the file's docstring.

        Args:
            image: (B, E).
            text: (B, E).
            concepts: (B,) int64, 0 to C-1.

        Returns:
            A scalar, at least 0.
        """
        centres = self.table(concepts)  # (B, E)
        pull = (image - centres).square().sum(1) + (text - centres).square().sum(1)
        if self.training:
            self.table.update(torch.cat((concepts, concepts)), torch.cat((image, text)))
        mean: Tensor = pull.mean()
        return 0.5 * mean
