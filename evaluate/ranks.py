"""Ranks without sorting: for every query, the rank of each item that is relevant to it.

The score is always -d² (squared L2 distance), so smaller distances rank higher. Sorting M items to find the
places of five is wasteful: a place is one plus the number of items in front, and counting those takes one
comparison an item (METHODS, "Evaluation").

Legend: Q queries, M items, P relevant pairs, E embedding dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 0.05
"""When fewer items of a tile than this share can matter, they are picked out instead of compared once a rank."""


class EvaluationError(ValueError):
    """Embeddings or relevance that cannot be measured; the message names the row and says what to do."""


@dataclass(frozen=True)
class Relevance:
    """Which items are relevant to which query, as compressed sparse rows (CSR).

    Query q's items are `indices[indptr[q] : indptr[q + 1]]`: at least one, none twice.

    Attributes:
        indptr: (Q + 1,) int64, where each query's items begin and end.
        indices: (P,) int64 item rows.

    Raises:
        EvaluationError: the two arrays do not describe such sets.
    """

    indptr: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        for name, array in (("indptr", self.indptr), ("indices", self.indices)):
            if array.ndim != 1 or array.dtype != torch.int64:
                raise EvaluationError(
                    f"relevance {name}: expected a one-dimensional int64 tensor, "
                    f"found {array.dtype} of shape {tuple(array.shape)}"
                )
        if len(self.indptr) < 2 or self.indptr[0] != 0 or self.indptr[-1] != len(self.indices):
            raise EvaluationError(
                f"relevance indptr: expected one more entry than queries, from 0 to {len(self.indices)} "
                f"(the number of indices), found {self.indptr.tolist()[:8]}"
            )
        if (empty := (self.indptr.diff() < 1).nonzero()).numel():
            raise EvaluationError(
                f"query row {empty[0].item()} has no relevant item ({len(empty)} such queries); leave these queries out"
            )
        if self.indices.min() < 0:
            raise EvaluationError(f"relevance indices: item rows start at 0, found {self.indices.min().item()}")
        key = self.rows() * (self.indices.max() + 1) + self.indices
        key, order = key.sort()
        if (twice := (key.diff() == 0).nonzero()).numel():
            pair = order[twice[0]]
            raise EvaluationError(
                f"query row {self.rows()[pair].item()} lists item {self.indices[pair].item()} twice; "
                "name each relevant item once"
            )

    @classmethod
    def text_to_image(cls, caption_image: Tensor) -> "Relevance":
        """Captions look for their image.

        Args:
            caption_image: (captions,) int64, row of the image that each caption belongs to.
        """
        return cls(torch.arange(len(caption_image) + 1, device=caption_image.device), caption_image)

    @classmethod
    def image_to_text(cls, caption_image: Tensor, images: int) -> "Relevance":
        """Images look for their captions, however many each has.

        Args:
            caption_image: (captions,) int64, row of the image that each caption belongs to, in any order.
            images: number of images.

        Raises:
            EvaluationError: an image has no caption, or a caption names an image that is not there.
        """
        outside = ((caption_image < 0) | (caption_image >= images)).nonzero()
        if outside.numel():
            row = outside[0].item()
            raise EvaluationError(
                f"caption row {row} belongs to image row {caption_image[int(row)].item()}, "
                f"expected 0 to {images - 1} ({images} images)"
            )
        counts = torch.bincount(caption_image, minlength=images)  # (images,)
        if (empty := (counts == 0).nonzero()).numel():
            raise EvaluationError(
                f"image row {empty[0].item()} has no caption ({len(empty)} such images); leave these images out"
            )
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(indptr, caption_image.argsort(stable=True))

    def counts(self) -> Tensor:
        """Relevant items of each query, (Q,) int64."""
        return self.indptr.diff()

    def rows(self) -> Tensor:
        """Query row of each relevant pair, (P,) int64."""
        return torch.repeat_interleave(self.counts())


@dataclass(frozen=True)
class Ranks:
    """The rank of every relevant item, in the order of the relevance sets.

    Attributes:
        indptr: (Q + 1,) int64, where each query's ranks begin and end.
        values: (P,) int64 ranks, 1 is first. A rank is one plus the number of non-relevant items that are
            better *or tied* (pessimistic) plus the number of the query's other relevant items that are
            strictly better: relevant items never push each other down by a tie.
        tied: (Q,) float64, 0 to 1: share of a query's non-relevant items that tie with its best relevant one.
    """

    indptr: Tensor
    values: Tensor
    tied: Tensor

    def best(self) -> Tensor:
        """Rank of each query's best relevant item, (Q,) int64.

        No relevant item is strictly better than the best one, so this is one plus the number of non-relevant
        items that are better or tied: "i2t takes the best-ranked of the image's captions".
        """
        counts = self.indptr.diff()
        best = self.values.new_full((len(counts),), torch.iinfo(torch.int64).max)
        return best.scatter_reduce(0, torch.repeat_interleave(counts), self.values, "amin")


def check_embeddings(name: str, embeddings: Tensor) -> None:
    """Refuses what cannot be ranked.

    Args:
        name: what the rows are, for the message ("images").
        embeddings: should be (rows, E), finite.

    Raises:
        EvaluationError: not a matrix with at least one row, or NaN or infinity in a row, which is named.
    """
    if embeddings.ndim != 2 or not embeddings.shape[0] or not embeddings.is_floating_point():
        raise EvaluationError(
            f"{name}: expected a floating-point matrix (rows, dimensions) with at least one row, "
            f"found {embeddings.dtype} of shape {tuple(embeddings.shape)}"
        )
    bad = (~embeddings.isfinite().all(dim=1)).nonzero()
    if bad.numel():
        raise EvaluationError(
            f"{name} row {bad[0].item()} holds NaN or infinity ({len(bad)} of {len(embeddings)} rows do); "
            "such a row has no rank: look for a diverged training run or damaged features"
        )


@torch.no_grad()
def rank_relevant(queries: Tensor, items: Tensor, relevance: Relevance, tile: int = 1024) -> Ranks:
    """Ranks every relevant item of every query by squared L2 distance, without sorting the items.

    Arithmetic: everything is shifted by the mean item (which changes no distance, only the cancellation in
    it) and computed in float64, whatever the dtype given. Matrix products may round a pair differently at the
    edge of a tile than inside it, so two distances are a tie when they differ by at most

        (E + 8) · eps · (|q| + max|x|)²,    eps = 2⁻⁵²,

    twice the worst-case rounding error of one distance (Higham 2002, section 3.1). For unit vectors with
    E = 512 this is 5e-13: far below the resolution of float32 embeddings, more than a tile's edge can change.
    Equal items therefore always tie, at every tile size and on every device with float64 (CPU, CUDA).

    Memory: O(tile²) for scores, O((Q + M) · E) for the shifted copies, never O(Q · M).

    Args:
        queries: (Q, E) embeddings.
        items: (M, E) embeddings on the same device.
        relevance: relevant item rows of every query.
        tile: queries and items that are compared at once.

    Returns:
        The rank of each of the P relevant pairs.

    Raises:
        EvaluationError: shapes do not agree, an embedding is not finite, a relevant item is not there, or
            tile < 1.
    """
    check_embeddings("queries", queries)
    check_embeddings("items", items)
    if queries.shape[1] != items.shape[1]:
        raise EvaluationError(f"queries have {queries.shape[1]} dimensions, items {items.shape[1]}; expected as many")
    if len(relevance.indptr) != len(queries) + 1:
        raise EvaluationError(f"relevance describes {len(relevance.indptr) - 1} queries, found {len(queries)}")
    if relevance.indices.max() >= len(items):
        pair = relevance.indices.argmax()
        raise EvaluationError(
            f"query row {relevance.rows()[pair].item()} has relevant item {relevance.indices[pair].item()}, "
            f"but there are only {len(items)} items"
        )
    if tile < 1:
        raise EvaluationError(f"tile: expected at least 1, found {tile}")

    indptr, indices = relevance.indptr.to(queries.device), relevance.indices.to(queries.device)
    centre = items.double().mean(dim=0)  # (E,)
    shifted = items.double() - centre  # (M, E)
    squared = shifted.square().sum(dim=1)  # (M,)
    values, tied = [], []
    for first in range(0, len(queries), tile):
        part = indptr[first : first + tile + 1]
        of_tile, ties = _rank_tile(
            queries[first : first + tile].double() - centre,
            shifted,
            squared,
            indptr=part - part[0],
            columns=indices[part[0] : part[-1]],
            tile=tile,
        )
        values.append(of_tile)
        tied.append(ties)
    return Ranks(indptr, torch.cat(values), torch.cat(tied))


def _rank_tile(
    queries: Tensor, items: Tensor, squared: Tensor, *, indptr: Tensor, columns: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """Ranks (p,) and tie shares (q,) of one tile of queries, p relevant pairs, at most r for one query.

    Distances are kept as d² - |q|², which orders the items of a query just as well.

    Args:
        queries: (q, E) float64.
        items: (M, E) float64.
        squared: (M,) squared norms of the items.
        indptr: (q + 1,) from 0 to p.
        columns: (p,) item rows of the relevant pairs.
        tile: items that are compared at once.
    """
    counts = indptr.diff()
    rows = torch.repeat_interleave(counts)  # (p,)
    slots = torch.arange(len(rows), device=rows.device) - indptr[rows]  # (p,) place within the query's set
    norms = queries.square().sum(dim=1)  # (q,)
    eps = torch.finfo(torch.float64).eps
    tolerance = (items.shape[1] + 8) * eps * (norms.sqrt() + squared.max().sqrt()).square()

    distances = torch.cat(
        [
            (queries[rows[pair : pair + tile]] - items[columns[pair : pair + tile]]).square().sum(dim=1)
            for pair in range(0, len(rows), tile)
        ]
    )  # (p,)
    sets = queries.new_full((len(queries), int(counts.max())), torch.inf)
    sets[rows, slots] = distances - norms[rows]  # (q, r); inf where a query has fewer
    lower = sets - tolerance[:, None]
    upper = sets + tolerance[:, None]

    loosest = upper.masked_fill(upper.isposinf(), -torch.inf).amax(dim=1, keepdim=True)  # (q, 1)
    strictest = lower.amin(dim=1, keepdim=True)  # (q, 1)

    ahead = torch.zeros_like(sets, dtype=torch.int64)  # (q, r) non-relevant items better or tied
    better = ahead.new_zeros(len(queries))  # (q,) those strictly better than the best relevant one
    for first in range(0, len(items), tile):
        block = items[first : first + tile]
        scores = torch.addmm(squared[first : first + tile], queries, block.T, alpha=-2)  # (q, tile) d² - |q|²
        inside = (columns >= first) & (columns < first + tile)
        scores[rows[inside], columns[inside] - first] = torch.inf  # only non-relevant items are counted
        close = scores <= loosest  # the only items that can count
        survivors = int(_count(close).sum())
        if survivors > FEW * close.numel():  # a model that knows little: compare everything
            better += _count(scores < strictest)
            for slot in range(sets.shape[1]):
                ahead[:, slot] += _count(scores <= upper[:, slot, None])
        elif survivors:
            query, item = close.nonzero(as_tuple=True)
            found = scores[query, item]  # (s,)
            better += query[found < strictest[query, 0]].bincount(minlength=len(queries))
            for slot in range(sets.shape[1]):
                ahead[:, slot] += query[found <= upper[query, slot]].bincount(minlength=len(queries))

    relevant_better = torch.searchsorted(sets.sort(dim=1).values, lower)  # (q, r) values below `lower`
    ranks = 1 + ahead + relevant_better
    others = (len(items) - counts).clamp(min=1)  # (q,) a query without non-relevant items has no ties either
    tied = ahead.gather(1, sets.argmin(dim=1, keepdim=True))[:, 0] - better
    return ranks[rows, slots], tied / others.double()


def _count(mask: Tensor) -> Tensor:
    """How many are true in each row: (q, n) bool -> (q,) int64.

    Where rows allow it, eight neighbours are added as the eight bytes of one word (none reaches 256), which takes
    half the time of `sum` (benchmarks/bench_ranks.py).
    """
    rows, columns = mask.shape
    if columns % 8 or columns > 8 * 255:
        return mask.sum(dim=1)
    bytes_ = mask.view(torch.int64).sum(dim=1).view(torch.uint8)
    return bytes_.view(rows, 8).sum(dim=1, dtype=torch.int64)
