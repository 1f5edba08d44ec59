"""Towers: frozen features of an image or a caption become one vector of the joint space (METHODS: Towers)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.aggregators import NetVLAD, build_aggregator
from train.batches import Features
from train.config import ModelConfig, SettingsError, TowerConfig
from train.noise import Noise
from train.quantize import PartCodebook


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
        return x.sign() * x.abs().sqrt() if self.signed_sqrt else x

    def fit(self, x: Tensor) -> None:
        """Take the statistics of x (N, D)."""
        rooted = self._root(x).double()
        self.mean.copy_(rooted.mean(0))
        self.scale.copy_(1 / rooted.std(0, correction=0).clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise."""
        return (self._root(x) - self.mean) * self.scale


class ResidualMLP(nn.Module):
    """W x + MLP(x): a linear map with a hidden layer's correction.

    Shape: (..., D) -> (..., dim).
    """

    def __init__(self, inputs: int, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.skip = nn.Linear(inputs, dim)
        self.hidden = nn.Linear(inputs, width)
        self.out = nn.Linear(width, dim)
        self.dropout = dropout

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        """Map; `noise` only while training."""
        hidden = F.gelu(self.hidden(x))
        if noise is not None:
            hidden = noise.dropout(hidden, self.dropout)
        return self.skip(x) + self.out(hidden)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class Tower(nn.Module):
    """One modality's head: a branch for vectors and a branch for parts, summed.

    Args:
        config: of the tower.
        dim: E, dimensions of the joint space.
        vector_dim: V, width of all vector columns together.
        part_dims: D_c of each part column.
        codebook: netvlad centres shared with the other tower, or None.

    Raises:
        SettingsError: there is neither a vector nor a part column.
    """

    def __init__(
        self,
        config: TowerConfig,
        dim: int,
        vector_dim: int,
        part_dims: tuple[int, ...],
        codebook: PartCodebook | None = None,
    ) -> None:
        super().__init__()
        if not vector_dim and not part_dims:
            raise SettingsError("a tower reads nothing: set its `vectors` or its `parts` to outputs of its encoders")
        self.config = config
        self.standardise_vectors = Standardise(vector_dim, signed_sqrt=config.signed_sqrt)
        self.standardise_parts = nn.ModuleList(Standardise(d, signed_sqrt=config.signed_sqrt) for d in part_dims)
        self.vectors = ResidualMLP(vector_dim, config.width, dim, config.dropout) if vector_dim else None
        self.parts = nn.ModuleList(ResidualMLP(d, config.width, dim, config.dropout) for d in part_dims)
        self.aggregator = (
            build_aggregator(config.aggregator, dim, config.heads, config.clusters, codebook) if part_dims else None
        )

    def project_parts(self, features: Features, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Parts of all columns in the joint part space, end to end: (N, K, E) and their mask (N, K)."""
        projected = []
        for part, standardise, project in zip(features.parts, self.standardise_parts, self.parts, strict=True):
            x = standardise(part)  # (N, K, D)
            if noise is not None:
                x = noise.dropout(x, self.config.input_dropout)
            projected.append(project(x, noise))
        return torch.cat(projected, 1), torch.cat(features.masks, 1)

    def forward(self, features: Features, noise: Noise | None) -> Tensor:
        """Embed N rows, (N, E), before any normalisation."""
        total: Tensor | None = None
        if self.vectors is not None:
            x = self.standardise_vectors(features.vectors)  # (N, V)
            if noise is not None:
                x = noise.dropout(x, self.config.input_dropout)
            total = self.vectors(x, noise)
        if self.aggregator is not None:
            pooled = self.aggregator(*self.project_parts(features, noise))
            total = pooled if total is None else total + pooled
        assert total is not None
        return total

    def fit_inputs(self, features: Features) -> None:
        """Take the statistics of training rows."""
        if self.vectors is not None:
            self.standardise_vectors.fit(features.vectors)
        for standardise, part, mask in zip(self.standardise_parts, features.parts, features.masks, strict=True):
            assert isinstance(standardise, Standardise)
            standardise.fit(part[mask])


class DualEncoder(nn.Module):
    """Two towers and one space: the `vse` host.

    Args:
        config: of the model.
        image_dims: (V, (D_c, ...)) of the image features.
        text_dims: the same of the caption features.
    """

    def __init__(
        self,
        config: ModelConfig,
        image_dims: tuple[int, tuple[int, ...]],
        text_dims: tuple[int, tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.config = config
        codebook = PartCodebook(config.image.clusters, config.dim) if config.shared_codebook else None
        self.image = Tower(config.image, config.dim, *image_dims, codebook)
        self.text = Tower(config.text, config.dim, *text_dims, codebook)

    def _finish(self, embedding: Tensor) -> Tensor:
        return F.normalize(embedding.float(), dim=-1) if self.config.normalise else embedding.float()

    def embed_images(self, features: Features, noise: Noise | None = None) -> Tensor:
        """(N, E) float32; unit vectors where the model normalises."""
        return self._finish(self.image(features, noise))

    def embed_texts(self, features: Features, noise: Noise | None = None) -> Tensor:
        """(N, E) float32; unit vectors where the model normalises."""
        return self._finish(self.text(features, noise))

    def forward(self, image: Features, text: Features, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Both embeddings of a batch of pairs."""
        return self.embed_images(image, noise), self.embed_texts(text, noise)

    def fit_inputs(self, image: Features, text: Features) -> None:
        """Take statistics of training rows of both modalities, then place netvlad centres among their parts."""
        sides = [(self.image, image), (self.text, text)]
        for tower, features in sides:
            tower.fit_inputs(features)
        samples: dict[NetVLAD, Tensor] = {}
        for tower, features in sides:
            if isinstance(tower.aggregator, NetVLAD):
                parts, mask = tower.project_parts(features)
                samples[tower.aggregator] = parts[mask]
        if self.config.shared_codebook:
            next(iter(samples)).initialise(torch.cat(list(samples.values())))
        else:
            for aggregator, sample in samples.items():
                aggregator.initialise(sample)

    def mean_of_views(self, views: Iterable[Tensor]) -> Tensor:
        """One embedding (N, E) of images from those of their views."""
        return self._finish(torch.stack(list(views)).mean(0))
