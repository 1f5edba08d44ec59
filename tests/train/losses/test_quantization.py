"""Quantization loss against a loop, closed forms, and its properties."""

import math
from dataclasses import replace

import pytest
import torch

from train.config import QuantizationConfig
from train.losses.quantization import SAMPLE, QuantizationLoss, agreement, entropy
from train.quantize import ProductCodebook

CONFIG = QuantizationConfig(
    weight=1.0,
    start=0.0,
    subspaces=2,
    codewords=3,
    commitment=0.3,
    entropy=0.2,
    agreement=0.4,
    tau_start=2.0,
    tau_end=0.5,
)


def build(config=CONFIG, dim=8):
    torch.manual_seed(4)
    loss = QuantizationLoss(config, dim)
    torch.nn.init.normal_(loss.codebook.codewords)
    loss.codebook.ready.fill_(1)
    return loss.eval()


def slow_loss(codewords, image, text, tau):
    """L_q from its formula, one embedding and one sub-space at a time."""
    size, spaces, count, width = len(image), len(codewords), len(codewords[0]), len(codewords[0][0])
    soft, error = [], 0.0
    for row in image + text:
        soft.append([])
        for s in range(spaces):
            piece = row[s * width : (s + 1) * width]
            squares = [sum((p - c) ** 2 for p, c in zip(piece, word, strict=True)) for word in codewords[s]]
            weights = [math.exp(-q / tau) for q in squares]
            soft[-1].append([w / sum(weights) for w in weights])
            error += min(squares) / (2 * size)
    usage = [[sum(row[s][m] for row in soft) / (2 * size) for m in range(count)] for s in range(spaces)]
    spread = sum(-sum(p * math.log(p) for p in space) / math.log(count) for space in usage) / spaces
    agree = 0.0
    for i in range(size):
        for s in range(spaces):
            for a, b in zip(soft[i][s], soft[size + i][s], strict=True):
                agree -= 0.5 * (a * math.log(b) + b * math.log(a)) / (size * spaces)
    return 0.3 * error + 0.2 * (1 - spread) + 0.4 * agree, error, spread, agree


@pytest.mark.parametrize(("progress", "tau"), [(0.0, 2.0), (0.5, 1.0), (1.0, 0.5)])
def test_equals_a_loop_at_the_annealed_temperature(embeddings, progress, tau):
    loss, (image, text) = build(), embeddings()
    expected = slow_loss(loss.codebook.codewords.tolist(), image.tolist(), text.tolist(), tau)
    found = loss(image, text, progress)
    terms = (found.loss, found.terms["distortion"], found.terms["entropy"], found.terms["agreement"])
    assert [t.item() for t in terms] == pytest.approx(expected, rel=1e-4)


def test_embeddings_on_their_codewords_by_hand():
    """Two far codewords, one pair on each: no distortion, full use, full agreement: the loss is 0."""
    loss = QuantizationLoss(replace(CONFIG, subspaces=1, codewords=2), 1).eval()
    loss.codebook.codewords = torch.tensor([[[0.0], [100.0]]])
    loss.codebook.ready.fill_(1)
    z = torch.tensor([[0.0], [100.0]])
    found = loss(z, z, 0.0)
    assert found.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert found.perplexity.item() == pytest.approx(2.0)


def test_entropy_by_hand():
    soft = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])  # sub-spaces: one cell; both cells
    assert entropy(soft).item() == pytest.approx(0.5)


def test_reward_for_usage_spreads_embeddings_that_share_a_cell():
    """Two codewords, fixed; all embeddings begin in the first one's cell."""
    config = replace(CONFIG, subspaces=1, codewords=2, commitment=0.0, agreement=0.0, tau_start=1.0, tau_end=1.0)
    loss = QuantizationLoss(config, 1).eval()
    loss.codebook.codewords = torch.tensor([[[-1.0], [1.0]]])
    loss.codebook.ready.fill_(1)
    z = torch.linspace(-1.3, -0.7, 8)[:, None].requires_grad_()
    found = []
    for _ in range(200):
        found.append(loss(z[:4], z[4:], 1.0))
        (slope,) = torch.autograd.grad(found[-1].loss, z)
        z = (z - 5 * slope).detach().requires_grad_()
    assert found[0].perplexity == 1
    assert found[-1].perplexity > 1.8


def test_agreement_by_hand():
    soft = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]])  # one pair, one sub-space
    expected = -0.5 * (0.5 * math.log(0.75) + 0.5 * math.log(0.25) + 0.75 * math.log(0.5) + 0.25 * math.log(0.5))
    assert agreement(soft, soft.log()).item() == pytest.approx(expected)


def test_stopped_gradients(embeddings):
    """With the soft terms off: z is pulled by commitment only."""
    loss = build(replace(CONFIG, entropy=0.0, agreement=0.0))
    image, text = embeddings()
    z = torch.cat((image, text)).detach()
    gap = z - loss.codebook.decode(loss.codebook.encode(z))
    loss(image, text, 0.0).loss.backward()
    torch.testing.assert_close(torch.cat((image.grad, text.grad)), 0.3 * 2 * gap / 14)
    assert list(loss.parameters()) == []


@pytest.mark.parametrize("training", [True, False])
def test_codewords_follow_each_batch_once_and_only_in_training(embeddings, training):
    loss, (image, text) = build().train(training), embeddings()
    expected = build().codebook
    z = torch.cat((image, text)).detach()
    if training:
        expected.follow(z, expected.encode(z), CONFIG.decay)
    loss(image, text, 0.5).loss.backward()
    assert torch.equal(loss.codebook.codewords, expected.codewords)
    assert torch.equal(loss.codebook.counts, expected.counts)


