"""Center loss across modalities: the images and captions of a concept gather around one point (LESS 3).

Form `table`: the point is learned and kept, one row for each concept (Wen et al., ECCV 2016, equation 2, as a mean
over pairs), ½ mean_i ‖z_i - c_y(i)‖² + ½ mean_i ‖t_i - c_y(i)‖².

Form `batch`: the point is the mean μ of what the batch holds of the concept, images and captions alike, and means of
different concepts push apart (De Brabandere et al., CVPR workshops 2017, equations 1 and 2, without their pull to the
origin and with a mean over pairs where they average over concepts first, so that both forms weigh the same),

    ½ mean_i [‖z_i - μ_y(i)‖ - slack]₊² + ½ mean_i [‖t_i - μ_y(i)‖ - slack]₊² + push · mean_{a≠b} [2δ - ‖μ_a - μ_b‖]₊²

The mean over a, b is over the concepts of the batch; gradients flow through the means.
"""

import torch
from torch import Tensor, nn

from train.centres import ConceptCentres
from train.config import CenterConfig, SettingsError
from train.losses.distances import squared_distances


class CenterLoss(nn.Module):
    """Pull to the concepts' centres, in the form that the settings name.

    Form `table` pulls to the centres as they were before this batch; in training mode they then follow. Form `batch`
    keeps nothing. Both see the global batch: the means of a worker's slice would be others.

    Args:
        config: form and its settings; the term's weight belongs to the objective.
        dim: E.
        concepts: C, how many there are in the training split.

    Raises:
        SettingsError: on a negative slack or push, a delta that is not above 0; on sizes, see `ConceptCentres`.
    """

    def __init__(self, config: CenterConfig, dim: int, concepts: int) -> None:
        super().__init__()
        if config.slack < 0 or config.delta <= 0 or config.push < 0:
            raise SettingsError(
                f"found center loss slack {config.slack}, delta {config.delta} and push {config.push}; "
                "expected slack and push of 0 or more, delta above 0"
            )
        self.config = config
        self.table = ConceptCentres(concepts, dim, config.rate) if config.form == "table" else None

    def forward(self, image: Tensor, text: Tensor, concepts: Tensor) -> Tensor:
        """The loss; see the file's docstring.

        Args:
            image: (B, E).
            text: (B, E).
            concepts: (B,) int64, 0 to C-1.

        Returns:
            A scalar, at least 0.
        """
        if self.table is None:
            return self._batch_form(torch.cat((image, text)).float(), torch.cat((concepts, concepts)))
        centres = self.table(concepts)  # (B, E)
        pull = (image - centres).square().sum(1) + (text - centres).square().sum(1)
        if self.training:
            self.table.update(torch.cat((concepts, concepts)), torch.cat((image, text)))
        mean: Tensor = pull.mean()
        return 0.5 * mean

    def _batch_form(self, embeddings: Tensor, concepts: Tensor) -> Tensor:
        named, place = torch.unique(concepts, return_inverse=True)  # (U,), (2B,)
        sums = embeddings.new_zeros(len(named), embeddings.shape[1]).index_add(0, place, embeddings)
        means = sums / torch.bincount(place, minlength=len(named))[:, None]  # (U, E)
        to_own = _length((embeddings - means[place]).square().sum(1))  # (2B,)
        loss = (to_own - self.config.slack).relu().square().mean()
        if self.config.push and len(named) > 1:
            # In float64: rounding in float32 would blow up the gradient of means that nearly coincide.
            between = _length(squared_distances(means.double(), means.double()))  # (U, U)
            closeness = (2 * self.config.delta - between).relu().square().fill_diagonal_(0.0)
            push = closeness.sum() / (len(named) * (len(named) - 1))
            loss = loss + self.config.push * push.float()
        return loss


def _length(squared: Tensor) -> Tensor:
    """Square root that has gradient 0, not infinity, at 0."""
    return squared.clamp_min(1e-12).sqrt()
