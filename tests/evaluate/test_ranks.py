"""Ranks: hand-written cases, a slow reference that sorts, ties that survive any tile, errors that name the row."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch.overrides import TorchFunctionMode

from benchmarks.bench_ranks import measure
from evaluate.metrics import CollapseWarning
from evaluate.protocols import evaluate_full
from evaluate.ranks import EvaluationError, Ranks, Relevance, rank_both, rank_relevant


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def relevance_of(*sets):
    """Relevance from one list of item rows for each query."""
    lengths = torch.tensor([0, *map(len, sets)])
    return Relevance(lengths.cumsum(0), torch.tensor([item for one in sets for item in one]))


def slow_ranks(queries, items, sets):
    """Sorts every list with explicit pessimistic ties, in Python, one query at a time.

    Returns:
        For each query: the ranks of its relevant items, and the share of the others that tie with the best.
    """
    ranks, shares = [], []
    for query, relevant in zip(queries.tolist(), sets, strict=True):
        distance = [math.fsum((a - b) ** 2 for a, b in zip(query, item, strict=True)) for item in items.tolist()]
        # The relevant items come last among equals.
        order = sorted(range(len(distance)), key=lambda item: (distance[item], item in relevant))
        of_query = []
        for item in relevant:
            equals = [other for other in relevant if distance[other] == distance[item]]
            of_query.append(1 + min(order.index(other) for other in equals))
        ranks.append(of_query)
        best = min(distance[item] for item in relevant)
        others = [distance[item] for item in range(len(distance)) if item not in relevant]
        shares.append(others.count(best) / len(others) if others else 0.0)
    return ranks, shares


def as_lists(ranks):
    bounds = ranks.indptr.tolist()
    return [ranks.values[a:b].tolist() for a, b in pairwise(bounds)]


@pytest.mark.parametrize("tile", [1, 2, 3, 1024])
def test_two_queries_and_four_items_by_hand(tile):
    # d² of query 0: 1 1 4 9; of query 1 (at 3): 4 16 1 0.
    ranks = rank_relevant(column(0, 3), column(1, -1, 2, 3), relevance_of([0, 2], [1]), tile)
    # Item 0 ties with item 1, which is not relevant: rank 2. Item 2 has items 0 and 1 in front: rank 3.
    assert as_lists(ranks) == [[2, 3], [4]]
    assert ranks.best().tolist() == [2, 4]
    assert ranks.tied.tolist() == [0.5, 0.0]


def test_relevant_items_do_not_push_each_other_down_by_a_tie():
    # d² = 1 1 1 4: items 0 and 1 are relevant, item 2 is not.
    ranks = rank_relevant(column(0), column(1, -1, 1, 2), relevance_of([0, 1]))
    assert as_lists(ranks) == [[2, 2]]


def test_other_relevant_items_count_when_strictly_better():
    ranks = rank_relevant(column(0), column(3, 1, 2), relevance_of([0, 1, 2]))
    assert as_lists(ranks) == [[3, 1, 2]]
    assert ranks.tied.tolist() == [0.0]


@st.composite
def problems(draw):
    """Embeddings on a small lattice, so that ties are many and exact; ragged sets; any tile."""
    dimensions = draw(st.integers(1, 3))
    number_of_items = draw(st.integers(1, 9))
    point = st.lists(st.integers(-2, 2), min_size=dimensions, max_size=dimensions)
    items = draw(st.lists(point, min_size=number_of_items, max_size=number_of_items))
    queries = draw(st.lists(point, min_size=1, max_size=6))
    rows = st.lists(st.integers(0, number_of_items - 1), min_size=1, unique=True)
    sets = [draw(rows) for _ in queries]
    return (
        torch.tensor(queries, dtype=torch.float32),
        torch.tensor(items, dtype=torch.float32),
        sets,
        draw(st.integers(1, 10)),
    )


@settings(deadline=None, max_examples=100)
@given(problems())
def test_equals_the_slow_reference(problem):
    queries, items, sets, tile = problem
    ranks = rank_relevant(queries, items, relevance_of(*sets), tile)
    expected, shares = slow_ranks(queries, items, sets)
    assert as_lists(ranks) == expected
    assert ranks.best().tolist() == [min(of_query) for of_query in expected]
    assert ranks.tied.tolist() == pytest.approx(shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_sorting_scipys_distances(dtype):
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(37, 24, generator=generator).to(dtype)
    items = torch.randn(101, 24, generator=generator).to(dtype)
    relevant = torch.randint(101, (37,), generator=generator)
    found = rank_relevant(queries, items, Relevance.text_to_image(relevant), tile=16).values
    order = cdist(queries.double().numpy(), items.double().numpy(), "sqeuclidean").argsort(axis=1)
    places = [row.tolist().index(item) + 1 for row, item in zip(order, relevant.tolist(), strict=True)]
    assert found.tolist() == places


@pytest.mark.parametrize("dense", [0.0, 0.01, 1.0])
def test_undecided_pairs_one_by_one_or_as_one_product(monkeypatch, dense):
    """Whole numbers, so that many items tie; sets of one to three; 0 is always the product, 1 never."""
    monkeypatch.setattr("evaluate.ranks.DENSE", dense)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(-2, 3, (30, 3), generator=generator).float()
    items = torch.randint(-2, 3, (50, 3), generator=generator).float()
    sets = [[row, (row + 7) % 50, (row + 20) % 50][: 1 + row % 3] for row in range(30)]
    expected, shares = slow_ranks(queries, items, sets)
    found = rank_relevant(queries, items, relevance_of(*sets), tile=16)
    assert as_lists(found) == expected
    assert found.tied.tolist() == pytest.approx(shares)


def places_of(queries, items, owner):
    """Pessimistic rank of each caption for its own image, by scipy's float64 distances."""
    distances = cdist(queries.double().numpy(), items.double().numpy(), "sqeuclidean")
    for caption, image in enumerate(owner.tolist()):
        own = owner.numpy() == image
        closer = distances[image] < distances[image, caption]
        yield 1 + (closer & own).sum() + (distances[image, ~own] <= distances[image, caption]).sum()