def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings):
    loss, (image, text) = build(), embeddings()
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = loss(image, text, 0.3).loss
    torch.testing.assert_close(loss(text, image, 0.3).loss, expected)
    torch.testing.assert_close(loss(image[order], text[order], 0.3).loss, expected)


@pytest.mark.parametrize("kind", ["free", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_embeddings(embeddings, kind, bf16):
    loss, (image, text) = build(), embeddings(kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        half = (x.bfloat16() if bf16 else x for x in (image, text))
        found = loss(*half, 1.0)
    found.loss.backward()
    assert found.loss.item() >= 0
    for grad in (image.grad, text.grad):
        assert torch.isfinite(grad).all()
        assert grad.count_nonzero() > 0


def test_soft_codes_far_from_all_codewords_stay_finite(embeddings):
    loss = build(replace(CONFIG, tau_end=1e-4))
    image, text = embeddings()
    found = loss(100 * image, 100 * text, 1.0)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert torch.isfinite(image.grad).all()


def test_codes_for_the_ranking_term_are_the_decoded_ones_and_pass_gradients(embeddings):
    loss, (image, text) = build(replace(CONFIG, rank_codes=0.5)), embeddings()
    found = loss(image, text, 0.0)
    assert torch.equal(found.image, loss.codebook.decode(loss.codebook.encode(image)))
    assert torch.equal(found.text, loss.codebook.decode(loss.codebook.encode(text)))
    found.image.square().sum().backward()
    torch.testing.assert_close(image.grad, 2 * found.image.detach())  # straight through
    assert build()(image, text, 0.0).image is None


def normal(rows, seed):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def test_the_codebook_is_made_of_the_first_embeddings_after_the_start():
    """Three codewords want 96 embeddings: two batches of 25 pairs, after a third of training."""
    loss = QuantizationLoss(replace(CONFIG, start=0.3), 8)
    assert SAMPLE * CONFIG.codewords == 96
    assert loss(normal(25, 0), normal(25, 1), 0.29) is None
    assert loss(normal(25, 2), normal(25, 3), 0.3) is None
    assert len(loss.sample) == 50
    assert loss(normal(25, 4), normal(25, 5), 0.4) is not None
    assert len(loss.sample) == 0
    expected = ProductCodebook(8, 2, 3)
    expected.initialise(torch.cat([normal(25, seed) for seed in range(2, 6)]))
    last = torch.cat((normal(25, 4), normal(25, 5)))
    expected.follow(last, expected.encode(last), CONFIG.decay)
    for name, value in expected.state_dict().items():
        assert torch.equal(loss.codebook.state_dict()[name], value), name
    assert loss(normal(25, 6), normal(25, 7), 0.5) is not None
    assert torch.equal(loss.codebook.rotation, expected.rotation)


def test_a_short_training_makes_the_codebook_of_what_there_is():
    """Halfway from the start, at .65 of training, three embeddings are enough for three codewords."""
    loss = QuantizationLoss(replace(CONFIG, start=0.3), 8)
    assert loss(normal(1, 0), normal(1, 1), 0.5) is None
    assert loss(normal(1, 2), normal(1, 3), 0.64) is None
    assert loss(normal(1, 4), normal(1, 5), 0.65) is not None
    few = QuantizationLoss(CONFIG, 8)
    assert few(normal(1, 0), normal(1, 1), 0.9) is None  # two
    assert few(normal(1, 2), normal(1, 3), 0.95) is not None


def test_nothing_is_collected_in_evaluation_mode():
    loss = QuantizationLoss(CONFIG, 8).eval()
    assert loss(normal(60, 0), normal(60, 1), 0.9) is None
    assert len(loss.sample) == 0


def test_what_was_collected_is_part_of_the_state():
    whole, first, second = (QuantizationLoss(CONFIG, 8) for _ in range(3))
    for loss in (whole, first):
        loss(normal(25, 0), normal(25, 1), 0.1)
    second.load_state_dict(first.state_dict())
    for loss in (whole, second):
        loss(normal(25, 2), normal(25, 3), 0.2)
    assert second.codebook.ready
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_the_temperature_anneals_from_the_start_of_the_codebook():
    loss = QuantizationLoss(replace(CONFIG, start=0.6), 8)
    assert [loss.tau(progress) for progress in (0.6, 0.8, 1.0)] == pytest.approx([2.0, 1.0, 0.5])


@pytest.mark.parametrize("wrong", [{"start": 1.0}, {"start": -0.1}, {"rank_codes": 1.1}, {"rank_codes": -0.5}])
def test_shares_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"found quantization start .* and rank_codes .*; expected 0 <= start < 1"):
        QuantizationLoss(replace(CONFIG, **wrong), 8)


@pytest.mark.parametrize("wrong", [{"commitment": -1.0}, {"entropy": -0.1}, {"agreement": -0.1}])
def test_negative_weights_are_refused(wrong):
    with pytest.raises(ValueError, match=r"found quantization commitment .* agreement .*; expected 0 or more"):
        QuantizationLoss(replace(CONFIG, **wrong), 8)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_codewords_that_would_not_follow_are_refused(decay):
    with pytest.raises(ValueError, match=f"found quantization decay {decay}; expected 0 <= decay < 1"):
        QuantizationLoss(replace(CONFIG, decay=decay), 8)


def test_the_codebook_alone_lowers_the_distortion(embeddings):
    loss, (image, text) = build().train(), embeddings(64)
    first = loss(image, text, 0.0).terms["distortion"]
    for _ in range(300):
        loss(image.detach(), text.detach(), 0.0)
    assert loss(image, text, 0.0).terms["distortion"] < 0.8 * first


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"found tau_start 2.0 and tau_end 0.0; expected both above 0"):
        QuantizationLoss(replace(CONFIG, tau_end=0.0), 8)
