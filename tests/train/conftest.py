"""Parts of four rows, of which some are padding."""

import pytest
import torch


@pytest.fixture
def parts():
    """(4, 5, 8)."""
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    """(4, 5) bool; every row has a real part."""
    return torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
