"""FuseMix: mixup of frozen features, one share for both modalities (Vouitsis et al., CVPR 2024, section 4.2).

Pair i and its partner π(i) become λ x_i + (1 - λ) x_π(i) and λ y_i + (1 - λ) y_π(i), with one λ ~ Beta(α, α) a step.
Partners and share follow from seed and step alone, so any number of workers mixes alike.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from featurize.shards import Array
from train.batches import Batch, Features
from train.config import SettingsError, TrainConfig


def check_mixup(config: TrainConfig) -> None:
    """Refuse what cannot be mixed.

    Raises:
        SettingsError: a negative α; several captions of an image; towers that read parts or words; a term that knows a
            pair's one image.
    """
    if config.mixup < 0:
        raise SettingsError(f"found mixup {config.mixup}; expected 0 (none) or the parameter of a Beta distribution")
    if not config.mixup:
        return
    if config.captions_per_image != 1:
        raise SettingsError(
            f"found mixup of pairs and {config.captions_per_image} captions per image; set "
            "--train.captions_per_image 1, or --train.mixup 0"
        )
    model, objective = config.model, config.objective
    if model.image.parts or model.text.parts or model.text.bags:
        raise SettingsError("mixup mixes vectors: empty the towers' parts and bags, or set --train.mixup 0")
    if objective.center.weight or objective.margin.form in ("B", "C"):
        raise SettingsError(
            "a mixed pair has neither one concept nor one caption: set --train.objective.center.weight 0 and a margin "
            "of form fixed or A, or --train.mixup 0"
        )


@dataclass(frozen=True)
class Mixup:
    """Who is mixed with whom, and how much.

    Attributes:
        alpha: α; 1 is uniform, less keeps closer to the pairs themselves.
        seed: of the run.
    """

    alpha: float
    seed: int

    def draw(self, step: int, size: int) -> tuple[Array, float]:
        """Partners (B,) of a global batch of `size` pairs and λ, at this global step."""
        rng = np.random.default_rng([self.seed, step, 4])
        return rng.permutation(size), float(rng.beta(self.alpha, self.alpha))


def mix(batch: Batch, partners: Batch, share: float) -> Batch:
    """λ of a batch and 1 - λ of its partners, row by row.

    Args:
        batch: b pairs, vectors only.
        partners: their partners.
        share: λ, 0 to 1.
    """

    def mixed(one: Features, other: Features) -> Features:
        return Features(torch.lerp(other.vectors, one.vectors, share))

    return replace(batch, image=mixed(batch.image, partners.image), text=mixed(batch.text, partners.text))
