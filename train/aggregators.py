"""Aggregators: how the parts of an image or caption (grid cells, regions, tokens) become one vector.

One interface: `aggregator(parts, mask) -> (B, out_dim)` with parts (B, K, D), K at least 1, and mask (B, K)
bool, True where a part is real. Masked parts are finite (towers leave zeros there) and change nothing, however
many they are; a row without real parts gives zeros.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from train.config import AggregatorName, SettingsError
from train.contexts import real_first, run_gru, take
from train.quantize import PartCodebook


class Aggregator(nn.Module):
    """What all aggregators share.

    Attributes:
        out_dim: width of the result.
    """

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Pool the real parts.

        Args:
            parts: (B, K, D).
            mask: (B, K) bool.

        Returns:
            (B, out_dim).
        """
        raise NotImplementedError

    def alone(self, parts: Tensor, mask: Tensor) -> Tensor:
        """What each part would become if it were the only one of its row; one place after the other.

        Args:
            parts: (B, K, D).
            mask: (B, K) bool.

        Returns:
            (B, K, out_dim), zeros at masked parts.
        """
        rows = zip(parts.unbind(1), mask.unbind(1), strict=True)
        return torch.stack([self(part[:, None], real[:, None]) for part, real in rows], 1)


class Weighted(Aggregator):
    """What weighs parts, or their sorted values: a part alone stays as it is."""

    def alone(self, parts: Tensor, mask: Tensor) -> Tensor:
        """See `Aggregator.alone`."""
        return parts.masked_fill(~mask[..., None], 0.0)


class Mean(Weighted):
    """The mean of the real parts."""

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Pool the real parts; see `Aggregator.forward`."""
        weights = mask / mask.sum(1, keepdim=True).clamp_min(1)  # (B, K)
        return (weights.to(parts.dtype)[:, None] @ parts).squeeze(1)  # no copy of the parts, as masking them would be


class Max(Weighted):
    """The largest value of the real parts in each dimension."""

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Pool the real parts; see `Aggregator.forward`."""
        largest = parts.masked_fill(~mask[..., None], -math.inf).amax(1)
        return largest.masked_fill(~mask.any(1, keepdim=True), 0.0)


class Attention(Weighted):
    """Learned queries attend over parts; head h pools the h-th of `heads` slices of the dimensions.

    The weights of head h are softmax_k(q_h·x_k / √D). This is multi-head attention (Vaswani et al., NeurIPS
    2017, section 3.2.2) of one learned query, with the key projection folded into q_h; projections of values
    and output belong to the tower. Queries start at zero, so that training starts from the mean.

    Args:
        dim: D.
        heads: a divisor of D.

    Raises:
        SettingsError: when D cannot be cut into so many slices.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim)
        if heads < 1 or dim % heads:
            raise SettingsError(f"found {dim} dimensions and {heads} heads; expected heads that divide the dimensions")
        self.queries = nn.Parameter(torch.zeros(heads, dim))

    def weights(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Attention over parts.

        Args:
            parts: (B, K, D).
            mask: (B, K) bool.

        Returns:
            (B, heads, K) float32: sums to 1 over real parts, 0 at masked ones and in rows without real parts.
        """
        scores = (parts @ self.queries.T).float().mT / math.sqrt(self.out_dim)  # (B, H, K)
        real = mask[:, None, :]
        return scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(-1) * real

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Pool the real parts; see `Aggregator.forward`."""
        weights = self.weights(parts, mask).to(parts.dtype)
        # Every head pools all of D and keeps its own slice: more products, but no copy of the parts by head.
        heads = len(self.queries)
        pooled = (weights @ parts).reshape(len(parts), heads, heads, -1)  # (B, H, H, D/H)
        return pooled.diagonal(dim1=1, dim2=2).mT.flatten(1)  # (B, D/H, H) to (B, D)


class GPO(Weighted):
    """Generalized Pooling Operator (Chen et al., CVPR 2021, section 3): learned weights for sorted values.

    In each dimension the values of the real parts are sorted, largest first, and weighted by their position:
    all weight on the first position is max pooling, equal weights are mean pooling. Weights come from
    sinusoidal codes of the positions through a bidirectional GRU, and depend on nothing but the number of
    real parts.

    Args:
        dim: D.
        code_dim: width of the position codes, even.
        hidden: width of the GRU in each direction.
        temperature: of the softmax over positions.
    """

    def __init__(self, dim: int, code_dim: int = 32, hidden: int = 32, temperature: float = 0.1) -> None:
        super().__init__(dim)
        self.code_dim, self.temperature = code_dim, temperature
        self.gru = nn.GRU(code_dim, hidden, batch_first=True, bidirectional=True)
        self.score = nn.Linear(hidden, 1, bias=False)

    def weights(self, counts: Tensor, positions: int) -> Tensor:
        """Weights of the sorted positions for rows with this many real parts.

        Args:
            counts: (B,) int64, 0 to `positions`.
            positions: K.

        Returns:
            (B, K) float32: sums to 1 over the first `count` positions, 0 after them and where the count is 0.
        """
        lengths, row = torch.unique(counts, return_inverse=True)  # the GRU runs once for each different count
        codes = sinusoids(positions, self.code_dim).to(counts.device).expand(len(lengths), -1, -1)  # (U, K, C)
        with torch.autocast(counts.device.type, enabled=False):
            packed = pack_padded_sequence(codes, lengths.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False)
            states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=positions)
            both = torch.stack(states.chunk(2, dim=2)).mean(0)  # (U, K, hidden), mean of the directions
            scores = self.score(both).squeeze(2) / self.temperature  # (U, K)
        real = torch.arange(positions, device=counts.device) < lengths[:, None]
        weights: Tensor = scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(1) * real
        return weights[row]

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Pool the real parts; see `Aggregator.forward`."""
        counts = mask.sum(1)  # (B,)
        lowest = parts.masked_fill(~mask[..., None], -math.inf)
        ranked = lowest.mT.contiguous().sort(2, descending=True).values  # (B, D, K), masked parts last
        real = torch.arange(parts.shape[1], device=mask.device) < counts[:, None]  # (B, K)
        weights = self.weights(counts, parts.shape[1]).to(parts.dtype)  # (B, K)
        return (ranked.masked_fill(~real[:, None, :], 0.0) @ weights[..., None]).squeeze(2)


