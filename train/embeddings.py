"""What a host makes of a batch, and what losses and evaluation read of it."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Embeddings:
    """N images or captions in the joint space. What a host does not give has width 0.

    Attributes:
        vector: (N, E) the (global) embedding; E = 0 for a host without one.
        local: (N, L) local embedding of its words' meaning (HIER).
        parts: (N, K, D) parts that a cross-attending host compares; K is the same in every batch of a modality.
        mask: (N, K) bool, True where a part is real.
    """

    vector: Tensor
    local: Tensor
    parts: Tensor
    mask: Tensor

    @classmethod
    def of(cls, vector: Tensor, local: Tensor | None = None) -> "Embeddings":
        """Embeddings of a host that compares vectors only."""
        rows = len(vector)
        return cls(
            vector,
            vector.new_zeros(rows, 0) if local is None else local,
            vector.new_zeros(rows, 0, 0),
            torch.zeros(rows, 0, dtype=torch.bool, device=vector.device),
        )

    def __len__(self) -> int:
        return len(self.vector)

    def __getitem__(self, rows: slice | Tensor) -> "Embeddings":
        return self.map(lambda tensor: tensor[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Embeddings":
        """The same function of every tensor."""
        return Embeddings(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


Distances = Callable[[Embeddings, Embeddings], Tensor]
"""Squared distances (N, M) of N images' to M captions' embeddings: a host's way of comparing them. -d² is the score."""


@dataclass(frozen=True)
class Erased:
    """The views of a batch that attention-guided erasing makes (SEDE 1), row i from pair i.

    Attributes:
        image_kept: images of which only the parts stay that their captions attend to.
        image_dropped: images of which only the other parts stay.
        text_kept: captions of which only the words stay that their images attend to.
        text_dropped: captions of which only the other words stay.
        image_partial: (B,) bool, whether image_dropped has any part: without one there is nothing to compare.
        text_partial: (B,) bool, the same of captions.
    """

    image_kept: Embeddings
    image_dropped: Embeddings
    text_kept: Embeddings
    text_dropped: Embeddings
    image_partial: Tensor
    text_partial: Tensor


@dataclass(frozen=True)
class Pairs:
    """The global batch as losses see it: B embedded pairs, row i of one matching row i of the other.

    Attributes:
        image: B images.
        text: B captions.
        image_ids: (B,) int64; pairs with equal ids show the same image and are never negatives of each other.
        semantic: (B, S) frozen sentence vectors of the captions, no gradient; S = 0 where no loss reads them.
        concepts: (B,) int64 concept of each image, for the center loss.
        labels: (B, V) uint8, which words the captions of each image use; V = 0 where no loss reads them.
        mixed_ids: (B,) int64 image that each pair is mixed with (mixup); `image_ids` where nothing is mixed.
        keys: images and captions again, from the momentum network, no gradient (memory bank); None without.
        erased: erased views; None without erasing.
    """

    image: Embeddings
    text: Embeddings
    image_ids: Tensor
    semantic: Tensor
    concepts: Tensor
    labels: Tensor
    mixed_ids: Tensor
    keys: tuple[Embeddings, Embeddings] | None = None
    erased: Erased | None = None
