"""Quantization loss against a loop, closed forms, and its properties."""

import math
from dataclasses import replace

import pytest
import torch

from train.config import QuantizationConfig
from train.losses.quantization import QuantizationLoss, agreement, entropy

CONFIG = QuantizationConfig(
    weight=1.0,
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
    return loss


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
    return 0.3 * error + error + 0.2 * (1 - spread) + 0.4 * agree, error, spread, agree


@pytest.mark.parametrize(("progress", "tau"), [(0.0, 2.0), (0.5, 1.0), (1.0, 0.5)])
def test_equals_a_loop_at_the_annealed_temperature(embeddings, progress, tau):
    loss, (image, text) = build(), embeddings()
    expected = slow_loss(loss.codebook.codewords.tolist(), image.tolist(), text.tolist(), tau)
    found = loss(image, text, progress)
    terms = (found.loss, found.terms["distortion"], found.terms["entropy"], found.terms["agreement"])
    assert [t.item() for t in terms] == pytest.approx(expected, rel=1e-4)


def test_embeddings_on_their_codewords_by_hand():
    """Two far codewords, one pair on each: no distortion, full use, full agreement: the loss is 0."""
    loss = QuantizationLoss(replace(CONFIG, subspaces=1, codewords=2), 1)
    with torch.no_grad():
        loss.codebook.codewords.copy_(torch.tensor([[[0.0], [100.0]]]))
    z = torch.tensor([[0.0], [100.0]])
    found = loss(z, z, 0.0)
    assert found.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert found.perplexity.item() == pytest.approx(2.0)


def test_entropy_by_hand():
    soft = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])  # sub-spaces: one cell; both cells
    assert entropy(soft).item() == pytest.approx(0.5)


def test_agreement_by_hand():
    soft = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]])  # one pair, one sub-space
    expected = -0.5 * (0.5 * math.log(0.75) + 0.5 * math.log(0.25) + 0.75 * math.log(0.5) + 0.25 * math.log(0.5))
    assert agreement(soft, soft.log()).item() == pytest.approx(expected)


def test_stopped_gradients(embeddings):
    """With the soft terms off: z is pulled by commitment only, chosen codewords by the plain error only."""
    loss = build(replace(CONFIG, entropy=0.0, agreement=0.0))
    image, text = embeddings()
    z = torch.cat((image, text)).detach()
    codes = loss.codebook.encode(z)
    gap = z - loss.codebook.decode(codes).detach()
    loss(image, text, 0.0).loss.backward()
    torch.testing.assert_close(torch.cat((image.grad, text.grad)), 0.3 * 2 * gap / 14)
    expected = torch.zeros(2, 3, 4)
    for n in range(14):
        for s in range(2):
            expected[s, codes[n, s]] -= 2 * gap[n, 4 * s : 4 * s + 4] / 14
    torch.testing.assert_close(loss.codebook.codewords.grad, expected)


def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings):
    loss, (image, text) = build(), embeddings()
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = loss(image, text, 0.3).loss
    torch.testing.assert_close(loss(text, image, 0.3).loss, expected)
    torch.testing.assert_close(loss(image[order], text[order], 0.3).loss, expected)


@pytest.mark.parametrize("kind", ["free", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_embeddings_and_codewords(embeddings, kind, bf16):
    loss, (image, text) = build(), embeddings(kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        half = (x.bfloat16() if bf16 else x for x in (image, text))
        found = loss(*half, 1.0)
    found.loss.backward()
    assert found.loss.item() >= 0
    for grad in (image.grad, text.grad, loss.codebook.codewords.grad):
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
    loss, (image, text) = build(replace(CONFIG, rank_codes=True)), embeddings()
    found = loss(image, text, 0.0)
    assert torch.equal(found.image, loss.codebook.decode(loss.codebook.encode(image)))
    assert torch.equal(found.text, loss.codebook.decode(loss.codebook.encode(text)))
    found.image.square().sum().backward()
    assert image.grad.count_nonzero() > 0
    assert build()(image, text, 0.0).image is None


def test_training_the_codebook_alone_lowers_the_distortion(embeddings):
    loss, (image, text) = build(), embeddings(64)
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.5)
    first = loss(image, text, 0.0).terms["distortion"]
    for _ in range(30):
        optimiser.zero_grad()
        loss(image.detach(), text.detach(), 0.0).loss.backward()
        optimiser.step()
    assert loss(image, text, 0.0).terms["distortion"] < 0.8 * first


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"found tau_start 2.0 and tau_end 0.0; expected both above 0"):
        QuantizationLoss(replace(CONFIG, tau_end=0.0), 8)
