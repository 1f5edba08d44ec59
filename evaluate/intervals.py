"""How sure a recall is: the bootstrap over images, for one run and for the difference of two.

Captions of one image succeed and fail together, so images are drawn (with replacement), each with all its captions.
The gallery stays whole: every query keeps the rank that it had, and only the weights of queries change. So a sample is
a row of counts, how often each image was drawn, and all samples are a few matrix products (Efron and Tibshirani 1993,
chapters 13 and 16).

Legend: N images, M captions, S samples, K metrics.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluate.metrics import CUTS, hits
from evaluate.ranks import EvaluationError, Ranks

METRICS = (*(f"{direction}/r{cut}" for direction in ("i2t", "t2i") for cut in CUTS), "rsum")
"""Named as `Report.as_flat` names them."""
CHUNK = 256


@dataclass(frozen=True)
class Interval:
    """Where a value lies, in its own unit: percentile bounds."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What changes from the first run to the second.

    Attributes:
        value: second less first, in points.
        interval: of the difference.
        p: two-sided p value of the hypothesis that nothing changes: twice the share of samples on the other side of
            zero, at most 1, at least 2 / (samples + 1).
    """

    value: float
    interval: Interval
    p: float


@dataclass(frozen=True, eq=False)
class Clusters:
    """What a run got right, summed over each image's queries.

    Attributes:
        found: (N, 6) float64: whether an image found a caption, how many of its captions found it, at 1, 5, 10 each.
        captions: (N,) float64 captions of each image.
    """

    found: Tensor
    captions: Tensor

    @classmethod
    def of(cls, i2t: Ranks, t2i: Ranks, caption_image: Tensor) -> "Clusters":
        """From the ranks of both directions.

        Args:
            i2t: ranks of N images' captions.
            t2i: ranks of M captions' images.
            caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.

        Raises:
            EvaluationError: the numbers of images and captions do not agree, or an image has no caption.
        """
        images, captions = len(i2t.indptr) - 1, len(t2i.indptr) - 1
        if caption_image.shape != (captions,):
            raise EvaluationError(
                f"caption_image: expected an image row for each of {captions} ranked captions, "
                f"found shape {tuple(caption_image.shape)}"
            )
        owned = torch.bincount(caption_image, minlength=images)  # (N,)
        if len(owned) != images or (owned == 0).any():
            raise EvaluationError(
                f"caption_image: expected rows 0 to {images - 1}, each at least once, for {images} ranked images, "
                f"found rows {caption_image.min().item()} to {caption_image.max().item()}, "
                f"{int((owned == 0).sum())} of them missing"
            )
        found = hits(t2i)  # (M, 3)
        summed = found.new_zeros(images, found.shape[1]).index_add(0, caption_image, found)
        return cls(torch.cat([hits(i2t), summed], dim=1), owned.double())

    def metrics(self, counts: Tensor) -> Tensor:
        """`METRICS` of samples, (S, 7), in percent, from how often each image was drawn, (S, N) float64."""
        totals = counts @ self.found  # (S, 6)
        size = len(CUTS)
        shares = torch.cat(
            [totals[:, :size] / counts.sum(dim=1, keepdim=True), totals[:, size:] / (counts @ self.captions)[:, None]],
            dim=1,
        )
        return 100 * torch.cat([shares, shares.sum(dim=1, keepdim=True)], dim=1)


def bootstrap(run: Clusters, *, samples: int = 2000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """Percentile intervals of every recall and of rSum, clustered by image.

    Args:
        run: what was found.
        samples: number of bootstrap samples.
        level: share of samples inside the interval.
        seed: same seed, same samples.

    Raises:
        EvaluationError: samples < 1, or level is not between 0 and 1.
    """
    drawn = torch.cat([run.metrics(counts) for counts in _draws(len(run.captions), samples, level, seed)])  # (S, 7)
    return dict(zip(METRICS, _bounds(drawn, level), strict=True))


def paired_bootstrap(
    first: Clusters, second: Clusters, *, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """Difference of two runs on the same split, in every recall and in rSum: both see the same samples.

    Args:
        first: the run that is compared with.
        second: the run that may be better.
        samples: number of bootstrap samples; no p value is below 2 / (samples + 1).
        level: share of samples inside the interval.
        seed: same seed, same samples.

    Raises:
        EvaluationError: the runs were not measured on the same images and captions, samples < 1, or level is not
            between 0 and 1.
    """
    if not first.captions.equal(second.captions):
        raise EvaluationError(
            f"paired bootstrap: expected two runs on the same split, found {len(first.captions)} images with "
            f"{int(first.captions.sum())} captions and {len(second.captions)} with {int(second.captions.sum())}, "
            "or the same in another order"
        )
    whole = torch.ones_like(first.captions)[None]
    values = (second.metrics(whole) - first.metrics(whole))[0]  # (7,)
    drawn = torch.cat(
        [second.metrics(counts) - first.metrics(counts) for counts in _draws(len(first.captions), samples, level, seed)]
    )  # (S, 7)
    tail = torch.minimum((drawn <= 0).sum(dim=0), (drawn >= 0).sum(dim=0))  # (7,)
    ps = (2 * (tail + 1) / (samples + 1)).clamp(max=1)
    return {
        name: Difference(value, interval, p)
        for name, value, interval, p in zip(METRICS, values.tolist(), _bounds(drawn, level), ps.tolist(), strict=True)
    }


def _draws(images: int, samples: int, level: float, seed: int) -> Iterator[Tensor]:
    """How often each of N images is in each sample, (some, N) float64, a chunk of samples at a time."""
    if samples < 1 or not 0 < level < 1:
        raise EvaluationError(
            f"bootstrap: expected at least one sample and a level between 0 and 1, "
            f"found {samples} samples, level {level}"
        )
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, samples, CHUNK):
        some = min(CHUNK, samples - first)
        drawn = torch.randint(images, (some, images), generator=generator)
        drawn += torch.arange(some)[:, None] * images
        yield drawn.flatten().bincount(minlength=some * images).view(some, images).double()


def _bounds(drawn: Tensor, level: float) -> list[Interval]:
    """Percentile intervals of the columns of (S, K)."""
    tails = drawn.new_tensor([(1 - level) / 2, (1 + level) / 2])
    return [Interval(low, high) for low, high in drawn.quantile(tails, dim=0).T.tolist()]
