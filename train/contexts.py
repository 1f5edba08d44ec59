"""Contexts: what lets the parts of an image or caption (cells, regions, tokens) know of each other.

One interface: `context(parts, mask) -> parts` with parts (B, K, D) and mask (B, K) bool, True where a part is real.
What stands in masked parts is never read, adding a masked part changes nothing, and masked parts come back as zeros.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import ContextName, SettingsError


class Context(nn.Module):
    """What all contexts share."""

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Parts (B, K, D) that have seen each other.

        Args:
            parts: (B, K, D).
            mask: (B, K) bool.

        Returns:
            (B, K, D).
        """
        raise NotImplementedError


class BiGRU(Context):
    """A bidirectional GRU along the parts; the mean of both directions (as VSE++'s and SCAN's caption encoders).

    Args:
        dim: D.
        layers: of the GRU.
    """

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, layers, batch_first=True, bidirectional=True)

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Parts that have seen each other; see `Context.forward`."""
        order = real_first(mask)
        states = run_gru(self.gru, take(parts, order), mask.sum(1))  # (B, K, 2 D)
        both: Tensor = torch.stack(states.chunk(2, dim=2)).mean(0)
        return take(both, order.argsort(1)) * mask[..., None]


class Transformer(Context):
    """Pre-norm transformer layers (Vaswani et al., NeurIPS 2017; Xiong et al., ICML 2020), without positions.

    Tokens of a text model and cells of an image network carry their place already.

    Args:
        dim: D.
        layers: how many.
        heads: a divisor of D.

    Raises:
        SettingsError: when D cannot be cut into so many heads.
    """

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise SettingsError(f"found {dim} dimensions and {heads} heads; expected heads that divide the dimensions")
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers))
        self.mixers = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.outs = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.hidden = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(layers))
        self.back = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(layers))

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Parts that have seen each other; see `Context.forward`."""
        x = parts.masked_fill(~mask[..., None], 0.0)
        seen = mask.clone()
        seen[:, 0] |= ~mask.any(1)  # attention over nothing is not a number
        layers = zip(self.mixers, self.outs, self.hidden, self.back, strict=True)
        for number, (mixer, out, hidden, back) in enumerate(layers):
            normed = self.norms[2 * number](x)
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in mixer(normed).chunk(3, 2))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])  # (B, H, K, D/H)
            x = x + out(mixed.transpose(1, 2).flatten(2))
            x = x + back(F.gelu(hidden(self.norms[2 * number + 1](x))))
        return x * mask[..., None]


class GraphReasoning(Context):
    """Region relationship reasoning of VSRN (Li et al., ICCV 2019, equations 1 and 2).

    In each layer V ← V + W_r (R (V W_g)) with R = softmax(θ(V) φ(V)ᵀ / √D) over the real parts: the fully connected
    graph of parts, edges by affinity. W_r starts at zero, so training starts from the parts as they are. VSRN divides
    by the number of regions where we take the softmax; the scale 1/√D is ours.

    Args:
        dim: D.
        layers: how many; VSRN has 4.
    """

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.theta = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.phi = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))  # softmax would cancel a bias
        self.message = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        for layer in self.out:
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Parts that have seen each other; see `Context.forward`."""
        x = parts.masked_fill(~mask[..., None], 0.0)
        for theta, phi, message, out in zip(self.theta, self.phi, self.message, self.out, strict=True):
            scores = (theta(x) @ phi(x).mT).float() / math.sqrt(x.shape[2])  # (B, K, K)
            lowest = torch.finfo(scores.dtype).min
            affinity = scores.masked_fill(~mask[:, None, :], lowest).softmax(2) * mask[:, None, :]
            x = (x + out(affinity.to(x.dtype) @ message(x))) * mask[..., None]
        return x


def real_first(mask: Tensor) -> Tensor:
    """(B, K) int64: the order that puts each row's real parts before its masked ones, otherwise as they were."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def take(parts: Tensor, order: Tensor) -> Tensor:
    """Parts (B, K, D) in the order (B, K'): (B, K', D)."""
    return parts.gather(1, order[..., None].expand(-1, -1, parts.shape[2]))


def run_gru(gru: nn.GRU, parts: Tensor, counts: Tensor) -> Tensor:
    """A GRU's states along the first `count` parts of each row, zeros behind them.

    Args:
        gru: batch first.
        parts: (B, K, D).
        counts: (B,) int64; a row of 0 gives zeros.

    Returns:
        (B, K, directions · D) float32.
    """
    packed = nn.utils.rnn.pack_padded_sequence(
        parts.float(), counts.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False
    )
    with torch.autocast("cuda", enabled=False):  # there it would mean float16, whatever autocast computes in
        output = gru(packed)[0]
    states, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True, total_length=parts.shape[1])
    return states * (counts > 0)[:, None, None]


def build_context(name: ContextName, dim: int, layers: int, heads: int) -> Context | None:
    """The context of this name; None for "none".

    Args:
        name: none, bigru, transformer or graph.
        dim: D, width of the parts.
        layers: how many, at least 1.
        heads: of the transformer.

    Raises:
        SettingsError: on an unknown name, or fewer than one layer.
    """
    if name != "none" and layers < 1:
        raise SettingsError(f"found {layers} layers of context {name!r}; expected at least 1, or context 'none'")
    match name:
        case "none":
            return None
        case "bigru":
            return BiGRU(dim, layers)
        case "transformer":
            return Transformer(dim, layers, heads)
        case "graph":
            return GraphReasoning(dim, layers)
        case _:
            raise SettingsError(f"found context {name!r}; expected none, bigru, transformer or graph")
