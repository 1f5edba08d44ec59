"""SigLIP against a loop, by hand, and its properties."""

import math

import pytest
import torch

from train.config import MarginConfig, SigLIPConfig
from train.losses.distances import both_directions, squared_distances
from train.losses.siglip import SigLIPLoss

NONE = torch.tensor(0.0)


def batch_siglip(loss, distances, image_ids):
    return both_directions(loss, distances, image_ids[:, None] != image_ids, NONE)


def slow_siglip(image, text, image_ids, tau, bias):
    """Algorithm 1 of the paper on unit vectors, other captions of an image left out."""
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            if i != j and image_ids[i] == image_ids[j]:
                continue
            sign = 1 if i == j else -1
            logit = sum(a * b for a, b in zip(image[i], text[j], strict=True)) / tau + bias
            total += math.log1p(math.exp(-sign * logit))
    return total / len(image)


def test_equals_a_loop(embeddings, image_ids):
    image, text = embeddings(kind="unit")
    loss = SigLIPLoss(SigLIPConfig(temperature=0.2, bias=-3.0))
    expected = slow_siglip(image.tolist(), text.tolist(), image_ids.tolist(), 0.2, -3.0)
    assert expected > 0.1
    assert batch_siglip(loss, squared_distances(image, text), image_ids).item() == pytest.approx(expected, rel=1e-5)


def test_by_hand():
    """s+ = 1/2 and one negative at s = 0, tau 1, bias 0; the masked candidate is not looked at."""
    found = SigLIPLoss(SigLIPConfig(temperature=1.0, bias=0.0))(
        torch.tensor([1.0]), torch.tensor([[2.0, 0.0]]), torch.tensor([[True, False]]), NONE
    )
    assert found.item() == pytest.approx(0.5 * (math.log(1 + math.exp(-0.5)) + math.log(2)))


def test_a_margin_brings_negatives_nearer():
    loss = SigLIPLoss(SigLIPConfig(temperature=1.0, bias=0.0))
    positive, negatives = torch.tensor([1.0]), torch.tensor([[True, True]])
    found = loss(positive, torch.tensor([[2.0, 3.0]]), negatives, torch.tensor([[0.5, 0.1]]))
    torch.testing.assert_close(found, loss(positive, torch.tensor([[1.5, 2.9]]), negatives, NONE))


def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings, image_ids):
    image, text = embeddings(kind="unit")
    loss = SigLIPLoss(SigLIPConfig())
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = batch_siglip(loss, squared_distances(image, text), image_ids)
    torch.testing.assert_close(batch_siglip(loss, squared_distances(text, image), image_ids), expected)
    shuffled = batch_siglip(loss, squared_distances(image[order], text[order]), image_ids[order])
    torch.testing.assert_close(shuffled, expected)


@pytest.mark.parametrize("kind", ["free", "unit", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_both_sides_and_what_is_learned(embeddings, image_ids, kind, bf16):
    image, text = embeddings(kind=kind)
    loss = SigLIPLoss(SigLIPConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        batch_siglip(loss, squared_distances(image, text), image_ids).backward()
    for grad in (image.grad, text.grad, loss.log_scale.grad, loss.bias.grad):
        assert torch.isfinite(grad).all()
        assert kind == "collapsed" or grad.count_nonzero() > 0


def test_what_is_learned_starts_as_configured_and_is_in_the_checkpoint():
    loss = SigLIPLoss(SigLIPConfig(temperature=0.2, bias=-4.0, margin=MarginConfig(form="A")))
    found = loss.learned()
    assert {name: value.item() for name, value in found.items()} == pytest.approx({"temperature": 0.2, "bias": -4.0})
    assert not any(value.requires_grad for value in found.values())
    assert set(loss.state_dict()) == {"log_scale", "bias", "margin.average"}
    assert all(parameter.requires_grad for parameter in loss.parameters())
    assert not any(parameter.requires_grad for parameter in SigLIPLoss(SigLIPConfig(learn=False)).parameters())


def test_the_default_has_no_margin():
    margin = SigLIPLoss(SigLIPConfig()).margin
    assert margin(torch.rand(3, 3), ~torch.eye(3, dtype=torch.bool), torch.zeros(3, 0)).item() == 0


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"found SigLIP temperature 0.0; expected above 0"):
        SigLIPLoss(SigLIPConfig(temperature=0.0))
