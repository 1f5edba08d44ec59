"""Concepts: which images the center loss gathers around one point (LESS 3).

Computed once, before training, from the training split alone; numbered 0 to C-1 without gaps.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from featurize.shards import Array
from train.config import CenterConfig, SettingsError
from train.quantize import affinities, kmeans

POINTS_PER_CLUSTER = 256  # k-means learns from at most so many images for each cluster, as FAISS does
TILE = 8192  # images compared with all clusters at once


def image_concepts(
    config: CenterConfig,
    images: int,
    sentences: Callable[[], tuple[Array, Array]],
    labels: Callable[[], tuple[Array, Array]],
    seed: int = 0,
) -> tuple[Array, int]:
    """The concept of each training image; only what the kind of concept needs is read.

    Args:
        config: kind, and number of clusters; without the center loss (weight 0) every image is its own concept.
        images: n.
        sentences: gives what `cluster_concepts` reads: (M, S) sentence vectors of the captions and (M,) the place of
            each one's image, 0 to n-1.
        labels: gives what `lexical_concepts` reads: (n, V) labels and (V,) idf.
        seed: of the clusters.

    Returns:
        (n,) int64 concepts, and their number C.

    Raises:
        SettingsError: see `cluster_concepts`.
    """
    if not config.weight:
        return np.arange(images), images
    match config.concept:
        case "image":
            found = np.arange(images)
        case "cluster":
            found = cluster_concepts(*sentences(), images, config.concepts, seed)
        case "lexical":
            found = lexical_concepts(*labels())
    return found, int(found.max()) + 1


def cluster_concepts(sentences: Array, caption_image: Array, images: int, clusters: int, seed: int = 0) -> Array:
    """Images whose captions say alike: k-means over each image's mean caption vector, brought to unit length.

    Args:
        sentences: (M, S) sentence vectors of the captions.
        caption_image: (M,) the place of each caption's image, 0 to n-1. An image without captions falls into some
            cluster.
        images: n.
        clusters: of k-means; concepts are fewer where a cluster ends without images.
        seed: of k-means.

    Returns:
        (n,) int64, without gaps.

    Raises:
        SettingsError: when there are fewer images than clusters, or no cluster.
    """
    if not 1 <= clusters <= images:
        raise SettingsError(
            f"found {clusters} clusters for {images} training images; set --train.objective.center.concepts "
            f"to 1 to {images}"
        )
    vectors = torch.from_numpy(np.asarray(sentences)).float()
    sums = torch.zeros(images, vectors.shape[1]).index_add_(0, torch.from_numpy(caption_image), vectors)
    points = F.normalize(sums, dim=1)  # (n, S): the length of a mean is lost, so sums will do
    chosen = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[: POINTS_PER_CLUSTER * clusters]
    centres = kmeans(points[chosen], clusters, seed=seed)
    tiles = (points[start : start + TILE] for start in range(0, images, TILE))
    nearest = torch.cat([affinities(tile, centres).argmax(1) for tile in tiles])  # (n,)
    return _without_gaps(nearest.numpy())


def lexical_concepts(labels: Array, idf: Array) -> Array:
    """Images that share their most telling word: the content lemma with the highest tf-idf over their captions.

    Among equals the first lemma. An image without any lemma is a concept of its own.

    Args:
        labels: (n, V) how often the captions of each image use each lemma.
        idf: (V,) inverse document frequency of each lemma, above 0.

    Returns:
        (n,) int64, without gaps.
    """
    weights = labels * idf.astype(np.float32)  # (n, V)
    own = labels.shape[1] + np.arange(len(labels))
    return _without_gaps(np.where(weights.any(1), weights.argmax(1), own))


def _without_gaps(numbers: Array) -> Array:
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)
