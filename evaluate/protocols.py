"""How a split is measured: the whole of it, or COCO's five 1K folds beside all 5K.

Embeddings in, a report out; relevance comes from the captions' image rows, never from their position.
"""

from dataclasses import replace

from torch import Tensor

from evaluate.metrics import Report, mean_metrics, measure
from evaluate.ranks import EvaluationError, Relevance, check_embeddings, rank_relevant

COCO_IMAGES = 5000
COCO_FOLD = 1000


def evaluate_full(images: Tensor, captions: Tensor, caption_image: Tensor, *, split: str, tile: int = 1024) -> Report:
    """Measures both directions over all images and captions of a split.

    Args:
        images: (N, E) image embeddings.
        captions: (M, E) caption embeddings.
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        split: its name, for the report.
        tile: rows that are scored at once; memory grows with its square.

    Raises:
        EvaluationError: shapes do not agree, an embedding is not finite, or an image has no caption.
    """
    check_embeddings("images", images)
    check_embeddings("captions", captions)
    if caption_image.shape != captions.shape[:1]:
        raise EvaluationError(
            f"caption_image: expected one image row for each of {len(captions)} captions, "
            f"found shape {tuple(caption_image.shape)}"
        )
    to_text = Relevance.image_to_text(caption_image, len(images))
    to_image = Relevance.text_to_image(caption_image)
    return Report(
        split=split,
        protocol="full",
        i2t=measure(rank_relevant(images, captions, to_text, tile)),
        t2i=measure(rank_relevant(captions, images, to_image, tile)),
    )


def evaluate_coco(images: Tensor, captions: Tensor, caption_image: Tensor, *, split: str, tile: int = 1024) -> Report:
    """Measures a COCO Karpathy split on all 5K images and as the mean of five 1K folds.

    A fold is 1000 images in row order with all their captions (VSE++, Faghri et al. BMVC 2018).

    Args:
        images: (5000, E) image embeddings in the order of the split.
        captions: (M, E) caption embeddings.
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        split: its name, for the report.
        tile: rows that are scored at once; memory grows with its square.

    Returns:
        The report of the 5K; its `folds_1k` holds the mean of the folds.

    Raises:
        EvaluationError: there are not 5000 images, or what `evaluate_full` refuses.
    """
    if len(images) != COCO_IMAGES:
        raise EvaluationError(
            f"the coco protocol needs the {COCO_IMAGES} images of a COCO Karpathy split, "
            f"found {len(images)}; use the full protocol"
        )
    whole = evaluate_full(images, captions, caption_image, split=split, tile=tile)
    folds = []
    for first in range(0, COCO_IMAGES, COCO_FOLD):
        inside = (caption_image >= first) & (caption_image < first + COCO_FOLD)
        fold = evaluate_full(
            images[first : first + COCO_FOLD],
            captions[inside],
            caption_image[inside] - first,
            split=split,
            tile=tile,
        )
        folds.append(fold)
    mean = Report(
        split=split,
        protocol="coco_1k",
        i2t=mean_metrics([fold.i2t for fold in folds]),
        t2i=mean_metrics([fold.t2i for fold in folds]),
    )
    return replace(whole, protocol="coco_5k", folds_1k=mean)
