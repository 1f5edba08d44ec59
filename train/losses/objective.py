"""The objective: ranking term + λ_c center loss + λ_q quantization loss, each named and switchable (LESS 5).

It sees the global batch and knows nothing of workers. All that learns or averages by itself (margin, centres,
codebook, temperature, log-variances) is a parameter or buffer here, so `state_dict()` is the whole of it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.batches import Pairs
from train.config import ObjectiveConfig, SettingsError
from train.losses.center import CenterLoss
from train.losses.distances import masked_mean, mean_distances, negative_pairs, squared_distances
from train.losses.hinge import HingeLoss
from train.losses.infonce import InfoNCELoss
from train.losses.quantization import QuantizationLoss
from train.losses.uncertainty import UncertaintyWeights


class Objective(nn.Module):
    """What is minimised.

    A term of weight 0 is not built: it has no parameters, no buffers and no logged values. In training mode
    each call moves the margin's average and the centres; in evaluation mode neither moves.

    Args:
        config: which terms, and their settings.
        dim: E.
        concepts: number of images in the training split; `Pairs.image_ids` are 0 to concepts - 1.

    Raises:
        SettingsError: on a negative weight, or `rank_codes` without a quantization term.
    """

    def __init__(self, config: ObjectiveConfig, dim: int, concepts: int) -> None:
        super().__init__()
        lambdas = {"center": config.center.weight, "quantization": config.quantization.weight}
        for name, value in lambdas.items():
            if value < 0:
                raise SettingsError(f"found weight {value} of the {name} loss; expected 0 (not built) or more")
        if config.quantization.rank_codes and not config.quantization.weight:
            raise SettingsError("rank_codes needs the codebook; give the quantization loss a weight above 0")
        self.ranking: HingeLoss | InfoNCELoss = (
            HingeLoss(config.hinge) if config.ranking == "hinge" else InfoNCELoss(config.infonce)
        )
        self.center = CenterLoss(config.center, dim, concepts) if config.center.weight else None
        self.quantization = QuantizationLoss(config.quantization, dim) if config.quantization.weight else None
        self.lambdas = {config.ranking: 1.0} | {name: value for name, value in lambdas.items() if value}
        self.uncertainty = UncertaintyWeights(self.lambdas) if config.weighting == "uncertainty" else None

    def initialise(self, embeddings: Tensor, seed: int = 0) -> None:
        """Start the codebook, where there is one, from k-means on a sample of both modalities.

        Args:
            embeddings: (N, E), at least as many as codewords.
            seed: of k-means.
        """
        if self.quantization is not None:
            self.quantization.codebook.initialise(embeddings, seed)

    def forward(self, pairs: Pairs, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and its parts.

        Args:
            pairs: the global batch.
            progress: share of training done, 0 to 1.

        Returns:
            The scalar to minimise, and scalars without gradient to log: `loss/<term>` before weighting,
            `distance/positive`, `distance/negative`, their difference `gap`; with a hinge `margin` (mean over
            negatives), with InfoNCE `temperature`, with codes `loss/quantization/<part>` and
            `codebook/perplexity`, with learned weights `weight/<term>`.
        """
        with torch.autocast(pairs.image.device.type, enabled=False):
            return self._forward(pairs, progress)

    def _forward(self, pairs: Pairs, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        image, text = pairs.image.float(), pairs.text.float()
        terms: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        if self.center is not None:
            terms["center"] = self.center(image, text, pairs.image_ids)
        if self.quantization is not None:
            found = self.quantization(image, text, progress)
            terms["quantization"] = found.loss
            logs |= {f"loss/quantization/{name}": value for name, value in found.terms.items()}
            logs["codebook/perplexity"] = found.perplexity
            image = image if found.image is None else found.image
            text = text if found.text is None else found.text

        distances = squared_distances(image, text)  # (B, B)
        negatives = negative_pairs(pairs.image_ids)  # (B, B)
        if isinstance(self.ranking, HingeLoss):
            terms["hinge"], margin = self.ranking(distances, negatives, pairs.semantic, progress)
            logs["margin"] = masked_mean(margin.expand_as(distances), negatives)
        else:
            terms["infonce"] = self.ranking(distances, negatives)
            logs["temperature"] = self.ranking.temperature

        positive, negative = mean_distances(distances.detach(), negatives)
        logs |= {"distance/positive": positive, "distance/negative": negative, "gap": negative - positive}
        logs |= {f"loss/{name}": value.detach() for name, value in terms.items()}
        return self._total(terms, logs), logs

    def _total(self, terms: Mapping[str, Tensor], logs: dict[str, Tensor]) -> Tensor:
        if self.uncertainty is None:
            return torch.stack([self.lambdas[name] * value for name, value in terms.items()]).sum()
        logs |= {f"weight/{name}": value for name, value in self.uncertainty.weights().items()}
        total: Tensor = self.uncertainty(terms)
        return total