@pytest.mark.parametrize("dense", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("tile", [7, 100, 1024])
def test_items_that_float32_cannot_tell_apart(monkeypatch, tile, dense):
    """On rays around the query, lengths 1e-9 apart: one float32 number, thousands of float64 tolerances."""
    monkeypatch.setattr("evaluate.ranks.DENSE", dense)
    rng = np.random.default_rng(6)
    rays = rng.normal(size=(400, 16))
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    steps = rng.permutation(400)
    items = torch.from_numpy(rays * (1 + 1e-9 * steps)[:, None])
    relevance = relevance_of([3, 99, 250], [7])
    found = rank_relevant(torch.zeros(2, 16, dtype=torch.float64), items, relevance, tile)
    assert items.float().norm(dim=1).unique().numel() < 10
    assert found.values.tolist() == [steps[3] + 1, steps[99] + 1, steps[250] + 1, steps[7] + 1]
    assert found.tied.tolist() == [0, 0]


@pytest.mark.parametrize("tile", [64, 1024])
def test_random_embeddings_of_a_model_that_knows_nothing(tile):
    generator = torch.Generator().manual_seed(7)
    owner = torch.arange(200).repeat(5)
    images, captions = torch.randn(200, 32, generator=generator), torch.randn(1000, 32, generator=generator)
    relevance = Relevance.image_to_text(owner, 200)
    found = rank_relevant(images, captions, relevance, tile)
    places = list(places_of(images, captions, owner))
    assert found.values.tolist() == [places[caption] for caption in relevance.indices]


@pytest.mark.parametrize("tile", [5, 64, 1000])
def test_both_directions_at_once_equal_one_after_the_other(tile):
    generator = torch.Generator().manual_seed(8)
    owner = torch.cat([torch.arange(60), torch.randint(60, (180,), generator=generator)])
    images = torch.randint(-2, 3, (60, 3), generator=generator).float()
    captions = torch.randint(-2, 3, (240, 3), generator=generator).float()
    to_text, to_image = rank_both(images, captions, Relevance.image_to_text(owner, 60), tile)
    for found, expected in (
        (to_text, rank_relevant(images, captions, Relevance.image_to_text(owner, 60), tile)),
        (to_image, rank_relevant(captions, images, Relevance.text_to_image(owner), tile)),
    ):
        assert found.indptr.equal(expected.indptr)
        assert found.values.equal(expected.values)
        assert found.tied.equal(expected.tied)


def test_turned_relevance():
    turned = relevance_of([1, 2], [0, 2]).turned(3)
    assert turned.indptr.tolist() == [0, 1, 2, 4]
    assert turned.indices.tolist() == [1, 0, 0, 1]
    with pytest.raises(EvaluationError, match=r"item row 1 is relevant to no query \(2 such items\)"):
        relevance_of([0], [2]).turned(4)


class Precisions(TorchFunctionMode):
    """Remembers the precision that matrix products ran with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.mm:
            self.seen.add(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def test_low_precision_set_elsewhere_does_not_reach_the_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Precisions() as precisions:
            rank_relevant(column(0, 3), column(1, 2), relevance_of([0], [1]))
        assert precisions.seen == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_changes_nothing():
    generator = torch.Generator().manual_seed(9)
    queries, items = torch.randn(50, 64, generator=generator), torch.randn(300, 64, generator=generator)
    relevance = Relevance.text_to_image(torch.arange(50))
    expected = rank_relevant(queries, items, relevance).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rank_relevant(queries, items, relevance).values.equal(expected)


def test_lengths_beyond_float32():
    queries = torch.tensor([[0.0], [1e-30], [1e60]], dtype=torch.float64)
    items = torch.tensor([[3e-30], [-1e-30], [1.0], [2e60]], dtype=torch.float64)
    # For query 2 all items are 1e60 away, to the last bit.
    ranks = rank_relevant(queries, items, relevance_of([2], [3], [3]))
    assert ranks.values.tolist() == [3, 4, 4]


@pytest.mark.parametrize("tile", [5, 17, 64, 256])
def test_tiled_equals_full(tile):
    generator = torch.Generator().manual_seed(2)
    owner = torch.randint(60, (240,), generator=generator)
    owner[:60] = torch.arange(60)
    images, captions = torch.randn(60, 9, generator=generator), torch.randn(240, 9, generator=generator)
    for queries, items, relevance in (
        (images, captions, Relevance.image_to_text(owner, 60)),
        (captions, images, Relevance.text_to_image(owner)),
    ):
        full = rank_relevant(queries, items, relevance, tile=1000)
        tiled = rank_relevant(queries, items, relevance, tile=tile)
        assert tiled.values.equal(full.values)
        assert tiled.tied.equal(full.tied)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equal_items_tie_wherever_they_stand(offset):
    """Seven points shared by 1003 queries and 5017 items: every tie is known, and tile edges are awkward."""
    rng = np.random.default_rng(3)
    points = (rng.normal(size=(7, 48)) + offset).astype(np.float32)
    of_query, of_item = rng.integers(7, size=1003), rng.integers(7, size=5017)
    relevant = rng.integers(5017, size=1003)
    ranks = rank_relevant(
        torch.from_numpy(points[of_query]),
        torch.from_numpy(points[of_item]),
        Relevance.text_to_image(torch.from_numpy(relevant)),
        tile=256,
    )
    distances = cdist(points.astype(np.float64), points.astype(np.float64), "sqeuclidean")
    sizes = np.bincount(of_item, minlength=7)
    expected = [
        sizes[distances[q] <= distances[q, of_item[item]]].sum() for q, item in zip(of_query, relevant, strict=True)
    ]
    assert ranks.values.tolist() == expected
    assert ranks.tied.tolist() == [(sizes[of_item[item]] - 1) / 5016 for item in relevant]


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_collapsed_model_ranks_last_at_every_tile_edge(value, dtype):
    items = torch.full((517, 33), value, dtype=dtype)
    ranks = rank_relevant(items[:103], items, Relevance.text_to_image(torch.arange(103)), tile=64)
    assert ranks.values.unique().tolist() == [517]
    assert ranks.tied.unique().tolist() == [1.0]


def test_modalities_collapsed_to_different_points():
    queries = torch.full((103, 33), 0.3)
    items = torch.full((517, 33), -0.7)
    ranks = rank_relevant(queries, items, Relevance.text_to_image(torch.arange(103)), tile=64)
    assert ranks.values.unique().tolist() == [517]


def test_a_collapsed_unit_vector_at_the_size_of_a_split_scores_nothing():
    generator = torch.Generator().manual_seed(4)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    owner = torch.arange(5017) % 1003
    with pytest.warns(CollapseWarning):
        report = evaluate_full(direction.expand(1003, 64), direction.expand(5017, 64), owner, split="val", tile=256)
    assert report.rsum == 0
    assert report.t2i.meanr == 1003
    assert report.i2t.map_r == report.t2i.map_r == 0


def test_a_common_offset_does_not_drown_differences():
    # In float32, |q|² + |x|² - 2 q·x at 10000 has no digit left for differences of 0.01.
    generator = torch.Generator().manual_seed(5)
    offset = torch.randn(50, 8, generator=generator) * 0.01 + 10_000
    relevance = Relevance.text_to_image(torch.arange(50))
    noisy = offset + torch.randn(50, 8, generator=generator) * 0.01
    # Up there float32 is a lattice of 1/1024, so some distances are truly equal.
    distances = cdist(noisy.double().numpy(), offset.double().numpy(), "sqeuclidean")
    places = (distances <= distances.diagonal()[:, None]).sum(axis=1)
    assert rank_relevant(noisy, offset, relevance).values.tolist() == places.tolist()


class Largest(TorchFunctionMode):
    """Remembers the most elements that any tensor had."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_does_not_grow_with_queries_times_items():
    queries, items = torch.randn(100, 4), torch.randn(300, 4)
    with Largest() as largest:
        rank_relevant(queries, items, Relevance.image_to_text(torch.arange(300) % 100, 100), tile=32)
    assert largest.elements == 300 * 4  # the items themselves; a tile has 1024


def test_relevance_from_ragged_captions():
    owner = torch.tensor([2, 0, 2, 1, 2])
    to_text = Relevance.image_to_text(owner, 3)
    assert to_text.indptr.tolist() == [0, 1, 2, 5]
    assert to_text.indices.tolist() == [1, 3, 0, 2, 4]
    assert to_text.counts().tolist() == [1, 1, 3]
    assert to_text.rows().tolist() == [0, 1, 2, 2, 2]
    to_image = Relevance.text_to_image(owner)
    assert to_image.indptr.tolist() == [0, 1, 2, 3, 4, 5]
    assert to_image.indices.tolist() == [2, 0, 2, 1, 2]


def test_best_is_the_first_of_ragged_ranks():
    ranks = Ranks(torch.tensor([0, 3, 4]), torch.tensor([9, 2, 5, 7]), torch.zeros(2))
    assert ranks.best().tolist() == [2, 7]


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0.0, 1.0], [0], r"relevance indptr: expected a one-dimensional int64 tensor, found torch.float32"),
        ([0, 1], [[0]], r"relevance indices: expected a one-dimensional int64 tensor, .* shape \(1, 1\)"),
        ([0, 2], [0], r"from 0 to 1 \(the number of indices\), found \[0, 2\]"),
        ([1, 1], [0], r"from 0 to 1"),
        ([0], [], r"one more entry than queries"),
        ([0, 1, 1], [0], r"query row 1 has no relevant item \(1 such queries\)"),
        ([0, 1, 2], [3, -1], r"item rows start at 0, found -1"),
        ([0, 1, 4], [5, 5, 1, 5], r"query row 1 lists item 5 twice"),
    ],
)
def test_relevance_errors(indptr, indices, message):
    dtype = torch.float32 if isinstance(indptr[0], float) else torch.int64
    with pytest.raises(EvaluationError, match=message):
        Relevance(torch.tensor(indptr, dtype=dtype), torch.tensor(indices, dtype=torch.int64))


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ([0, 2, 0], r"image row 1 has no caption \(1 such images\)"),
        ([0, 1, 3], r"caption row 2 belongs to image row 3, expected 0 to 2 \(3 images\)"),
        ([0, -1, 2], r"caption row 1 belongs to image row -1"),
    ],
)
def test_caption_errors(owner, message):
    with pytest.raises(EvaluationError, match=message):
        Relevance.image_to_text(torch.tensor(owner), 3)


