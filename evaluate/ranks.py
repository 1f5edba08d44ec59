"""Ranks without sorting: for every query, the rank of each item that is relevant to it.

The score is always -d² (squared L2 distance), so smaller distances rank higher. Sorting M items to find the
places of five is wasteful: a place is one plus the number of items in front, and counting those takes one
comparison an item (docs/methods.md, "Evaluation").

Legend: Q queries, M items, P relevant pairs, E embedding dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE = 0.01
"""When float32 leaves more than this share of a tile undecided, the tile is computed again as one float64 product;
else each undecided pair on its own."""
CHUNK = 64
"""Rows that are shifted, or pairs that are measured, at once."""
PANEL = 512
"""Queries compared at once where a tile has more: so many and 1024 items keep close to the cache."""


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

    def turned(self, items: int) -> "Relevance":
        """Which queries are relevant to which item: items look for queries.

        Args:
            items: number of items.

        Raises:
            EvaluationError: an item is relevant to no query.
        """
        counts = torch.bincount(self.indices, minlength=items)  # (items,)
        if (empty := (counts == 0).nonzero()).numel():
            raise EvaluationError(
                f"item row {empty[0].item()} is relevant to no query ({len(empty)} such items); leave these items out"
            )
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Relevance(indptr, self.rows()[self.indices.argsort(stable=True)])

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
    if all(end.isfinite() for end in embeddings.aminmax()):
        return
    bad = (~embeddings.isfinite().all(dim=1)).nonzero()
    raise EvaluationError(
        f"{name} row {bad[0].item()} holds NaN or infinity ({len(bad)} of {len(embeddings)} rows do); "
        "such a row has no rank: look for a diverged training run or damaged features"
    )


def rank_relevant(queries: Tensor, items: Tensor, relevance: Relevance, tile: int = 1024) -> Ranks:
    """Ranks every relevant item of every query by squared L2 distance, without sorting the items.

    Definition: distances are those of float64, whatever the dtype given. Their rounding depends on the order of the
    operations, so two distances of a query count as a tie when they differ by at most

        (E + 8) · eps · (|q - c| + max|x - c|)²,    eps = 2⁻⁵²,

    twice the worst-case rounding error of one distance (Higham 2002, section 3.1), with c midway between the mean
    query and the mean item (a common offset changes no distance, only the cancellation in it). For unit vectors
    with E = 512 this is 5e-13: far below the resolution of float32 embeddings, more than a tile's edge can change.
    Equal items therefore always tie, at every tile size and on every device with float64 (CPU, CUDA).

    Arithmetic: a float32 matrix product is compared with each threshold, less and plus its own worst-case error (the
    same formula with 2⁻²⁴). Pairs between the two, about one in a thousand for a model that knows nothing
    and fewer for a better one, are computed again in float64. So float32 changes the speed, never a rank.

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
    return _rank(queries, items, relevance, tile, both=False)[0]


def rank_both(queries: Tensor, items: Tensor, relevance: Relevance, tile: int = 1024) -> tuple[Ranks, Ranks]:
    """Ranks both directions on the same distances, each computed once: queries look for items, items for queries.

    The same as `rank_relevant(queries, items, relevance)` and, for the second,
    `rank_relevant(items, queries, relevance.turned(len(items)))`, in little more time than the first alone.

    Args:
        queries: (Q, E) embeddings.
        items: (M, E) embeddings on the same device.
        relevance: relevant item rows of every query; every item is relevant to some query.
        tile: queries and items that are compared at once.

    Raises:
        EvaluationError: as `rank_relevant`, or an item is relevant to no query.
    """
    there, back = _rank(queries, items, relevance, tile, both=True)
    return there, back


