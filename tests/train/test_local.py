"""Concept queries against a loop and torch's attention; the joined vector's dot product."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.local import ConceptQueries, combine

DIM, QUERIES, LOCAL = 8, 3, 5


@pytest.fixture
def queries():
    torch.manual_seed(0)
    return ConceptQueries(DIM, QUERIES, LOCAL)


def slow_queries(module, rows):
    """One image: each query's softmax over the real parts, the results side by side, the projection."""
    joined = []
    for query in module.queries.tolist():
        scores = [math.exp(sum(q * x for q, x in zip(query, row, strict=True)) / math.sqrt(DIM)) for row in rows]
        joined += [sum(s * row[d] for s, row in zip(scores, rows, strict=True)) / sum(scores) for d in range(DIM)]
    return [sum(w * x for w, x in zip(weights, joined, strict=True)) for weights in module.project.weight.tolist()]


def test_equals_a_loop(queries, parts, mask):
    expected = [slow_queries(queries, row[real].tolist()) for row, real in zip(parts, mask, strict=True)]
    torch.testing.assert_close(queries(parts, mask), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_equals_torch_multihead_attention_with_one_head(queries, parts, mask):
    oracle = nn.MultiheadAttention(DIM, 1, batch_first=True, bias=False)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.eye(DIM).repeat(3, 1))
        oracle.out_proj.weight.copy_(torch.eye(DIM))
    pooled, _ = oracle(queries.queries.expand(4, -1, -1), parts, parts, key_padding_mask=~mask)
    torch.testing.assert_close(queries(parts, mask), queries.project(pooled.flatten(1)))


def test_one_part_is_what_every_query_finds(queries, parts):
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, 2] = True
    torch.testing.assert_close(queries(parts, mask), queries.project(parts[:, 2].repeat(1, QUERIES)))


@pytest.mark.parametrize("filler", [0.0, 1e4])
def test_a_padded_part_changes_nothing_whatever_it_holds(queries, filler, parts, mask):
    longer = torch.cat((parts, torch.full((4, 2, DIM), filler)), 1).requires_grad_()
    longer_mask = torch.cat((mask, torch.zeros(4, 2, dtype=torch.bool)), 1)
    local = queries(longer, longer_mask)
    torch.testing.assert_close(local, queries(parts, mask), rtol=1e-5, atol=1e-6)
    local.square().sum().backward()
    assert torch.isfinite(longer.grad).all()
    assert longer.grad[~longer_mask].count_nonzero() == 0


def test_a_row_without_parts_gives_zeros_and_leaves_the_others_alone(queries, parts, mask):
    emptied = mask.clone()
    emptied[1] = False
    leaf = parts.clone().requires_grad_()
    local = queries(leaf, emptied)
    assert local[1].count_nonzero() == 0
    torch.testing.assert_close(local[[0, 2, 3]], queries(parts, mask)[[0, 2, 3]])
    local.square().sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in queries.parameters())


def test_a_row_without_parts_brought_to_unit_length_harms_no_gradient(queries, parts, mask):
    mask[1] = False
    leaf = parts.clone().requires_grad_()
    (F.normalize(queries(leaf, mask), dim=1) @ torch.randn(LOCAL)).sum().backward()
    for grad in (leaf.grad, queries.queries.grad, queries.project.weight.grad):
        assert grad.abs().max() < 100
        assert grad.count_nonzero() > 0


def test_the_order_of_parts_does_not_matter(queries, parts, mask):
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(queries(parts[:, order], mask[:, order]), queries(parts, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_finite_and_reach_parts_and_parameters(queries, collapsed, bf16, parts, mask):
    leaf = (torch.ones_like(parts) if collapsed else parts.clone()).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        local = queries(leaf.bfloat16() if bf16 else leaf, mask)
    local.float().square().sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad[mask].count_nonzero() > 0
    for parameter in queries.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert collapsed or parameter.grad.count_nonzero() > 0


def test_the_gradient_is_the_slope(queries, parts, mask):
    mask[3] = False
    torch.autograd.gradcheck(lambda x: queries.double()(x, mask), parts.double().requires_grad_())


def test_queries_begin_apart(queries):
    apart = torch.cdist(queries.queries, queries.queries)
    assert (apart[~torch.eye(QUERIES, dtype=torch.bool)] > 0.5).all()


def test_it_names_its_width(queries, parts, mask):
    assert queries(parts, mask).shape == (4, queries.out_dim) == (4, LOCAL)


@pytest.mark.parametrize(("count", "out_dim"), [(0, 5), (3, 0)])
def test_sizes_that_make_no_sense_are_refused(count, out_dim):
    with pytest.raises(ValueError, match=f"local space of {out_dim} dimensions from {count} queries; expected"):
        ConceptQueries(DIM, count, out_dim)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_joined_vector_mixes_both_similarities(share):
    generator = torch.Generator().manual_seed(2)
    g, h = (F.normalize(torch.randn(6, 7, generator=generator), dim=1) for _ in range(2))
    k, m = (F.normalize(torch.randn(6, 3, generator=generator), dim=1) for _ in range(2))
    e, f = combine(g, k, share), combine(h, m, share)
    assert e.shape == (6, 10)
    torch.testing.assert_close(e @ f.T, (1 - share) * (g @ h.T) + share * (k @ m.T))
    torch.testing.assert_close(e.norm(dim=1), torch.ones(6))


def test_the_joined_vector_by_hand():
    joined = combine(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0]]), 0.36)
    torch.testing.assert_close(joined, torch.tensor([[0.8, 0.0, -0.6]]))


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_beyond_the_whole_is_refused(share):
    with pytest.raises(ValueError, match=f"found share {share} of the local space"):
        combine(torch.ones(1, 2), torch.ones(1, 2), share)