ONE = relevance_of([0])


@pytest.mark.parametrize(
    ("queries", "items", "relevance", "tile", "message"),
    [
        (column(math.nan), column(1), ONE, 1, r"queries row 0 holds NaN or infinity \(1 of 1 rows do\)"),
        (column(0), column(1, 2, math.inf), ONE, 1, r"items row 2 holds NaN or infinity"),
        (torch.zeros(3), column(1), ONE, 1, r"queries: expected a floating-point matrix .* shape \(3,\)"),
        (column(0), torch.zeros(0, 1), ONE, 1, r"items: .* at least one row"),
        (column(0), column(1).long(), ONE, 1, r"items: .* found torch.int64"),
        (torch.zeros(1, 2), column(1), ONE, 1, r"queries have 2 dimensions, items 1"),
        (column(0, 1), column(1), ONE, 1, r"relevance describes 1 queries, found 2"),
        (column(0), column(1), relevance_of([4]), 1, r"query row 0 has relevant item 4, but .* only 1 items"),
        (column(0), column(1), ONE, 0, r"tile: expected at least 1, found 0"),
    ],
)
def test_rank_errors(queries, items, relevance, tile, message):
    with pytest.raises(EvaluationError, match=message):
        rank_relevant(queries, items, relevance, tile)


def test_nothing_is_kept_for_a_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        rank_relevant(column(0.0).requires_grad_(), column(1.0).requires_grad_(), ONE)
    assert not kept


def test_the_benchmark_finds_the_same_ranks_both_ways():
    measured = measure(repeats=1, noise=4, images=40, captions_each=3, dimensions=8, tile=16)
    assert measured["i2t: total"] == pytest.approx(measured["i2t argsort"] / measured["i2t counting"])
    assert measured["both: total"] == pytest.approx(
        (measured["i2t argsort"] + measured["t2i argsort"]) / measured["both counting"]
    )


def test_the_benchmark_refuses_ranks_that_differ(monkeypatch):
    monkeypatch.setattr("benchmarks.bench_ranks.rank_by_argsort", lambda queries, *_: torch.full((len(queries),), 99))
    with pytest.raises(RuntimeError, match=r"i2t: counting and sorting differ by 9\d ranks; one of them is wrong"):
        measure(repeats=1, noise=1, images=40, captions_each=3, dimensions=8, tile=16)
