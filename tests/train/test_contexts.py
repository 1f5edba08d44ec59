"""Contexts: against plain references; padding, order and empty rows."""

import math

import pytest
import torch
from torch import nn

from train.config import SettingsError
from train.contexts import BiGRU, GraphReasoning, Transformer, build_context, real_first

NAMES = ["bigru", "transformer", "graph"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(name, dim=8):
    context = build_context(name, dim, 2, 2).eval()
    for parameter in context.parameters():  # the graph starts as the identity
        nn.init.normal_(parameter, std=0.3)
    return context


@pytest.mark.parametrize("name", NAMES)
def test_masked_parts_are_never_read_and_come_back_as_zeros(name):
    context, parts = made(name), torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    found = context(parts, mask)
    spoiled = parts.masked_fill(~mask[..., None], 1e4)
    torch.testing.assert_close(context(spoiled, mask), found)
    assert found[~mask].abs().max() == 0
    longer = nn.functional.pad(parts, (0, 0, 0, 2), value=7.0), nn.functional.pad(mask, (0, 2))
    torch.testing.assert_close(context(*longer)[:, :5], found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_parts_gives_zeros_and_finite_gradients(name):
    context, parts = made(name), torch.randn(2, 3, 8, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True] * 3])
    found = context(parts, mask)
    assert found[0].abs().max() == 0
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in [parts, *context.parameters()])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_finite_and_reach_parts_and_parameters(name, collapsed, bf16):
    context, parts = made(name), torch.ones(2, 4, 8) if collapsed else torch.randn(2, 4, 8)
    parts.requires_grad_()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        found = context(parts.bfloat16() if bf16 else parts, mask)
    (found.float() * torch.randn(2, 4, 8)).sum().backward()
    assert parts.grad.isfinite().all()
    assert parts.grad[mask].count_nonzero() > 0
    for parameter in context.parameters():
        assert parameter.grad.isfinite().all()
        assert collapsed or parameter.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", NAMES)
def test_parts_see_each_other(name):
    context, parts = made(name), torch.randn(1, 4, 8)
    mask = torch.ones(1, 4, dtype=torch.bool)
    changed = parts.clone()
    changed[0, 3] = torch.randn(8)
    assert (context(changed, mask)[0, 0] - context(parts, mask)[0, 0]).abs().max() > 1e-4


def test_bigru_skips_gaps():
    context, parts = made("bigru"), torch.randn(1, 3, 8)
    gap = torch.stack((parts[0, 0], torch.full((8,), 9.0), parts[0, 1], parts[0, 2]))[None]
    found = context(gap, torch.tensor([[True, False, True, True]]))
    dense = context(parts, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(found[:, [0, 2, 3]], dense)


def test_bigru_is_the_mean_of_both_directions():
    context, parts = BiGRU(8, 1), torch.randn(1, 4, 8)
    forward, backward = context.gru(parts)[0].chunk(2, 2)
    torch.testing.assert_close(context(parts, torch.ones(1, 4, dtype=torch.bool)), (forward + backward) / 2)


def test_transformer_against_torchs_layer():
    ours, parts = Transformer(8, 1, 2), torch.randn(2, 5, 8)
    theirs = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
    pairs = [
        (theirs.self_attn.in_proj_weight, ours.mixers[0].weight),
        (theirs.self_attn.in_proj_bias, ours.mixers[0].bias),
        (theirs.self_attn.out_proj.weight, ours.outs[0].weight),
        (theirs.self_attn.out_proj.bias, ours.outs[0].bias),
        (theirs.linear1.weight, ours.hidden[0].weight),
        (theirs.linear1.bias, ours.hidden[0].bias),
        (theirs.linear2.weight, ours.back[0].weight),
        (theirs.linear2.bias, ours.back[0].bias),
    ]
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    expected = theirs(parts * mask[..., None], src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(parts, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_graph_reasoning_against_loops():
    context, parts = GraphReasoning(4, 1), torch.randn(1, 3, 4)
    torch.testing.assert_close(context(parts, torch.ones(1, 3, dtype=torch.bool)), parts)  # the start
    nn.init.normal_(context.out[0].weight)
    theta, phi, message, out = context.theta[0], context.phi[0], context.message[0], context.out[0]
    expected = []
    for i in range(3):
        scores = [float(theta(parts[0, i]) @ phi(parts[0, j])) / math.sqrt(4) for j in range(3)]
        total = sum(math.exp(score) for score in scores)
        told = sum(math.exp(score) / total * message(parts[0, j]) for j, score in enumerate(scores))
        expected.append(parts[0, i] + out(told))
    torch.testing.assert_close(context(parts, torch.ones(1, 3, dtype=torch.bool))[0], torch.stack(expected))


def test_real_parts_come_first_in_their_order():
    assert real_first(torch.tensor([[False, True, False, True]])).tolist() == [[1, 3, 0, 2]]


def test_none_is_no_module():
    assert build_context("none", 8, 0, 1) is None


@pytest.mark.parametrize(
    ("name", "layers", "heads", "message"),
    [
        ("bigru", 0, 1, "found 0 layers of context 'bigru'; expected at least 1"),
        ("transformer", 1, 3, "found 8 dimensions and 3 heads; expected heads that divide"),
        ("lstm", 1, 1, "found context 'lstm'; expected none, bigru, transformer or graph"),
    ],
)
def test_settings_without_meaning_are_refused(name, layers, heads, message):
    with pytest.raises(SettingsError, match=message):
        build_context(name, 8, layers, heads)