@torch.no_grad()
def _rank(queries: Tensor, items: Tensor, relevance: Relevance, tile: int, *, both: bool) -> list[Ranks]:
    """Ranks of one direction or both."""
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

    device = queries.device
    relevance = Relevance(relevance.indptr.to(device), relevance.indices.to(device))
    rows, columns = relevance.rows(), relevance.indices  # (P,), (P,)
    frame = _Frame.around(queries, items)
    asking, asked = frame.place(queries), frame.place(items)
    distances = frame.distances(asking, asked, rows, columns)  # (P,)
    sides = [_Side(frame, asking, asked, relevance, distances)]
    if both:
        turned = relevance.turned(len(items))
        sides.append(_Side(frame, asked, asking, turned, distances[columns.argsort(stable=True)]))

    panels, tiles = _slices(len(queries), min(tile, PANEL)), _slices(len(items), tile)
    scores = torch.empty(panels[0].stop * tiles[0].stop, device=device)
    mask = torch.empty_like(scores)
    rights = [frame.right(asked, across) for across in tiles]
    with _full_precision():
        for down in panels:
            left = frame.left(asking, down)  # (q, E + 2)
            own = slice(int(relevance.indptr[down.start]), int(relevance.indptr[down.stop]))
            for across, right in zip(tiles, rights, strict=True):
                shape = (len(left), len(right))
                found = torch.mm(left, right.T, out=scores[: shape[0] * shape[1]].view(shape))  # (q, m) d² / scale²
                inside = ((columns[own] >= across.start) & (columns[own] < across.stop)).nonzero()[:, 0] + own.start
                # Only non-relevant items are counted.
                found[rows[inside] - down.start, columns[inside] - across.start] = torch.inf
                counted = mask[: shape[0] * shape[1]].view(shape)
                sides[0].count(found, counted, down, across)
                if both:
                    sides[1].count(found.T, counted.T, across, down)
    return [side.ranks() for side in sides]


def _slices(rows: int, size: int) -> list[slice]:
    """Rows, so many at a time."""
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products as exact as their error bound supposes, whatever a training loop has set (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, eq=False)
class _Points:
    """One side's n embeddings.

    Attributes:
        given: (n, E) as they came.
        rough: (n, E) float32, shifted and scaled.
        norms: (n,) float64, lengths from the centre.
    """

    given: Tensor
    rough: Tensor
    norms: Tensor


@dataclass(frozen=True, eq=False)
class _Frame:
    """Where and in which unit distances are computed.

    Attributes:
        centre: (E,) float64.
        scale: unit of float32 coordinates, so that no product overflows or vanishes.
    """

    centre: Tensor
    scale: float

    @classmethod
    def around(cls, queries: Tensor, items: Tensor) -> "_Frame":
        """Midway between the means; no coordinate is larger than 1."""
        means, largest = [], 0.0
        for side in (queries, items):
            total = side.new_zeros(side.shape[1], dtype=torch.float64)
            for some in _slices(len(side), CHUNK):
                total += side[some].double().sum(dim=0)
            means.append(total / len(side))
            largest = max(largest, *(abs(end.item()) for end in side.aminmax()))
        centre = (means[0] + means[1]) / 2
        return cls(centre, largest + centre.abs().max().item() or 1.0)

    def place(self, given: Tensor) -> _Points:
        """Shifts and scales embeddings (n, E)."""
        rough = torch.empty(given.shape, device=given.device)
        norms = rough.new_empty(len(given), dtype=torch.float64)
        for some in _slices(len(given), CHUNK):
            shifted = given[some].double() - self.centre
            norms[some] = shifted.square().sum(dim=1).sqrt()
            rough[some] = shifted.div_(self.scale)
        return _Points(given, rough, norms)

    def left(self, asking: _Points, down: slice) -> Tensor:
        """Left factor (q, E + 2) of float32 d² / scale²: |q|² + |x|² - 2 q·x is (-2 q, |q|², 1) · (x, 1, |x|²)."""
        squares = (asking.norms[down, None] / self.scale).square().float()  # (q, 1)
        return torch.cat([-2 * asking.rough[down], squares, torch.ones_like(squares)], dim=1)

    def right(self, asked: _Points, across: slice) -> Tensor:
        """Right factor (m, E + 2), to be transposed."""
        squares = (asked.norms[across, None] / self.scale).square().float()  # (m, 1)
        return torch.cat([asked.rough[across], torch.ones_like(squares), squares], dim=1)

    def products(self, asking: _Points, asked: _Points, down: slice, across: slice) -> Tensor:
        """Float64 d² of a tile, (q, m), by a matrix product."""
        squares = asking.norms[down, None].square() + asked.norms[across].square()
        left, right = asking.given[down].double() - self.centre, asked.given[across].double() - self.centre
        return torch.addmm(squares, left, right.T, alpha=-2)

    def distances(self, asking: _Points, asked: _Points, rows: Tensor, columns: Tensor) -> Tensor:
        """Float64 d² of pairs, (pairs,), from differences."""
        parts = [
            (asking.given[rows[some]].double() - asked.given[columns[some]]).square_().sum(dim=1)
            for some in _slices(len(rows), CHUNK)
        ]
        return torch.cat(parts)


