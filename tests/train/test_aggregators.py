"""Aggregators against loop-written references and torch's attention; padding changes nothing."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from train.aggregators import GPO, Attention, Max, Mean, NetVLAD, build_aggregator
from train.quantize import PartCodebook

NAMES = ("mean", "max", "attention", "gpo", "netvlad", "memory")
DIM, HEADS, CLUSTERS = 8, 2, 3


def build(name, seed=0):
    torch.manual_seed(seed)
    aggregator = build_aggregator(name, DIM, HEADS, CLUSTERS)
    if isinstance(aggregator, Attention):
        nn.init.normal_(aggregator.queries)  # zero queries would make it the mean
    return aggregator


def real_rows(parts, mask):
    return [parts[b][mask[b]].double().numpy() for b in range(len(parts))]


def softmax(scores):
    exponents = [math.exp(s - max(scores)) for s in scores]
    return [e / sum(exponents) for e in exponents]


def unit(vector):
    return vector / np.linalg.norm(vector)


def slow_gru(gru, suffix, rows, order):
    """The state after each row, cell by cell, in this order."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(gru, f"{name}_l0{suffix}").detach().double().numpy()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    state, states = np.zeros(w_hh.shape[1]), {}
    for k in order:
        (ir, iz, i_n), (hr, hz, hn) = (
            np.split(w_ih @ rows[k] + b_ih, 3),
            np.split(w_hh @ state + b_hh, 3),
        )
        r, z = 1 / (1 + np.exp(-(ir + hr))), 1 / (1 + np.exp(-(iz + hz)))
        state = (1 - z) * np.tanh(i_n + r * hn) + z * state
        states[k] = state
    return states


def slow_gpo_weights(gpo, count):
    """Position codes by their formula, the GRU of `count` steps cell by cell, softmax at temperature 0.1."""
    width = gpo.code_dim
    codes = np.zeros((count, width))
    for k in range(count):
        for i in range(width // 2):
            codes[k, 2 * i] = math.sin(k / 10000 ** (2 * i / width))
            codes[k, 2 * i + 1] = math.cos(k / 10000 ** (2 * i / width))

    forward = slow_gru(gpo.gru, "", codes, range(count))
    backward = slow_gru(gpo.gru, "_reverse", codes, reversed(range(count)))
    score = gpo.score.weight.detach().double().numpy()[0]
    return softmax([float(score @ (forward[k] + backward[k]) / 2) / 0.1 for k in range(count)])


def slow_mean(_, rows):
    return sum(rows) / len(rows)


def slow_max(_, rows):
    return np.array([max(row[d] for row in rows) for d in range(DIM)])


def slow_attention(aggregator, rows):
    queries = aggregator.queries.detach().double().numpy()
    pooled, width = np.zeros(DIM), DIM // HEADS
    for h in range(HEADS):
        weights = softmax([float(queries[h] @ row) / math.sqrt(DIM) for row in rows])
        for weight, row in zip(weights, rows, strict=True):
            pooled[h * width : (h + 1) * width] += weight * row[h * width : (h + 1) * width]
    return pooled


def slow_gpo(aggregator, rows):
    weights = slow_gpo_weights(aggregator, len(rows))
    return np.array(
        [sum(w * v for w, v in zip(weights, sorted(rows[:, d], reverse=True), strict=True)) for d in range(DIM)]
    )


def slow_netvlad(aggregator, rows):
    centres = aggregator.codebook.centres.detach().double().numpy()
    alpha = math.exp(aggregator.codebook.log_sharpness.item())
    residuals = np.zeros_like(centres)
    for row in rows:
        for m, weight in enumerate(softmax([-alpha * float(((row - c) ** 2).sum()) for c in centres])):
            residuals[m] += weight * (row - centres[m])
    joined = unit(np.concatenate([unit(v) for v in residuals]))
    return aggregator.project.weight.detach().double().numpy() @ joined


def slow_memory(aggregator, rows):
    """What the GRU remembers after the last real part."""
    return slow_gru(aggregator.gru, "", rows, range(len(rows)))[len(rows) - 1]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mean", slow_mean),
        ("max", slow_max),
        ("attention", slow_attention),
        ("gpo", slow_gpo),
        ("netvlad", slow_netvlad),
        ("memory", slow_memory),
    ],
)
def test_equals_the_loop_written_reference(name, reference, parts, mask):
    aggregator = build(name)
    expected = np.stack([reference(aggregator, rows) for rows in real_rows(parts, mask)])
    found = aggregator(parts, mask).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_out_dim_is_the_width_of_the_result(name, parts, mask):
    aggregator = build(name)
    assert aggregator(parts, mask).shape == (4, aggregator.out_dim) == (4, DIM)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("filler", [0.0, 1e4])
