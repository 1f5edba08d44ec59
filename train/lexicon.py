"""What training makes of the captions' lemmas: a vocabulary, a bag-of-lemmas branch, labels of images.

Implements the bag-of-lemmas branch and the labels from words (docs/methods.md; HIER: Sun, Qin, Liu, Intelligent
Data Analysis 28, 2024). Lemmas come as ids, see `featurize.texts.lexicon`.

Legend: N captions, L slots for the lemmas of each, T lemmas of all captions, V lemmas in the vocabulary, E dimensions.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featurize.shards import Array
from featurize.texts.lexicon import LIMIT
from train.config import SettingsError
from train.noise import Noise

_UNUSED = 2**62  # the id in an unused place of a vocabulary; a lemma's has 31 bits


@dataclass(frozen=True)
class Lemmas:
    """The lemmas of many captions, end to end.

    Attributes:
        ids: (T,) int64 lemma ids.
        caption: (T,) int64, the caption that each belongs to, 0 to N - 1.
        captions: N; some may have no lemma.
    """

    ids: Array
    caption: Array
    captions: int


@dataclass(frozen=True)
class Vocabulary:
    """The lemmas that count, and how much each tells.

    Attributes:
        ids: (V,) int64 lemma ids, ascending.
        idf: (V,) float32, ln((1 + N) / (1 + df)) + 1 of a lemma that df of N captions hold: scikit-learn's smooth idf.
    """

    ids: Tensor
    idf: Tensor

    @classmethod
    def of(cls, lemmas: Lemmas, size: int, min_frequency: int = 1, stop: Collection[int] = ()) -> "Vocabulary":
        """The lemmas that most captions hold; among equally frequent ones those of lower id.

        Args:
            lemmas: of the training captions.
            size: V, unless there are fewer.
            min_frequency: captions that must hold a lemma.
            stop: lemma ids to leave out.

        Raises:
            SettingsError: no lemma is left.
        """
        kinds, kind = np.unique(lemmas.ids, return_inverse=True)
        pairs = np.unique(lemmas.caption * len(kinds) + kind)  # a lemma counts once in a caption
        frequency = np.bincount(pairs % len(kinds), minlength=len(kinds)) if len(kinds) else kinds
        allowed = (frequency >= min_frequency) & ~np.isin(kinds, list(stop))
        chosen = np.sort(np.lexsort((kinds, -frequency, ~allowed))[: min(size, allowed.sum())])
        if not len(chosen):
            raise SettingsError(
                f"no lemma for the vocabulary: {lemmas.captions} captions hold {len(kinds)} different lemmas, and none "
                f"of them counts that is in {min_frequency} captions or more; lower the least frequency, or check "
                "that the lexicon's language is the captions'"
            )
        idf = np.log((1 + lemmas.captions) / (1 + frequency[chosen])) + 1
        return cls(torch.from_numpy(kinds[chosen].astype(np.int64)), torch.from_numpy(idf).float())

    def lookup(self, ids: Tensor) -> Tensor:
        """Lemma ids of any shape -> int64 places in the vocabulary; -1 where a lemma is not in it."""
        place = torch.searchsorted(self.ids, ids).clamp_max(len(self.ids) - 1)
        return torch.where(self.ids[place] == ids, place, -1)


class BagOfLemmas(nn.Module):
    """A linear map, without bias, of a caption's tf-idf vector of unit length.

    The vector (N, V) itself is never made: a caption's lemmas pick their rows of the weight. Without `fit` no lemma is
    known, and every answer is zero. The weight starts as that of `nn.Linear`.

    Args:
        size: V, room for so many lemmas; a smaller vocabulary leaves places unused.
        dim: E.
        dropout: on the entries of the vector, while training.
    """

    ids: Tensor
    idf: Tensor

    def __init__(self, size: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(size, dim))
        bound = 1 / math.sqrt(size)
        nn.init.uniform_(self.weight, -bound, bound)
        self.register_buffer("ids", torch.full((size,), _UNUSED))
        self.register_buffer("idf", torch.zeros(size))

    def fit(self, vocabulary: Vocabulary) -> None:
        """Take the vocabulary of the training captions.

        Raises:
            SettingsError: it is larger than the room there is.
        """
        used = len(vocabulary.ids)
        if used > len(self.ids):
            raise SettingsError(f"a vocabulary of {used} lemmas, but room for {len(self.ids)}; choose one of that size")
        self.ids.fill_(_UNUSED)[:used] = vocabulary.ids
        self.idf.zero_()[:used] = vocabulary.idf

    def forward(self, ids: Tensor, mask: Tensor, noise: Noise | None = None) -> Tensor:
        """Embed captions.

        Args:
            ids: (N, L) int64 lemma ids.
            mask: (N, L) bool, True where there is a lemma.
            noise: only while training.

        Returns:
            (N, E); zero for a caption without a known lemma.
        """
        size = len(self.ids)
        place = Vocabulary(self.ids, self.idf).lookup(ids)
        # Equal lemmas side by side, what is not known behind them; so nothing depends on L.
        place = place.masked_fill(~mask | (place < 0), size).sort(1).values  # (N, L)
        first = torch.searchsorted(place, place)  # where the run of equal lemmas begins
        count = torch.searchsorted(place, place, right=True) - first
        known = place < size
        place = place.clamp_max(size - 1)
        idf = self.idf[place] * known
        # An entry of the vector is count * idf, in `count` slots of one idf each.
        length = (count * idf.square()).sum(1, keepdim=True).sqrt()
        weights = idf / length.clamp_min(1e-12)
        if noise is not None:
            entries = noise.dropout(weights.new_ones(len(ids), LIMIT), self.dropout)
            weights = weights * entries.gather(1, first)  # the slots of one entry fall together
        return F.embedding_bag(place, self.weight, mode="sum", per_sample_weights=weights.to(self.weight.dtype))


def image_labels(lemmas: Lemmas, caption_image: Array, images: int, vocabulary: Vocabulary) -> Tensor:
    """How often the captions of each image use each lemma; above 0 it is a label of the image (HIER).

    Args:
        lemmas: of N captions.
        caption_image: (N,) int64 image of each caption, 0 to `images` - 1.
        images: number of them.
        vocabulary: of content lemmas.

    Returns:
        (images, V) uint8, at most 255.
    """
    place = vocabulary.lookup(torch.from_numpy(lemmas.ids))
    known = place >= 0
    cell = torch.from_numpy(caption_image[lemmas.caption])[known] * len(vocabulary.ids) + place[known]
    cells, count = torch.unique(cell, return_counts=True)
    labels = torch.zeros(images * len(vocabulary.ids), dtype=torch.uint8)
    labels[cells] = count.clamp_max(255).to(torch.uint8)
    return labels.view(images, -1)


def jaccard(labels: Tensor, idf: Tensor) -> Tensor:
    """The idf-weighted Jaccard index of images' labels: idf of what both have over idf of what either has (HIER, r_ij).

    An image without labels is like no other; each image is wholly like itself.

    Args:
        labels: (B, V) of 0 and 1.
        idf: (V,) positive weights.

    Returns:
        (B, B) float, 0 to 1, symmetric.
    """
    weighted = labels * idf  # (B, V)
    both = weighted @ labels.to(weighted.dtype).T
    sums = weighted.sum(1)
    either = sums[:, None] + sums - both
    return (both / either.clamp_min(torch.finfo(either.dtype).tiny)).clamp(0, 1).fill_diagonal_(1)
