"""Concept centres that follow the embeddings: the table behind the center loss.

Center loss (Wen et al., ECCV 2016, equations 3 and 4), as LESS uses it across modalities. What a concept is, see
`train/concepts.py`; concepts are numbered 0 to C-1 without gaps.
"""

import torch
from torch import Tensor, nn

from train.config import SettingsError


class ConceptCentres(nn.Module):
    """C centres of E dimensions, starting at the origin; only the rows that a batch names are touched.

    Args:
        concepts: C.
        dim: E.
        rate: η, how far a centre moves towards its embeddings at each update, 0 to 1.

    Raises:
        SettingsError: on a table without rows, or a rate outside (0, 1].
    """

    centres: Tensor

    def __init__(self, concepts: int, dim: int, rate: float) -> None:
        super().__init__()
        if concepts < 1 or not 0 < rate <= 1:
            raise SettingsError(
                f"found {concepts} concepts and rate {rate}; expected at least one concept and 0 < rate <= 1"
            )
        self.rate = rate
        self.register_buffer("centres", torch.zeros(concepts, dim))

    def forward(self, concepts: Tensor) -> Tensor:
        """The centres of these rows.

        Args:
            concepts: (B,) int64, 0 to C-1, repeats allowed.

        Returns:
            (B, E), a copy.

        Raises:
            IndexError: on a concept outside the table.
        """
        low, high = int(concepts.min()), int(concepts.max())
        if low < 0 or high >= len(self.centres):
            raise IndexError(
                f"found concept {low if low < 0 else high}; expected 0 to {len(self.centres) - 1}: number "
                "concepts without gaps and build the table for all of them"
            )
        return self.centres[concepts]

    @torch.no_grad()
    def update(self, concepts: Tensor, embeddings: Tensor) -> None:
        """Move centres: c_j ← c_j - η Σ_i 1[y_i = j] (c_j - e_i) / (1 + n_j).

        Args:
            concepts: (N,) int64, the concept y_i of each embedding.
            embeddings: (N, E), of any modality. n_j counts the rows of *this call* whose concept is j: in a
                batch where concept j has two pairs and both modalities are passed, n_j = 4.
        """
        named, place = torch.unique(concepts, return_inverse=True)  # (U,), (N,)
        rows = self.centres[named]  # (U, E)
        pull = torch.zeros_like(rows).index_add_(0, place, rows[place] - embeddings.to(rows.dtype))
        counts = torch.bincount(place, minlength=len(named))  # (U,)
        self.centres[named] = rows - self.rate * pull / (1 + counts)[:, None]
