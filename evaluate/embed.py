"""Embeddings of cached rows: batches through a trained model, every view of an image averaged."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from featurize.shards import Array
from train.batches import FeatureReader
from train.towers import DualEncoder

BATCH = 1024


def embed_image_rows(model: DualEncoder, reader: FeatureReader, rows: Array) -> Tensor:
    """Image rows (N,) -> (N, E) on the CPU: the mean over the views that the cache holds."""
    device = next(model.parameters()).device

    def embed(chunk: Array) -> Tensor:
        views = (reader.images(chunk, np.full(len(chunk), view)).to(device) for view in range(reader.views))
        return model.mean_of_views(model.embed_images(features) for features in views).cpu()

    return _in_batches(embed, rows)


def embed_caption_rows(model: DualEncoder, reader: FeatureReader, rows: Array) -> Tensor:
    """Caption rows (M,) -> (M, E) on the CPU."""
    device = next(model.parameters()).device
    return _in_batches(lambda chunk: model.embed_texts(reader.texts(chunk).to(device)).cpu(), rows)


def embed_split(model: DualEncoder, reader: FeatureReader, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """A split as evaluation wants it.

    Returns:
        images (N, E), captions (M, E), and for each caption the row (M,) of its image among those N.
    """
    images, captions = reader.split(split)
    owner = np.searchsorted(images, reader.caption_image[captions])
    return (
        embed_image_rows(model, reader, images),
        embed_caption_rows(model, reader, captions),
        torch.from_numpy(owner),
    )


def _in_batches(embed: Callable[[Array], Tensor], rows: Array) -> Tensor:
    with torch.inference_mode():
        return torch.cat([embed(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])
