"""What losses know about the training images beside their embeddings: numbers, concepts, words."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featurize.shards import Array
from train.batches import FeatureReader, reads_labels
from train.concepts import image_concepts
from train.config import ObjectiveConfig


@dataclass(frozen=True)
class Targets:
    """Of a training split with n images.

    Attributes:
        image_ids: caption row of the data set -> place of its image among the n; of captions of the split only.
        concepts: (n,) int64 concept of each image, 0 to C-1.
        count: C.
        labels: (n, V) uint8 of 0 and 1, the words of each image's captions; V = 0 where no loss reads them.
        idf: (V,) their weights.
    """

    image_ids: Array
    concepts: Tensor
    count: int
    labels: Tensor
    idf: Tensor

    @classmethod
    def of(cls, reader: FeatureReader, split: str, config: ObjectiveConfig, seed: int) -> "Targets":
        """Whatever the objective reads, from the cache; the same on every worker.

        Raises:
            SettingsError: the cache lacks a column that it takes, or there are fewer images than clusters.
        """
        images, captions = reader.split(split)
        image_ids = np.searchsorted(images, reader.caption_image)
        labels, idf = torch.zeros(len(images), 0, dtype=torch.uint8), torch.zeros(0)
        if reads_labels(config):
            labels, idf = reader.labels(split, config.local.vocabulary)
        concepts, count = image_concepts(
            config.center,
            len(images),
            lambda: (reader.sentences(captions), image_ids[captions]),
            lambda: (labels.numpy(), idf.numpy()),
            seed,
        )
        kept = labels if config.local.weight else labels[:, :0]
        return cls(image_ids, torch.from_numpy(concepts), count, kept.clamp_max(1), idf[: kept.shape[1]])
