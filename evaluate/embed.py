"""Embeddings of cached rows: batches through a trained model, every view of an image joined."""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from featurize.shards import Array
from train.batches import FeatureReader, Features
from train.embeddings import Embeddings
from train.hosts import Embedder

BATCH = 1024


class EmbeddedSplit(NamedTuple):
    """A split as evaluation wants it, on the CPU.

    Attributes:
        images: N images.
        captions: M captions.
        owner: (M,) int64, row of each caption's image among those N.
    """

    images: Embeddings
    captions: Embeddings
    owner: Tensor


def embed_image_rows(model: Embedder, reader: FeatureReader, rows: Array) -> Embeddings:
    """Embeddings of image rows (N,) on the CPU, from all views that the cache holds."""
    device = next(model.parameters()).device

    def embed(chunk: Array) -> Embeddings:
        views = (reader.images(chunk, np.full(len(chunk), view)) for view in range(reader.views))
        return model.mean_of_views([model.embed_images(_on(features, device)) for features in views])

    return _in_batches(embed, rows)


def embed_caption_rows(model: Embedder, reader: FeatureReader, rows: Array) -> Embeddings:
    """Embeddings of caption rows (M,) on the CPU."""
    device = next(model.parameters()).device
    return _in_batches(lambda chunk: model.embed_texts(_on(reader.texts(chunk), device)), rows)


def _on(features: Features, device: torch.device) -> Features:
    return features.map(lambda tensor: tensor.to(device))


def embed_split(model: Embedder, reader: FeatureReader, split: str) -> EmbeddedSplit:
    """All images and captions of a split, without images that could not be decoded."""
    images, captions = reader.split(split)
    return EmbeddedSplit(
        embed_image_rows(model, reader, images), embed_caption_rows(model, reader, captions), reader.owners(split)
    )


def _in_batches(embed: Callable[[Array], Embeddings], rows: Array) -> Embeddings:
    with torch.inference_mode():
        parts = [embed(rows[start : start + BATCH]).map(Tensor.cpu) for start in range(0, len(rows), BATCH)]
    return Embeddings(
        **{field.name: torch.cat([getattr(e, field.name) for e in parts]) for field in fields(Embeddings)}
    )
