"""Quantization loss: embeddings near codewords, all codewords in use, pairs in the same cells (LESS 2, B).

    L_q = commitment · ‖z - sg(q)‖² + ‖sg(z) - q‖² + entropy · (1 - H) + agreement · A

over the embeddings z of both modalities and their decoded codes q; sg stops gradients, the weights are those
of `QuantizationConfig`. Squared lengths are summed over dimensions and averaged over embeddings (VQ-VAE, van
den Oord et al., NeurIPS 2017, equation 3). H is the entropy of the batch's mean soft code, divided by log M
and averaged over sub-spaces, so 0 ≤ H ≤ 1; the constant 1 changes no gradient and keeps the loss from being
negative, which learned weights need. A is the assignment agreement of a pair's soft codes a (image) and b
(caption): the symmetric cross-entropy -½ (Σ_m a_m log b_m + Σ_m b_m log a_m) in nats, averaged over pairs and
sub-spaces.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.config import QuantizationConfig, SettingsError
from train.quantize import ProductCodebook


def entropy(soft: Tensor) -> Tensor:
    """Entropy of the mean soft code, 0 (one codeword for all) to 1 (all alike), averaged over sub-spaces.

    Args:
        soft: (S, N, M), summing to 1 over M.

    Returns:
        A scalar.
    """
    usage = soft.mean(1)  # (S, M)
    nats: Tensor = torch.special.entr(usage).sum(1).mean()
    return nats / math.log(usage.shape[1])


def agreement(soft: Tensor, log_soft: Tensor) -> Tensor:
    """Symmetric cross-entropy between the soft codes of pairs, in nats; 0 when both are sure of one cell.

    Args:
        soft: (S, 2B, M), embedding i and embedding B + i being a pair.
        log_soft: (S, 2B, M), its logarithm.

    Returns:
        A scalar, at least 0.
    """
    image, text = log_soft.chunk(2, dim=1)
    swapped = torch.cat((text, image), dim=1)  # each embedding meets its partner
    return -(soft * swapped).sum(-1).mean()


class Quantized(NamedTuple):
    """What the quantization loss found in a batch.

    Attributes:
        loss: L_q, a scalar.
        terms: its parts before their weights, by name; scalars without gradient.
        perplexity: codewords in use, 1 to M, a scalar.
        image: (B, E) straight-through decoded codes of the images; None unless asked for.
        text: (B, E) the same of the captions.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    perplexity: Tensor
    image: Tensor | None
    text: Tensor | None


class QuantizationLoss(nn.Module):
    """Holds the codebook, and anneals its temperature from `tau_start` to `tau_end` geometrically.

    Args:
        config: sizes and weights; the term's own weight belongs to the objective.
        dim: E.

    Raises:
        SettingsError: on a temperature that is not above 0; on sizes, see `ProductCodebook`.
    """

    def __init__(self, config: QuantizationConfig, dim: int) -> None:
        super().__init__()
        if min(config.tau_start, config.tau_end) <= 0:
            raise SettingsError(
                f"found tau_start {config.tau_start} and tau_end {config.tau_end}; expected both above 0"
            )
        self.config = config
        self.codebook = ProductCodebook(dim, config.subspaces, config.codewords)

    def tau(self, progress: float) -> float:
        """Temperature of the soft codes after this share of training, 0 to 1."""
        start, end = self.config.tau_start, self.config.tau_end
        return start * math.pow(end / start, progress)

    def forward(self, image: Tensor, text: Tensor, progress: float) -> Quantized:
        """The loss; see the file's docstring.

        Args:
            image: (B, E).
            text: (B, E).
            progress: share of training done, 0 to 1.
        """
        z = torch.cat((image, text)).float()  # (2B, E)
        log_soft = self.codebook.log_soft_codes(z, self.tau(progress))  # (S, 2B, M)
        soft = log_soft.exp()
        codes = self.codebook.encode(z)  # (2B, S)
        q = self.codebook.decode(codes)  # (2B, E)
        commitment = (z - q.detach()).square().sum(1).mean()
        distortion = (z.detach() - q).square().sum(1).mean()
        spread = entropy(soft)
        agree = agreement(soft, log_soft)
        loss = (
            self.config.commitment * commitment
            + distortion
            + self.config.entropy * (1.0 - spread)
            + self.config.agreement * agree
        )
        terms = {
            "distortion": distortion.detach(),
            "entropy": spread.detach(),
            "agreement": agree.detach(),
        }
        perplexity = self.codebook.perplexity(codes)
        if not self.config.rank_codes:
            return Quantized(loss, terms, perplexity, None, None)
        return Quantized(loss, terms, perplexity, *self.codebook.straight_through(codes, soft).chunk(2))
