"""Quantization loss: embeddings near codewords, all codewords in use, pairs in the same cells (LESS 2, B).

    L_q = commitment · ‖z - sg(q)‖² + entropy · (1 - H) + agreement · A

over the embeddings z of both modalities and their decoded codes q; sg stops gradients, the weights are those of
`QuantizationConfig`. Squared lengths are summed over dimensions and averaged over embeddings (VQ-VAE, van den Oord et
al., NeurIPS 2017, equation 3). Its other term, ‖sg(z) - q‖², is what codewords minimise that are moving averages of the
embeddings that chose them (ibid., appendix A.1): it is logged, as `distortion`. H is the entropy of the batch's mean
soft code, divided by log M and averaged over sub-spaces, so 0 ≤ H ≤ 1; the constant 1 changes no gradient and keeps the
loss from being negative, which learned weights need. A is the assignment agreement of a pair's soft codes a (image) and
b (caption): the symmetric cross-entropy -½ (Σ_m a_m log b_m + Σ_m b_m log a_m) in nats, averaged over pairs and
sub-spaces.

The codebook starts when training is under way: from `start` on, embeddings of the global batches are collected, and the
first SAMPLE · M of them make it (rotation and k-means, see `ProductCodebook`); in a short training those that there are
halfway from `start` to the end, if they are as many as codewords. Until then there is no loss. What has been collected
is part of the state, and the same on every worker.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.config import QuantizationConfig, SettingsError
from train.quantize import ProductCodebook

SAMPLE = 32
"""Embeddings for each codeword that k-means starts from."""


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
        perplexity: codewords that the batch uses, 1 to min(2B, M), a scalar.
        image: (B, E) straight-through decoded codes of the images; None unless the ranking term reads them.
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
        SettingsError: on a temperature that is not above 0, shares and decay outside 0 to 1, or negative weights; on
            sizes, see `ProductCodebook`.
    """

    sample: Tensor

    def __init__(self, config: QuantizationConfig, dim: int) -> None:
        super().__init__()
        if min(config.tau_start, config.tau_end) <= 0:
            raise SettingsError(
                f"found tau_start {config.tau_start} and tau_end {config.tau_end}; expected both above 0"
            )
        if not 0 <= config.start < 1 or not 0 <= config.rank_codes <= 1:
            raise SettingsError(
                f"found quantization start {config.start} and rank_codes {config.rank_codes}; expected 0 <= start < 1 "
                "(a share of training) and 0 <= rank_codes <= 1 (a share of the ranking term)"
            )
        if not 0 <= config.decay < 1:
            raise SettingsError(f"found quantization decay {config.decay}; expected 0 <= decay < 1")
        if min(config.commitment, config.entropy, config.agreement) < 0:
            raise SettingsError(
                f"found quantization commitment {config.commitment}, entropy {config.entropy} and agreement "
                f"{config.agreement}; expected 0 or more"
            )
        self.config = config
        self.codebook = ProductCodebook(dim, config.subspaces, config.codewords)
        self.register_buffer("sample", torch.zeros(0, dim))  # (n, E) collected; none once the codebook is ready

    def tau(self, progress: float) -> float:
        """Temperature of the soft codes after this share of training, `start` to 1; in units of the first error."""
        begin, end = self.config.tau_start, self.config.tau_end
        return begin * math.pow(end / begin, (progress - self.config.start) / (1 - self.config.start))

    def forward(self, image: Tensor, text: Tensor, progress: float) -> Quantized | None:
        """The loss, see the file's docstring; None while there is no codebook.

        In training mode, embeddings are collected, the codebook is made of them, and then follows each batch.

        Args:
            image: (B, E).
            text: (B, E).
            progress: share of training done, 0 to 1.
        """
        z = torch.cat((image, text)).float()  # (2B, E)
        if not self.codebook.ready:
            if self.training and progress >= self.config.start:
                self._collect(z.detach(), progress)
            if not self.codebook.ready:
                return None
        log_soft = self.codebook.log_soft_codes(z, self.tau(progress))  # (S, 2B, M)
        soft = log_soft.exp()
        codes = self.codebook.encode(z)  # (2B, S)
        q = self.codebook.decode(codes)  # (2B, E)
        distortion = (z - q).square().sum(1).mean()
        spread = entropy(soft)
        agree = agreement(soft, log_soft)
        loss = (
            self.config.commitment * distortion + self.config.entropy * (1.0 - spread) + self.config.agreement * agree
        )
        terms = {
            "distortion": distortion.detach(),
            "entropy": spread.detach(),
            "agreement": agree.detach(),
        }
        perplexity = self.codebook.perplexity(codes)
        if self.training:
            self.codebook.follow(z.detach(), codes, self.config.decay)
        if not self.config.rank_codes:
            return Quantized(loss, terms, perplexity, None, None)
        # Straight through: the code's value, the embedding's gradient.
        return Quantized(loss, terms, perplexity, *(q + (z - z.detach())).chunk(2))

    def _collect(self, z: Tensor, progress: float) -> None:
        self.sample = torch.cat((self.sample, z))
        halfway = (1 + self.config.start) / 2
        if len(self.sample) >= self.config.codewords * (SAMPLE if progress < halfway else 1):
            self.codebook.initialise(self.sample)
            self.sample = self.sample[:0].clone()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}sample")
        if saved is not None:
            self.sample = self.sample.new_empty(saved.shape)  # as many as had been collected
        super()._load_from_state_dict(state_dict, prefix, *args)