def test_a_padded_part_changes_nothing_whatever_it_holds(name, filler, parts, mask):
    aggregator = build(name)
    longer = torch.cat((parts, torch.full((4, 2, DIM), filler)), 1).requires_grad_()
    longer_mask = torch.cat((mask, torch.zeros(4, 2, dtype=torch.bool)), 1)
    pooled = aggregator(longer, longer_mask)
    torch.testing.assert_close(pooled, aggregator(parts, mask), rtol=1e-5, atol=1e-6)
    pooled.square().sum().backward()
    assert torch.isfinite(longer.grad).all()
    assert longer.grad[~longer_mask].count_nonzero() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_parts_gives_zeros_and_leaves_the_others_alone(name, parts, mask):
    aggregator = build(name)
    emptied = mask.clone()
    emptied[1] = False
    leaf = parts.clone().requires_grad_()
    pooled = aggregator(leaf, emptied)
    assert pooled[1].count_nonzero() == 0
    torch.testing.assert_close(pooled[[0, 2, 3]], aggregator(parts, mask)[[0, 2, 3]])
    pooled.square().sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in aggregator.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_each_part_alone_is_what_a_row_of_it_alone_becomes(name, parts, mask):
    aggregator = build(name)
    found = aggregator.alone(parts, mask)
    for b in range(len(parts)):
        for k in range(parts.shape[1]):
            expected = aggregator(parts[b, k][None, None], mask[b, k][None, None])[0]
            torch.testing.assert_close(found[b, k], expected)
    assert mask.any()
    assert not mask.all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "memory"])
def test_the_order_of_parts_does_not_matter(name, parts, mask):
    aggregator = build(name)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(
        aggregator(parts[:, order], mask[:, order]), aggregator(parts, mask), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_finite_and_reach_parts_and_parameters(name, collapsed, bf16, parts, mask):
    aggregator = build(name)
    leaf = (torch.ones_like(parts) if collapsed else parts.clone()).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        pooled = aggregator(leaf.bfloat16() if bf16 else leaf, mask)
    pooled.float().square().sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad[mask].count_nonzero() > 0
    for parameter in aggregator.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert collapsed or parameter.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_stays_close_to_float32(name, parts, mask):
    aggregator = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = aggregator(parts.bfloat16(), mask)
    torch.testing.assert_close(low.float(), aggregator(parts, mask), rtol=0.05, atol=0.05)


def test_mean_and_max_by_hand():
    parts = torch.tensor([[[1.0, -5.0], [3.0, -7.0], [100.0, 100.0]]])
    mask = torch.tensor([[True, True, False]])
    assert Mean(2)(parts, mask).tolist() == [[2.0, -6.0]]
    assert Max(2)(parts, mask).tolist() == [[3.0, -5.0]]


def test_attention_starts_as_the_mean(parts, mask):
    torch.testing.assert_close(Attention(DIM, HEADS)(parts, mask), Mean(DIM)(parts, mask))


def test_attention_equals_torch_multihead_attention(parts, mask):
    """One query of ones; each head's key projection carries the folded query in its first row."""
    aggregator = build("attention")
    width = DIM // HEADS
    oracle = nn.MultiheadAttention(DIM, HEADS, batch_first=True, bias=False)
    keys = torch.zeros(DIM, DIM)
    for h in range(HEADS):  # torch divides by the root of the head's width, we by the root of D
        keys[h * width] = aggregator.queries[h].detach() * math.sqrt(width) / math.sqrt(DIM)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat((torch.eye(DIM), keys, torch.eye(DIM))))
        oracle.out_proj.weight.copy_(torch.eye(DIM))
    expected, weights = oracle(torch.ones(4, 1, DIM), parts, parts, key_padding_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(aggregator(parts, mask), expected[:, 0])
    torch.testing.assert_close(aggregator.weights(parts, mask), weights[:, :, 0])


def test_attention_weights_are_zero_without_parts_and_sum_to_one_otherwise(parts, mask):
    mask[2] = False
    weights = build("attention").weights(parts, mask)
    assert weights.shape == (4, HEADS, 5)
    torch.testing.assert_close(weights.sum(2), torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None].expand(4, HEADS))
    assert weights.transpose(1, 2)[~mask].count_nonzero() == 0


