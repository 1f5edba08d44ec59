"""Towers: frozen features of an image or a caption become parts and one vector of the joint space."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.aggregators import build_aggregator
from train.batches import Features
from train.config import SettingsError, TowerConfig
from train.contexts import build_context
from train.lexicon import BagOfLemmas
from train.noise import Noise
from train.quantize import PartCodebook


@dataclass(frozen=True)
class Dims:
    """Widths of one modality's features.

    Attributes:
        vectors: V, all vector columns together.
        parts: D_c of each part column.
        words: size of the vocabulary behind each bag of lemmas.
    """

    vectors: int = 0
    parts: tuple[int, ...] = ()
    words: tuple[int, ...] = ()


class Standardise(nn.Module):
    """Per-dimension standardisation with statistics of the training rows, after an optional signed square root.

    Shape: (..., D) -> (..., D).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, *, signed_sqrt: bool) -> None:
        super().__init__()
        self.signed_sqrt = signed_sqrt
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def _root(self, x: Tensor) -> Tensor:
        return x.abs().sqrt_().copysign_(x) if self.signed_sqrt else x

    def fit(self, x: Tensor) -> None:
        """Take the statistics of x (N, D); a dimension that is the same in all rows tells nothing, and becomes 0."""
        rooted = self._root(x).double()
        self.mean.copy_(rooted.mean(0))
        std = rooted.std(0, correction=0)
        self.scale.copy_(torch.where(std > 1e-6, 1 / std, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise."""
        return (self._root(x) - self.mean) * self.scale


class BlockLinear(nn.Module):
    """A linear map whose blocks do not see each other: output block b is made of input block b alone.

    Shape: (..., inputs) -> (..., outputs). One block is `nn.Linear`, with its initial weights.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        made = [nn.Linear(inputs // blocks, outputs // blocks) for _ in range(blocks)]
        self.weight = nn.Parameter(torch.stack([one.weight.detach() for one in made]))  # (blocks, out, in)
        self.bias = nn.Parameter(torch.cat([one.bias.detach() for one in made]))

    def forward(self, x: Tensor) -> Tensor:
        """Map."""
        blocks, outputs, inputs = self.weight.shape
        pieces = x.reshape(-1, blocks, inputs).transpose(0, 1)  # (blocks, N, in)
        mapped = torch.bmm(pieces, self.weight.mT).transpose(0, 1)  # (N, blocks, out)
        return mapped.reshape(*x.shape[:-1], blocks * outputs) + self.bias


class ResidualMLP(nn.Module):
    """W x + MLP(x): a linear map with a hidden layer's correction; without a width the linear map alone.

    With several blocks each block of the output has its own share of the hidden layer, so the blocks share nothing.

    Shape: (..., D) -> (..., dim).
    """

    def __init__(self, inputs: int, width: int, dim: int, dropout: float, blocks: int = 1) -> None:
        super().__init__()
        self.skip = nn.Linear(inputs, dim)
        self.hidden = nn.Linear(inputs, width) if width else None
        self.out = BlockLinear(width, dim, blocks) if width else None
        self.dropout = dropout

    def forward(self, x: Tensor, noise: Noise | None, owner: Tensor | None = None) -> Tensor:
        """Map; `noise` only while training, and `owner` as in `Noise.dropout`."""
        straight: Tensor = self.skip(x)
        if self.hidden is None or self.out is None:
            return straight
        hidden = F.gelu(self.hidden(x))
        if noise is not None:
            hidden = noise.dropout(hidden, self.dropout, owner)
        return straight + self.out(hidden)  # type: ignore[no-any-return]  # nn.Module calls are untyped


@dataclass(frozen=True)
class Encoded:
    """What a tower makes of N rows before it pools.

    Attributes:
        whole: (N, E) what the branches say that see a row as a whole (vectors, bags); None without such branches.
        parts: (N, K, P) parts in the joint part space, in their context; K = 0 without a part column, P = E if the
            tower pools them.
        mask: (N, K) bool.
    """

    whole: Tensor | None
    parts: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor) -> "Encoded":
        return Encoded(None if self.whole is None else self.whole[rows], self.parts[rows], self.mask[rows])


class Tower(nn.Module):
    """One modality's head: branches for vectors, for bags of lemmas and for parts, summed.

    Args:
        config: of the tower.
        dim: E, dimensions of the joint space.
        dims: widths of the features.
        codebook: netvlad centres shared with the other tower, or None.
        part_dim: dimensions of parts that others read as they are; None: they are pooled here, in the joint space.
        blocks: of the joint space; see `ModelConfig.blocks`.

    Raises:
        SettingsError: the tower reads nothing, or cannot be cut into blocks.
    """

    def __init__(
        self,
        config: TowerConfig,
        dim: int,
        dims: Dims,
        codebook: PartCodebook | None = None,
        *,
        part_dim: int | None = None,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        if not dims.vectors and not dims.parts and not dims.words:
            raise SettingsError(
                "a tower reads nothing: set its `vectors`, `parts` or `bags` to outputs of its encoders"
            )
        if blocks < 1 or dim % blocks or config.width % blocks or config.part_width % blocks:
            raise SettingsError(
                f"found {blocks} blocks, dim {dim}, width {config.width} and part_width {config.part_width}; expected "
                "at least 1 block, and widths that are multiples of their number"
            )
        pooled = part_dim is None
        self.config, self.part_dim = config, dim if part_dim is None else part_dim
        rooted = config.signed_sqrt
        self.standardise_vectors = Standardise(dims.vectors, signed_sqrt=rooted)
        self.standardise_parts = nn.ModuleList(Standardise(d, signed_sqrt=rooted) for d in dims.parts)
        self.vectors = ResidualMLP(dims.vectors, config.width, dim, config.dropout, blocks) if dims.vectors else None
        self.bags = nn.ModuleList(BagOfLemmas(words, dim, config.bag_dropout) for words in dims.words)
        self.parts = nn.ModuleList(
            ResidualMLP(d, config.part_width, self.part_dim, config.dropout, blocks if pooled else 1)
            for d in dims.parts
        )
        self.context = build_context(config.context, self.part_dim, config.layers, config.heads) if dims.parts else None
        self.aggregator = (
            build_aggregator(config.aggregator, dim, config.heads, config.clusters, codebook)
            if dims.parts and pooled
            else None
        )

    def encode(self, features: Features, noise: Noise | None) -> Encoded:
        """Everything but pooling; `noise` only while training."""
        whole = self._whole(features, noise)
        if not self.parts:
            rows = len(features.vectors)
            device = features.vectors.device
            nothing = torch.zeros(rows, 0, self.part_dim, device=device)
            return Encoded(whole, nothing, torch.zeros(rows, 0, dtype=torch.bool, device=device))
        parts, mask = self.project_parts(features, noise)
        return Encoded(whole, parts if self.context is None else self.context(parts, mask), mask)

    def pool(self, encoded: Encoded, mask: Tensor | None = None) -> Tensor:
        """Embed N rows, (N, E), before any normalisation.

        Args:
            encoded: what `encode` gave.
            mask: (N, K) parts to pool; all real ones if None.
        """
        if self.aggregator is None:
            assert encoded.whole is not None
            return encoded.whole
        pooled: Tensor = self.aggregator(encoded.parts, encoded.mask if mask is None else mask)
        return pooled if encoded.whole is None else encoded.whole + pooled

    def project_parts(self, features: Features, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Parts of all columns in the joint part space, end to end: (N, K, P), zeros where masked, and their mask."""
        projected = []
        columns = zip(features.parts, features.masks, self.standardise_parts, self.parts, strict=True)
        for part, mask, standardise, project in columns:
            owner = mask.nonzero()[:, 0]  # (R,): padding, most of a batch of captions, is not computed
            x = standardise(part[mask])  # (R, D)
            if noise is not None:
                x = noise.dropout(x, self.config.input_dropout, owner)
            real = project(x, noise, owner)  # (R, P)
            projected.append(real.new_zeros(*mask.shape, self.part_dim).index_put((mask,), real))
        return torch.cat(projected, 1), torch.cat(features.masks, 1)

    def _whole(self, features: Features, noise: Noise | None) -> Tensor | None:
        told: list[Tensor] = []
        if self.vectors is not None:
            x = self.standardise_vectors(features.vectors)  # (N, V)
            if noise is not None:
                x = noise.dropout(x, self.config.input_dropout)
            told.append(self.vectors(x, noise))
        for bag, ids, mask in zip(self.bags, features.bags, features.bag_masks, strict=True):
            told.append(bag(ids, mask, noise))
        return torch.stack(told).sum(0) if told else None

    def fit_inputs(self, features: Features) -> None:
        """Take the statistics of training rows."""
        if self.vectors is not None:
            self.standardise_vectors.fit(features.vectors)
        for standardise, part, mask in zip(self.standardise_parts, features.parts, features.masks, strict=True):
            assert isinstance(standardise, Standardise)
            standardise.fit(part[mask])
