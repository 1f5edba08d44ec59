"""Ranks under a host that compares parts: distances come in tiles, and every tile serves both directions.

There are no vectors to rank by, so each of N·M pairs must be compared; memory is that of one tile.
"""

import torch
from torch import Tensor

from evaluate.ranks import EvaluationError, Ranks, Relevance
from train.embeddings import Distances, Embeddings

TOLERANCE = 1e-6
"""Squared distances (0 to 4, float32) that differ by no more are ties: a tile's edge may round a pair differently."""


@torch.no_grad()
def rank_compared(
    images: Embeddings, captions: Embeddings, caption_image: Tensor, tile: int, *, distances: Distances
) -> tuple[Ranks, Ranks]:
    """Ranks of every image's captions among all captions, and of every caption's image among all images.

    Args:
        images: N images.
        captions: M captions.
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        tile: images, and captions, that are compared at once.
        distances: the host's.

    Returns:
        Image to text, text to image.

    Raises:
        EvaluationError: a distance is not finite, tile < 1, or what `Relevance` refuses.
    """
    if tile < 1:
        raise EvaluationError(f"tile: expected at least 1, found {tile}")
    to_text = Relevance.image_to_text(caption_image, len(images))
    to_image = Relevance.text_to_image(caption_image)
    own = _own_distances(distances, images, captions, to_text, tile)  # (M,) of each caption to its image
    counts = to_text.counts()
    rows = to_text.rows()
    slots = torch.arange(len(rows)) - to_text.indptr[rows]
    sets = own.new_full((len(images), int(counts.max())), torch.inf)
    sets[rows, slots] = own[to_text.indices]  # (N, r), inf where an image has fewer captions
    nearest = sets.amin(1)

    ahead = torch.zeros_like(sets, dtype=torch.int64)  # other images' captions that are nearer or tied
    before = torch.zeros(len(images), dtype=torch.int64)  # those strictly nearer than the nearest own caption
    image_ahead = torch.zeros(len(captions), dtype=torch.int64)
    image_before = torch.zeros(len(captions), dtype=torch.int64)
    for first in range(0, len(images), tile):
        part = slice(first, first + tile)
        for start in range(0, len(captions), tile):
            columns = slice(start, start + tile)
            block = _checked(distances(images[part], captions[columns]))  # (n, m)
            numbers = torch.arange(len(images))[part]
            block[numbers[:, None] == caption_image[columns]] = torch.inf  # only other images' count
            for slot in range(sets.shape[1]):
                ahead[part, slot] += (block <= sets[part, slot, None] + TOLERANCE).sum(1)
            before[part] += (block < nearest[part, None] - TOLERANCE).sum(1)
            image_ahead[columns] += (block <= own[columns] + TOLERANCE).sum(0)
            image_before[columns] += (block < own[columns] - TOLERANCE).sum(0)

    nearer = torch.searchsorted(sets.sort(1).values, sets - TOLERANCE)  # own captions strictly nearer
    ranks = 1 + ahead + nearer
    tied = ahead.gather(1, sets.argmin(1, keepdim=True))[:, 0] - before
    others = (len(captions) - counts).clamp_min(1)
    image_tied = (image_ahead - image_before) / max(1, len(images) - 1)
    return (
        Ranks(to_text.indptr, ranks[rows, slots], tied / others.double()),
        Ranks(to_image.indptr, 1 + image_ahead, image_tied.double()),
    )


def _own_distances(
    distances: Distances, images: Embeddings, captions: Embeddings, relevance: Relevance, tile: int
) -> Tensor:
    """(M,) distance of each caption to its own image."""
    own = torch.empty(len(captions))
    step = max(1, tile // 8)
    for first in range(0, len(images), step):
        begin, end = relevance.indptr[first], relevance.indptr[min(first + step, len(images))]
        theirs = relevance.indices[begin:end]
        block = _checked(distances(images[first : first + step], captions[theirs]))
        own[theirs] = block[relevance.rows()[begin:end] - first, torch.arange(len(theirs))]
    return own


def _checked(block: Tensor) -> Tensor:
    if not block.isfinite().all():
        raise EvaluationError(
            "the host gives distances that are NaN or infinite, which have no rank: look for a diverged training run "
            "or damaged features"
        )
    return block.float().cpu()
