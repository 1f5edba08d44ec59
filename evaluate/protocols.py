"""How a split is measured: the whole of it, or COCO's five 1K folds beside all 5K.

Embeddings in, a report out; relevance comes from the captions' image rows, never from their position.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from evaluate.compare import rank_compared
from evaluate.hubness import HubnessCorrection, augment_gallery, augment_queries
from evaluate.metrics import Report, mean_metrics, measure
from evaluate.ranks import EvaluationError, Ranks, Relevance, check_embeddings, rank_both, rank_relevant
from train.embeddings import Embeddings
from train.hosts import Embedder

COCO_IMAGES = 5000
COCO_FOLD = 1000
COMPARED_TILE = 128
"""Rows that a host which compares parts scores at once, at most: a pair takes as much memory as its parts' products."""

Rank: TypeAlias = Callable[[Any, Any, Tensor, int], tuple[Ranks, Ranks]]
"""(images, captions, caption_image, tile) -> ranks image to text, and text to image; of vectors or of `Embeddings`."""


def rank_vectors(images: Tensor, captions: Tensor, caption_image: Tensor, tile: int) -> tuple[Ranks, Ranks]:
    """Ranks by squared L2 distance of (N, E) images and (M, E) captions, both directions.

    Raises:
        EvaluationError: shapes do not agree, an embedding is not finite, or an image has no caption.
    """
    check_embeddings("images", images)
    check_embeddings("captions", captions)
    return rank_both(images, captions, Relevance.image_to_text(caption_image, len(images)), tile)


def rank_against(
    queries: tuple[Tensor, Tensor], galleries: tuple[Tensor, Tensor], caption_image: Tensor, tile: int
) -> tuple[Ranks, Ranks]:
    """Ranks by squared L2 distance where an item that is looked for is not the vector that it asks with.

    Args:
        queries: images (N, E) that look for captions, and captions (M, E) that look for images.
        galleries: the same images (N, E) and captions (M, E) as they are found.
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        tile: rows that are scored at once.

    Returns:
        Image to text, text to image.

    Raises:
        EvaluationError: what `Relevance` and `rank_relevant` refuse.
    """
    images, captions = queries
    found_images, found_captions = galleries
    return (
        rank_relevant(images, found_captions, Relevance.image_to_text(caption_image, len(images)), tile),
        rank_relevant(captions, found_images, Relevance.text_to_image(caption_image), tile),
    )


def rank_corrected(
    images: Tensor, captions: Tensor, caption_image: Tensor, tile: int, *, correction: HubnessCorrection
) -> tuple[Ranks, Ranks]:
    """Ranks as `rank_vectors` gives them, with every gallery set back by its hubness.

    Args:
        images: (N, E).
        captions: (M, E).
        caption_image: (M,) row of the image that each caption belongs to.
        tile: rows scored at once.
        correction: of the model that embedded them.

    Returns:
        Ranks of captions for images, and of images for captions.
    """
    galleries = (
        augment_gallery(images, correction.bias(images, "images", tile)),
        augment_gallery(captions, correction.bias(captions, "captions", tile)),
    )
    return rank_against((augment_queries(images), augment_queries(captions)), galleries, caption_image, tile)


def evaluate_host(
    model: Embedder,
    images: Embeddings,
    captions: Embeddings,
    caption_image: Tensor,
    *,
    split: str,
    protocol: str,
    tile: int,
    rank: Rank = rank_vectors,
) -> Report:
    """Measures a host by its index vectors, or part by part where it has none.

    Args:
        model: the host that made the embeddings.
        images: N images.
        captions: M captions.
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        split: its name, for the report.
        protocol: "full" or "coco".
        tile: rows that are scored at once; memory grows with its square.
        rank: how index vectors are ranked; a host that has none compares parts.

    Raises:
        EvaluationError: what `evaluate_full` and `evaluate_coco` refuse.
    """
    evaluate = evaluate_coco if protocol == "coco" else evaluate_full
    if model.indexable:
        vectors = model.index_vectors(images), model.index_vectors(captions)
        return evaluate(*vectors, caption_image, split=split, tile=tile, rank=rank)
    compared = partial(rank_compared, distances=model.distances)
    return evaluate(images, captions, caption_image, split=split, tile=min(tile, COMPARED_TILE), rank=compared)


def evaluate_full(
    images: Tensor | Embeddings,
    captions: Tensor | Embeddings,
    caption_image: Tensor,
    *,
    split: str,
    tile: int = 1024,
    rank: Rank = rank_vectors,
) -> Report:
    """Measures both directions over all images and captions of a split.

    Args:
        images: N image embeddings; by default vectors (N, E).
        captions: M caption embeddings; by default vectors (M, E).
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        split: its name, for the report.
        tile: rows that are scored at once; memory grows with its square.
        rank: how they are ranked.

    Raises:
        EvaluationError: shapes do not agree, an embedding is not finite, or an image has no caption.
    """
    if caption_image.shape != (len(captions),):
        raise EvaluationError(
            f"caption_image: expected one image row for each of {len(captions)} captions, "
            f"found shape {tuple(caption_image.shape)}"
        )
    to_text, to_image = rank(images, captions, caption_image, tile)
    measured = measure(to_text), measure(to_image)
    return Report(split, "full", *measured, ranks=(to_text, to_image))


def evaluate_coco(
    images: Tensor | Embeddings,
    captions: Tensor | Embeddings,
    caption_image: Tensor,
    *,
    split: str,
    tile: int = 1024,
    rank: Rank = rank_vectors,
) -> Report:
    """Measures a COCO Karpathy split on all 5K images and as the mean of five 1K folds.

    A fold is 1000 images in row order with all their captions (VSE++, Faghri et al. BMVC 2018).

    Args:
        images: 5000 image embeddings in the order of the split; by default vectors (5000, E).
        captions: M caption embeddings; by default vectors (M, E).
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        split: its name, for the report.
        tile: rows that are scored at once; memory grows with its square.
        rank: how they are ranked.

    Returns:
        The report of the 5K; its `folds_1k` holds the mean of the folds.

    Raises:
        EvaluationError: there are not 5000 images, or what `evaluate_full` refuses.
    """
    if len(images) != COCO_IMAGES:
        raise EvaluationError(
            f"the coco protocol needs the {COCO_IMAGES} images of a COCO Karpathy split, "
            f"found {len(images)}; measure with the protocol full (--evaluate.protocol full of a run, --protocol full "
            "of evaluate)"
        )
    whole = evaluate_full(images, captions, caption_image, split=split, tile=tile, rank=rank)
    folds = []
    for first in range(0, COCO_IMAGES, COCO_FOLD):
        inside = (caption_image >= first) & (caption_image < first + COCO_FOLD)
        fold = evaluate_full(
            images[first : first + COCO_FOLD],
            captions[inside],
            caption_image[inside] - first,
            split=split,
            tile=tile,
            rank=rank,
        )
        folds.append(fold)
    mean = Report(
        split=split,
        protocol="coco_1k",
        i2t=mean_metrics([fold.i2t for fold in folds]),
        t2i=mean_metrics([fold.t2i for fold in folds]),
    )
    return replace(whole, protocol="coco_5k", folds_1k=mean)
