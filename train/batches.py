"""Batches: the records that towers and losses see, and how they come from mapped columns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Frozen features of N rows of one modality.

    Attributes:
        vectors: (N, V) float32, all vector columns side by side; V may be 0.
        parts: one (N, K_c, D_c) float32 tensor for each part column (grid, regions, tokens).
        masks: one (N, K_c) bool tensor for each part column; True where a part is real.
    """

    vectors: Tensor
    parts: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """The global batch as losses see it: B embedded pairs, row i of one matching row i of the other.

    Attributes:
        image: (B, E) image embeddings.
        text: (B, E) caption embeddings.
        image_ids: (B,) int64; pairs with equal ids show the same image and are never negatives of each other.
        semantic: (B, S) frozen unit sentence vectors of the captions, no gradient.
    """

    image: Tensor
    text: Tensor
    image_ids: Tensor
    semantic: Tensor
