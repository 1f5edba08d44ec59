"""From ranks to numbers: recall, median and mean rank, mAP@R, R-Precision, rSum, and how they are shown.

Recalls, mAP@R and R-Precision are percentages (100 is best), ranks count from 1, and every metric is taken
over queries.

Example: two queries, four items, ranks of the relevant ones {1, 3} and {2}. The best ranks are 1 and 2, so
R@1 = 50, R@5 = 100 and medR = 1.5. The first query has R = 2 relevant items, one of them among its first two:
R-Precision 1/2, mAP@R (1/1)/2 = 1/2. The second has R = 1 and misses at rank one: 0. Both means are 25.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from evaluate.ranks import Ranks

CUTS = (1, 5, 10)
"""The k of R@k."""
COLLAPSE_SHARE = 0.1
"""More ties than this share of the non-relevant items mean a collapsed model; a sound one has none."""


class CollapseWarning(UserWarning):
    """Many non-relevant items score exactly as the relevant ones do: the embeddings carry no information."""


@dataclass(frozen=True)
class Metrics:
    """How well one direction retrieves.

    Attributes:
        r1: R@1, percent of queries with a relevant item at rank 1; `r5` and `r10` alike.
        medr: median over queries of the best rank; the mean of the middle two when their number is even.
        meanr: mean of the best rank.
        map_r: mAP@R, percent: mean over queries of 1/R · sum of precision@k over the relevant ranks k ≤ R,
            with R the number of relevant items (Musgrave et al., ECCV 2020, section 3.2).
        r_precision: R-Precision, percent: share of relevant items among the first R (same source).
    """

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float
    map_r: float
    r_precision: float


@dataclass(frozen=True)
class Report:
    """Both directions of one split under one protocol.

    Attributes:
        split: name of the split ("val", "test").
        protocol: how it was measured ("full", "coco_5k", "coco_1k").
        i2t: images look for captions.
        t2i: captions look for images.
        folds_1k: for COCO, the mean of the five 1K folds.
        ranks: of both directions, for intervals; not part of what is stored.
    """

    split: str
    protocol: str
    i2t: Metrics
    t2i: Metrics
    folds_1k: "Report | None" = None
    ranks: tuple[Ranks, ...] = field(default=(), compare=False, repr=False)

    @property
    def rsum(self) -> float:
        """Sum of the six recalls, at most 600."""
        return sum(m.r1 + m.r5 + m.r10 for m in (self.i2t, self.t2i))

    def as_dict(self) -> dict[str, Any]:
        """Nested, for JSON: split, protocol, i2t, t2i, rsum, and folds_1k where there are folds."""
        nested = {
            "split": self.split,
            "protocol": self.protocol,
            "i2t": asdict(self.i2t),
            "t2i": asdict(self.t2i),
            "rsum": self.rsum,
        }
        return nested if self.folds_1k is None else nested | {"folds_1k": self.folds_1k.as_dict()}

    def as_flat(self) -> dict[str, float]:
        """Numbers only, for a tracker: "i2t/r1", ..., "rsum"; those of folds begin with "folds_1k/"."""
        flat = {f"i2t/{name}": value for name, value in asdict(self.i2t).items()}
        flat |= {f"t2i/{name}": value for name, value in asdict(self.t2i).items()}
        flat["rsum"] = self.rsum
        if self.folds_1k is not None:
            flat |= {f"folds_1k/{name}": value for name, value in self.folds_1k.as_flat().items()}
        return flat

    def as_table(self) -> str:
        """Text for the terminal, a row for each direction."""
        lines = [
            f"{self.split}, {self.protocol}: rSum {self.rsum:.1f}",
            f"{'':15}" + "".join(f"{name:>8}" for name in METRIC_NAMES.values()),
        ]
        for direction, metrics in (("image to text", self.i2t), ("text to image", self.t2i)):
            lines.append(f"{direction:15}" + "".join(f"{value:8.1f}" for value in asdict(metrics).values()))
        if self.folds_1k is not None:
            lines += ["", self.folds_1k.as_table()]
        return "\n".join(lines)


METRIC_NAMES = {
    "r1": "R@1",
    "r5": "R@5",
    "r10": "R@10",
    "medr": "medR",
    "meanr": "meanR",
    "map_r": "mAP@R",
    "r_precision": "R-P",
}
"""How each field of `Metrics` is written in tables."""


def measure(ranks: Ranks) -> Metrics:
    """Computes every metric of one direction.

    Warns:
        CollapseWarning: relevant items tie with more than a tenth of the non-relevant ones.
    """
    share = ranks.tied.mean().item()
    if share > COLLAPSE_SHARE:
        warnings.warn(
            f"a relevant item ties with {share:.0%} of the non-relevant ones on average (expected: none): "
            "the model has collapsed, its embeddings are (nearly) all the same; lower the learning rate or "
            "the margin, or start with all negatives before the hardest",
            CollapseWarning,
            stacklevel=2,
        )
    best = ranks.best().double()  # (Q,)
    r1, r5, r10 = (100 * hits(ranks).mean(dim=0)).tolist()
    positions = _positions(ranks)  # (P,) ascending within each query
    counts = ranks.indptr.diff()  # (Q,) R of each query
    rows = torch.repeat_interleave(counts)  # (P,)
    nth = torch.arange(len(rows), device=rows.device) - ranks.indptr[rows] + 1  # (P,) relevant items up to here
    hit = (positions <= counts[rows]).double()  # (P,)
    zeros = torch.zeros(len(counts), dtype=torch.float64, device=rows.device)
    precision = zeros.index_add(0, rows, hit * nth / positions) / counts  # (Q,)
    found = zeros.index_add(0, rows, hit) / counts  # (Q,)
    return Metrics(
        r1=r1,
        r5=r5,
        r10=r10,
        medr=best.quantile(0.5).item(),
        meanr=best.mean().item(),
        map_r=_percent(precision),
        r_precision=_percent(found),
    )


def hits(ranks: Ranks) -> Tensor:
    """Whether each query has a relevant item within each of `CUTS`, (Q, 3) float64 of zeros and ones."""
    best = ranks.best()
    return (best[:, None] <= best.new_tensor(CUTS)).double()


def mean_metrics(several: Sequence[Metrics]) -> Metrics:
    """Mean of every metric over folds."""
    return Metrics(
        **{
            field.name: sum(getattr(metrics, field.name) for metrics in several) / len(several)
            for field in fields(Metrics)
        }
    )


def _percent(shares: Tensor) -> float:
    """Mean over queries, times 100."""
    return 100 * shares.double().mean().item()


def _positions(ranks: Ranks) -> Tensor:
    """Distinct places (P,) of the relevant items in the list, ascending within each query.

    Relevant items that tie share a rank; in the list they follow one another, in whichever order.
    """
    rows = torch.repeat_interleave(ranks.indptr.diff())
    span = ranks.values.max() + 1
    key = (rows * span + ranks.values).sort().values
    index = torch.arange(len(key), device=key.device)
    begins = torch.cat([key.new_ones(1), (key.diff() != 0).long()])  # 1 where a group of equal ranks begins
    return key % span + index - (index * begins).cummax(0).values
