"""The local space: what an image shows and a caption says, word by word, as one vector (HIER).

Learned queries, one for each kind of thing to look for, attend over the parts of an image or a caption. The local half
joins the global one in a single vector, so that search needs no cross-attention.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.aggregators import Aggregator
from train.config import SettingsError


class ConceptQueries(Aggregator):
    """P learned queries attend over parts; their P results, joined and projected, are the local embedding.

    Query p gives Σ_k softmax_k(q_p·x_k / √D) x_k. As in every aggregator masked parts change nothing, and a row without
    real parts gives zeros.

    Args:
        dim: D, width of the parts.
        queries: P.
        out_dim: L.

    Raises:
        SettingsError: without queries or dimensions.
    """

    def __init__(self, dim: int, queries: int, out_dim: int) -> None:
        super().__init__(out_dim)
        if queries < 1 or out_dim < 1:
            raise SettingsError(
                f"found a local space of {out_dim} dimensions from {queries} queries; expected at least 1 of each"
            )
        self.queries = nn.Parameter(torch.randn(queries, dim))  # different, or they would attend alike for long
        self.project = nn.Linear(queries * dim, out_dim, bias=False)  # no bias: no parts give zeros

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Attend and project; see `Aggregator.forward`.

        Args:
            parts: (B, K, D).
            mask: (B, K) bool.

        Returns:
            (B, L), of any length.
        """
        some = mask.any(1, keepdim=True)  # (B, 1)
        # A softmax over nothing is not a number: a row without real parts attends to all, and its result is dropped.
        attended = (mask | ~some)[:, None, None, :]  # (B, 1, 1, K)
        queries = self.queries.expand(len(parts), 1, -1, -1)  # (B, 1, P, D), a view
        parts = parts[:, None]  # (B, 1, K, D)
        pooled = F.scaled_dot_product_attention(queries, parts, parts, attended)  # (B, 1, P, D)
        local: Tensor = self.project(pooled.flatten(1) * some)
        return local


def combine(global_vector: Tensor, local_vector: Tensor, share: float) -> Tensor:
    """One indexable vector e = [√(1-w) g ; √w l], so that e·e' = (1-w) g·g' + w l·l', and d² likewise.

    Args:
        global_vector: (N, E), unit.
        local_vector: (N, L), unit.
        share: w, 0 to 1.

    Returns:
        (N, E + L), unit.

    Raises:
        SettingsError: on a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise SettingsError(f"found share {share} of the local space; expected 0 (only global) to 1 (only local)")
    return torch.cat((math.sqrt(1 - share) * global_vector, math.sqrt(share) * local_vector), 1)
