"""Dropout that does not depend on how a batch is dealt to workers.

Every worker draws the noise of the *global* batch from the step's own generator and keeps its rows. So W workers with
B/W pairs each see what one worker with B sees, and a run that resumes in mid-epoch needs no generator state.
"""

import copy

import torch
from torch import Tensor


class Noise:
    """One step's randomness.

    Args:
        seed: of the run.
        step: global step.
        total: rows of one modality in the global batch.
        rows: this worker's slice of them.
    """

    def __init__(self, seed: int, step: int, total: int, rows: slice) -> None:
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        self.total = total
        self.rows = rows

    def over(self, total: int, rows: slice) -> "Noise":
        """The same stream for other rows: of the other modality, which may be more or fewer."""
        other = copy.copy(self)
        other.total, other.rows = total, rows
        return other

    def dropout(self, x: Tensor, p: float, owner: Tensor | None = None) -> Tensor:
        """Zero each feature of each row with probability p (in steps of 1/256) and rescale the rest.

        Args:
            x: (b, D), one row each; with `owner` (R, D), parts of which those of a row lose the same features.
            p: probability; 0 leaves x as it is.
            owner: (R,) int64, the worker's row that each part belongs to.
        """
        dropped = min(round(p * 256), 255)
        if not dropped:
            return x
        width = x.shape[-1]
        # eight bytes a draw: drawing a float for every element would cost more than the layer behind it
        words = torch.empty(self.total, -(-width // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self._generator)  # all 64 bits
        kept = words.view(torch.uint8)[self.rows, :width] >= dropped
        scaled = kept.to(x.device).to(x.dtype) * (256 / (256 - dropped))
        return x * (scaled if owner is None else scaled[owner])
