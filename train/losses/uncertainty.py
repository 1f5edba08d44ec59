"""Weights of the terms learned by homoscedastic uncertainty (Kendall, Gal & Cipolla, CVPR 2018).

With s_k the logarithm of the variance, their Gaussian term L_k / (2 exp(s_k)) + s_k / 2 is ½ (exp(-s_k) L_k +
s_k). The common ½ moves no minimum and is dropped: total = Σ_k exp(-s_k) L_k + s_k. The weight of a term is
exp(-s_k), at the best s_k 1 / L_k. Terms must not be negative, or s_k falls without end.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class UncertaintyWeights(nn.Module):
    """One learned log-variance per term.

    Args:
        weights: first weight of each term, by name: s_k starts at -log(weight).
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.log_variances = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(-math.log(weight))) for name, weight in weights.items()}
        )

    def weights(self) -> dict[str, Tensor]:
        """The present weight exp(-s_k) of each term, without gradient."""
        return {name: s.detach().neg().exp() for name, s in self.log_variances.items()}

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Σ_k exp(-s_k) L_k + s_k.

        Args:
            losses: a scalar, at least 0, for each term; one that has not begun yet is left out.

        Returns:
            A scalar; negative when terms are small.
        """
        begun = {name: s for name, s in self.log_variances.items() if name in losses}
        terms = [s.neg().exp() * losses[name] + s for name, s in begun.items()]
        return torch.stack(terms).sum()