def test_gpo_weights_depend_on_the_count_alone_and_vanish_after_it():
    gpo = GPO(DIM)
    weights = gpo.weights(torch.tensor([3, 0, 5, 3]), 6)
    assert torch.equal(weights[0], weights[3])
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert weights[0, 3:].count_nonzero() == 0
    torch.testing.assert_close(weights[2, :5], gpo.weights(torch.tensor([5]), 5)[0])


def test_gpo_with_one_part_is_that_part(parts):
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, 2] = True
    torch.testing.assert_close(GPO(DIM)(parts, mask), parts[:, 2])


def test_netvlad_by_hand():
    """Two far centres and a sharp choice: one residual (3, 4), the other (0, 2), made unit, then both."""
    codebook = PartCodebook(2, 2)
    aggregator = NetVLAD(codebook)
    with torch.no_grad():
        codebook.centres.copy_(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
        codebook.log_sharpness.fill_(0.0)
        aggregator.project.weight.copy_(torch.eye(4)[[0, 3]])
    parts = torch.tensor([[[3.0, 4.0], [100.0, 2.0]]])
    found = aggregator(parts, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([[0.6, 1.0]]) / math.sqrt(2))


def test_netvlad_codebook_can_be_shared_and_is_trained_by_both(parts, mask):
    codebook = PartCodebook(CLUSTERS, DIM)
    image = build_aggregator("netvlad", DIM, HEADS, CLUSTERS, codebook)
    text = build_aggregator("netvlad", DIM, HEADS, CLUSTERS, codebook)
    assert image.codebook is text.codebook is codebook
    image.initialise(parts.flatten(0, 1))
    torch.testing.assert_close(text.codebook.centres, codebook.centres)
    image(parts, mask).sum().backward()
    once = codebook.centres.grad.clone()
    text(parts, mask).sum().backward()
    assert not torch.equal(codebook.centres.grad, once)


def test_netvlad_survives_parts_that_sit_on_their_centres():
    codebook = PartCodebook(2, DIM)
    aggregator = NetVLAD(codebook)
    parts = codebook.centres.detach()[None].clone().requires_grad_()
    with torch.no_grad():
        codebook.log_sharpness.fill_(5.0)
    aggregator(parts, torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert torch.isfinite(parts.grad).all()


def test_heads_must_divide_the_dimensions():
    with pytest.raises(ValueError, match="found 8 dimensions and 3 heads"):
        Attention(8, 3)


def test_a_codebook_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"found a codebook of shape \(4, 8\) .* expected \(3, 8\)"):
        build_aggregator("netvlad", DIM, HEADS, CLUSTERS, PartCodebook(4, DIM))


def test_a_codebook_for_an_aggregator_without_centres_is_refused():
    with pytest.raises(ValueError, match="aggregator 'mean'"):
        build_aggregator("mean", DIM, HEADS, CLUSTERS, PartCodebook(CLUSTERS, DIM))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="found aggregator 'median'; expected mean, max"):
        build_aggregator("median", DIM, HEADS, CLUSTERS)