def sinusoids(positions: int, width: int) -> Tensor:
    """Sinusoidal position codes (Vaswani et al., NeurIPS 2017, section 3.5), sines and cosines in turn.

    Args:
        positions: K.
        width: C, even.

    Returns:
        (K, C) float32.
    """
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))  # (C/2,)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)


class NetVLAD(Aggregator):
    """Soft-assigned residuals to learned centres (NetVLAD, Arandjelović et al., TPAMI 2018), LESS's form A.

    V_m = Σ_i a_im (x_i - c_m) over the real parts; each V_m is brought to unit length, the M of them are
    joined, brought to unit length again and projected to D dimensions.

    Args:
        codebook: the centres; two aggregators may hold the same one.
    """

    def __init__(self, codebook: PartCodebook) -> None:
        clusters, dim = codebook.centres.shape
        super().__init__(dim)
        self.codebook = codebook
        self.project = nn.Linear(clusters * dim, dim, bias=False)  # no bias: no parts give zeros

    def initialise(self, parts: Tensor, seed: int = 0) -> None:
        """Start the codebook from data; where it is shared, call this once with parts of both modalities.

        Args:
            parts: (N, D), a sample of real parts as this aggregator will see them.
            seed: of k-means.
        """
        self.codebook.initialise(parts, seed)

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Pool the real parts; see `Aggregator.forward`."""
        real = mask[..., None]
        clean = parts.masked_fill(~real, 0.0)
        with torch.autocast(parts.device.type, enabled=False):
            clean = clean.float()
            assigned = self.codebook(clean) * real  # (B, K, M)
            held = assigned.sum(1)[..., None]  # (B, M, 1)
            residuals = assigned.mT @ clean - held * self.codebook.centres  # (B, M, D)
            # A residual shorter than eps is rounding error: it is not blown up to unit length.
            unit = F.normalize(residuals, dim=2, eps=1e-6).flatten(1)  # (B, M·D)
            unit = F.normalize(unit, dim=1, eps=1e-6)
        pooled: Tensor = self.project(unit)
        return pooled


class Memory(Aggregator):
    """VSRN's global reasoning (Li et al., ICCV 2019, section 3.2): a GRU reads the parts and keeps what matters.

    The result is its memory after the last real part.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Pool the real parts; see `Aggregator.forward`."""
        counts = mask.sum(1)  # (B,)
        states = run_gru(self.gru, take(parts, real_first(mask)), counts)  # (B, K, D)
        last = (counts - 1).clamp_min(0)[:, None, None].expand(-1, -1, states.shape[2])
        return states.gather(1, last).squeeze(1).to(parts.dtype)

    def alone(self, parts: Tensor, mask: Tensor) -> Tensor:
        """See `Aggregator.alone`; all places at once."""
        states: Tensor = self(parts.flatten(0, 1)[:, None], mask.flatten()[:, None])
        return states.view_as(parts)


def build_aggregator(
    name: AggregatorName, dim: int, heads: int, clusters: int, codebook: PartCodebook | None = None
) -> Aggregator:
    """The aggregator of this name.

    Args:
        name: mean, max, attention, gpo, netvlad or memory.
        dim: D, width of the parts.
        heads: of attention.
        clusters: M of netvlad.
        codebook: centres that netvlad shares with another aggregator; a new codebook otherwise.

    Raises:
        SettingsError: on an unknown name, or a codebook that does not fit.
    """
    if codebook is not None and (name != "netvlad" or codebook.centres.shape != (clusters, dim)):
        raise SettingsError(
            f"found a codebook of shape {tuple(codebook.centres.shape)} for aggregator {name!r}; expected "
            f"{(clusters, dim)} for 'netvlad', and none for the others"
        )
    match name:
        case "mean":
            return Mean(dim)
        case "max":
            return Max(dim)
        case "attention":
            return Attention(dim, heads)
        case "gpo":
            return GPO(dim)
        case "netvlad":
            return NetVLAD(codebook or PartCodebook(clusters, dim))
        case "memory":
            return Memory(dim)
        case _:
            raise SettingsError(f"found aggregator {name!r}; expected mean, max, attention, gpo, netvlad or memory")