class _Side:
    """One direction: counts, tile by tile, the non-relevant items in front of each relevant one.

    r is the largest number of relevant items that a query has; a query's are kept nearest first.
    """

    def __init__(self, frame: _Frame, asking: _Points, asked: _Points, relevance: Relevance, distances: Tensor) -> None:
        self._frame, self._asking, self._asked, self._indptr = frame, asking, asked, relevance.indptr
        counts, rows = relevance.counts(), relevance.rows()
        slots = torch.arange(len(rows), device=rows.device) - relevance.indptr[rows]  # (P,) place within the set
        sets = distances.new_full((len(counts), int(counts.max())), torch.inf)  # (Q, r)
        sets[rows, slots] = distances
        self._sets, order = sets.sort(dim=1)
        self._pairs = order.argsort(dim=1)[rows, slots], rows  # where each relevant pair stands in (r, Q)

        dimensions = asking.given.shape[1]
        single, double = torch.finfo(torch.float32), torch.finfo(torch.float64)
        reach = (dimensions + 8) * (asking.norms + asked.norms.max()).square()[:, None]  # (Q, 1)
        lower, upper = self._sets - double.eps * reach, self._sets + double.eps * reach
        # Rounded operands and thresholds included; the last factor is for the terms of second order.
        slack = single.eps / 2 * reach * (1 + (dimensions + 8) * single.eps) + single.tiny * dimensions * frame.scale**2
        self._nearer = torch.searchsorted(self._sets, lower).T  # (r, Q) relevant ones that are strictly better
        self._lower, self._upper = lower.T.contiguous(), upper.T.contiguous()  # (r, Q)

        def rough(limits: Tensor) -> Tensor:
            absent = self._sets.isposinf()
            return (limits / frame.scale**2).masked_fill(absent, -torch.inf).float().T.contiguous()[:, :, None]

        self._sure, self._possible = rough(lower - slack), rough(upper + slack)  # (r, Q, 1)
        self._ahead = torch.zeros_like(self._upper)  # (r, Q) non-relevant items that are better or tied
        self._better = self._ahead.new_zeros(len(counts))  # (Q,) those strictly better than the best relevant one

    def count(self, scores: Tensor, mask: Tensor, down: slice, across: slice) -> None:
        """Takes a tile into account.

        Args:
            scores: (q, m) float32 d² / scale², infinite for relevant pairs.
            mask: (q, m) float32 to write into: comparisons that answer in floats are several times as fast.
            down: the q queries.
            across: the m items.
        """
        sure, possible = self._sure[:, down], self._possible[:, down]  # (r, q, 1)
        below, within = (scores.new_empty(sure.shape[:2]) for _ in range(2))  # (r, q)
        for slot in range(len(sure)):
            torch.sum(torch.lt(scores, sure[slot], out=mask), dim=1, out=below[slot])
            torch.sum(torch.le(scores, possible[slot], out=mask), dim=1, out=within[slot])
        self._ahead[:, down] += below
        self._better[down] += below[0]
        exact: Tensor | None = None
        open_slots, open_rows = (below != within).nonzero(as_tuple=True)  # lists with undecided items
        for part in _slices(len(open_rows), len(scores)):
            slots, rows = open_slots[part], open_rows[part]  # (f,), (f,)
            some = scores[rows]
            undecided = (some >= sure[slots, rows]) & (some <= possible[slots, rows])  # (f, m)
            listed, columns = undecided.nonzero(as_tuple=True)  # (c,), (c,)
            slots, rows = slots[listed], rows[listed]
            if len(rows) > DENSE * scores.numel():
                if exact is None:
                    exact = self._frame.products(self._asking, self._asked, down, across)
                distances = exact[rows, columns]
            else:
                distances = self._frame.distances(self._asking, self._asked, rows + down.start, columns + across.start)
            rows = rows + down.start
            tied = (distances <= self._upper[slots, rows]).double()
            self._ahead.index_put_((slots, rows), tied, accumulate=True)
            better = (distances < self._lower[0, rows]) & (slots == 0)
            self._better.index_add_(0, rows, better.double())

    def ranks(self) -> Ranks:
        """The ranks after every tile has been counted."""
        values = 1 + self._ahead.long() + self._nearer  # (r, Q)
        others = (len(self._asked.given) - self._indptr.diff()).clamp(min=1)  # without others there are no ties
        return Ranks(self._indptr, values[self._pairs], (self._ahead[0] - self._better) / others)
