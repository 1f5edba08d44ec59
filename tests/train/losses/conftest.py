"""Embeddings that losses are tried on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def embeddings() -> Callable[..., tuple[Tensor, Tensor]]:
    """A maker of B random pairs, images and captions alike but not equal, as leaves with gradient."""

    def make(batch: int = 7, dim: int = 8, seed: int = 0, *, kind: str = "free") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(batch, dim, generator=generator)
        text = image + 0.8 * torch.randn(batch, dim, generator=generator)
        if kind == "unit":
            image, text = torch.nn.functional.normalize(image), torch.nn.functional.normalize(text)
        if kind == "collapsed":
            image = text = torch.full((batch, dim), 0.3)
        return image.clone().requires_grad_(), text.clone().requires_grad_()

    return make


@pytest.fixture
def image_ids() -> Tensor:
    """Seven pairs of four images."""
    return torch.tensor([5, 2, 5, 0, 2, 1, 5])
