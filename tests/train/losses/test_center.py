"""Center loss against a loop, by hand, and its properties."""

import pytest
import torch

from train.config import CenterConfig
from train.losses.center import CenterLoss

CONCEPTS = torch.tensor([5, 2, 5, 0, 2, 1, 5])


@pytest.fixture
def loss():
    loss = CenterLoss(CenterConfig(weight=1.0, rate=0.5), 8, 6)
    loss.table.centres.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(9)))
    return loss


def test_equals_a_loop_and_uses_the_centres_of_before(embeddings, loss):
    image, text = embeddings()
    centres, total = loss.table.centres.tolist(), 0.0
    for rows in (image.tolist(), text.tolist()):
        for row, concept in zip(rows, CONCEPTS.tolist(), strict=True):
            total += 0.5 * sum((x - c) ** 2 for x, c in zip(row, centres[concept], strict=True)) / 7
    assert loss(image, text, CONCEPTS).item() == pytest.approx(total, rel=1e-5)


def test_by_hand():
    """Centre at 0, image at 3, caption at 1: ½ 9 + ½ 1; then both pull, n = 2: c = ½ (3 + 1) / 3."""
    loss = CenterLoss(CenterConfig(weight=1.0, rate=0.5), 1, 1)
    found = loss(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([0]))
    assert found.item() == 5.0
    assert loss.table.centres.item() == pytest.approx(2 / 3)


def test_centres_follow_both_modalities_in_training_only(embeddings, loss):
    before = loss.table.centres.clone()
    loss.eval()(*embeddings(), CONCEPTS)
    assert torch.equal(loss.table.centres, before)
    loss.train()(*embeddings(), CONCEPTS)
    moved = (loss.table.centres != before).any(1)
    assert moved.tolist() == [True, True, True, False, False, True]


def test_gradient_is_the_distance_to_the_centre(embeddings, loss):
    image, text = embeddings()
    centres = loss.table.centres[CONCEPTS].clone()
    loss(image, text, CONCEPTS).backward()
    torch.testing.assert_close(image.grad, (image.detach() - centres) / 7)
    torch.testing.assert_close(text.grad, (text.detach() - centres) / 7)


def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings, loss):
    image, text = embeddings()
    loss.eval()
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = loss(image, text, CONCEPTS)
    torch.testing.assert_close(loss(text, image, CONCEPTS), expected)
    torch.testing.assert_close(loss(image[order], text[order], CONCEPTS[order]), expected)


@pytest.mark.parametrize("kind", ["free", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_both_sides(embeddings, loss, kind, bf16):
    image, text = embeddings(kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        half = (x.bfloat16() if bf16 else x for x in (image, text))
        loss(*half, CONCEPTS).backward()
    for grad in (image.grad, text.grad):
        assert torch.isfinite(grad).all()
        assert grad.count_nonzero() > 0
    assert torch.isfinite(loss.table.centres).all()
