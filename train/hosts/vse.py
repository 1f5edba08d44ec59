"""The `vse` host: a dual encoder, one vector an image and one a caption (VSE++, Faghri et al., BMVC 2018)."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from train.aggregators import Aggregator, NetVLAD
from train.batches import Features
from train.config import ModelConfig, SettingsError, TowerConfig
from train.embeddings import Distances, Embeddings
from train.hosts.host import Host
from train.local import ConceptQueries, combine
from train.losses.distances import squared_distances
from train.quantize import PartCodebook
from train.towers import Dims, Encoded, Tower


class DualEncoder(Host):
    """Two towers and one space; with `local.dim` a second, local space beside it (HIER).

    With `blocks` the space is a product of as many, each with heads of its own that are trained by a ranking loss of
    their own, as an ensemble whose members' vectors stand side by side. *(Ours; related: Opitz et al., BIER: Boosting
    Independent Embeddings Robustly, ICCV 2017.)*

    Args:
        config: of the model.
        image: widths of the image features.
        text: widths of the caption features.

    Raises:
        SettingsError: a local space without parts or without unit embeddings; parts that nothing reads; a shared
            codebook without two towers that have centres.
    """

    indexable = True
    share: Tensor

    def __init__(self, config: ModelConfig, image: Dims, text: Dims) -> None:
        super().__init__(config)
        codebook = None
        if config.shared_codebook:
            for name, tower, dims in (("image", config.image, image), ("text", config.text, text)):
                if not dims.parts or tower.aggregator != "netvlad" or tower.clusters != config.image.clusters:
                    raise SettingsError(
                        f"a shared codebook holds the netvlad centres of both towers, and model.{name} has aggregator "
                        f"{tower.aggregator!r}, {tower.clusters} clusters and {len(dims.parts)} part columns: set its "
                        "parts, aggregator netvlad and the same clusters for both, or model.shared_codebook false"
                    )
            codebook = PartCodebook(config.image.clusters, config.dim)
        self.image = _tower("image", config.image, image, config, codebook)
        self.text = _tower("text", config.text, text, config, codebook)
        self.image_local: ConceptQueries | None = None
        self.text_local: ConceptQueries | None = None
        if config.local.dim:
            if not image.parts or not text.parts or not config.normalise:
                raise SettingsError(
                    "a local space attends over parts of images and of captions, and joins unit vectors: set "
                    "model.image.parts (grid, cells), model.text.parts (tokens) and model.normalise, "
                    "or model.local.dim 0"
                )
            self.image_local = ConceptQueries(self.image.part_dim, config.local.queries, config.local.dim)
            self.text_local = ConceptQueries(self.text.part_dim, config.local.queries, config.local.dim)
            self.register_buffer("share", torch.tensor(config.local.share))

    def _finish(self, vector: Tensor) -> Tensor:
        """Every block of equal length, the whole of length one, where the model normalises."""
        if not self.config.normalise:
            return vector.float()
        blocks = vector.float().view(len(vector), self.config.blocks, -1)
        return F.normalize(blocks, dim=-1).flatten(1) / math.sqrt(self.config.blocks)

    def _embeddings(
        self, tower: Tower, queries: ConceptQueries | None, encoded: Encoded, mask: Tensor | None
    ) -> Embeddings:
        vector = self._finish(tower.pool(encoded, mask))
        if queries is None:
            return Embeddings.of(vector)
        local = queries(encoded.parts, encoded.mask if mask is None else mask)
        return Embeddings.of(vector, F.normalize(local.float(), dim=-1))

    def finish_images(self, encoded: Encoded, mask: Tensor | None = None) -> Embeddings:
        """See `Host.finish_images`."""
        return self._embeddings(self.image, self.image_local, encoded, mask)

    def finish_texts(self, encoded: Encoded, mask: Tensor | None = None) -> Embeddings:
        """See `Host.finish_texts`."""
        return self._embeddings(self.text, self.text_local, encoded, mask)

    def distances(self, image: Embeddings, text: Embeddings) -> Tensor:
        """Squared distances (N, M) of the global vectors."""
        return squared_distances(image.vector, text.vector)

    def spaces(self) -> list[Distances]:
        """One for each block, scaled so that the distance of the whole is their mean."""
        count = self.config.blocks
        if count == 1:
            return [self.distances]

        def within(block: int, image: Embeddings, text: Embeddings) -> Tensor:
            one, other = (side.vector.chunk(count, 1)[block] for side in (image, text))
            return count * squared_distances(one, other)

        return [partial(within, block) for block in range(count)]

    def require_guidance(self) -> None:
        """See `Host.require_guidance`."""
        self._pooling()

    def _pooling(self) -> tuple[Aggregator, Aggregator]:
        """What pools the parts of images and of captions.

        Raises:
            SettingsError: a modality has no parts in its global vector.
        """
        if self.image.aggregator is None or self.text.aggregator is None:
            raise SettingsError(
                "erasing needs parts of images and of captions that are pooled: set model.image.parts (grid, coarse), "
                "model.text.parts (tokens) and an aggregator other than none for both, or objective.erasing.weight 0"
            )
        return self.image.aggregator, self.text.aggregator

    def guidance(self, image: Encoded, text: Encoded, embedded: tuple[Embeddings, Embeddings]) -> tuple[Tensor, Tensor]:
        """Softmax over parts of pool(x_k)·e / √E, e being the partner's vector; see `Host.guidance`.

        pool(x_k) is what the aggregator makes of part k alone, see `Aggregator.alone`.

        Raises:
            SettingsError: a modality has no parts in its global vector.
        """
        of_images, of_texts = self._pooling()

        def attention(own: Encoded, aggregator: Aggregator, partner: Embeddings) -> Tensor:
            alone = aggregator.alone(own.parts, own.mask)  # (B, K, E)
            told = partner.vector.to(alone.dtype)[..., None]
            scores = (alone @ told).squeeze(2).float() / math.sqrt(alone.shape[2])
            return scores.masked_fill(~own.mask, torch.finfo(scores.dtype).min).softmax(1) * own.mask

        return (
            attention(image, of_images, embedded[1]),
            attention(text, of_texts, embedded[0]),
        )

    def mean_of_views(self, views: Sequence[Embeddings]) -> Embeddings:
        """Means of both halves, of unit length again where the model normalises."""
        vector = self._finish(torch.stack([view.vector for view in views]).mean(0))
        if self.image_local is None:
            return Embeddings.of(vector)
        return Embeddings.of(vector, F.normalize(torch.stack([view.local for view in views]).mean(0), dim=-1))

    def index_vectors(self, embeddings: Embeddings) -> Tensor:
        """(N, E), or (N, E + L) with a local space, weighted by its share."""
        if self.image_local is None:
            return embeddings.vector
        return combine(embeddings.vector, embeddings.local, float(self.share))

    def fit_inputs(self, image: Features, text: Features) -> None:
        """Take statistics of training rows of both modalities, then place netvlad centres among their parts."""
        super().fit_inputs(image, text)
        samples: dict[NetVLAD, Tensor] = {}
        for tower, features in ((self.image, image), (self.text, text)):
            if isinstance(tower.aggregator, NetVLAD):
                encoded = tower.encode(features, None)
                samples[tower.aggregator] = encoded.parts[encoded.mask]
        if self.config.shared_codebook:
            next(iter(samples)).initialise(torch.cat(list(samples.values())))
        else:
            for aggregator, sample in samples.items():
                aggregator.initialise(sample)


def _tower(name: str, own: TowerConfig, dims: Dims, config: ModelConfig, codebook: PartCodebook | None) -> Tower:
    """A tower that pools its parts, or leaves them to the local space.

    Raises:
        SettingsError: there is no local space that reads them, or nothing is left for the global vector.
    """
    if not dims.parts or own.aggregator != "none":
        return Tower(own, config.dim, dims, codebook, blocks=config.blocks)
    if not config.local.dim or not (dims.vectors or dims.words):
        raise SettingsError(
            f"aggregator none leaves the parts of model.{name} to the local space: found model.local.dim "
            f"{config.local.dim}, vectors of {dims.vectors} numbers and {len(dims.words)} bags; expected a local "
            f"space, and vectors or bags for the global one, or another model.{name}.aggregator"
        )
    return Tower(own, config.dim, dims, part_dim=config.local.dim, blocks=config.blocks)
