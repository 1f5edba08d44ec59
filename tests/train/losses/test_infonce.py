"""InfoNCE, plain, weighted and with a margin, against a loop, closed forms, and its properties."""

import math

import pytest
import torch
import torch.nn.functional as F

from train.config import InfoNCEConfig, MarginConfig
from train.losses.distances import both_directions, squared_distances
from train.losses.infonce import InfoNCELoss

NONE = torch.tensor(0.0)


def negative_pairs(image_ids):
    return image_ids[:, None] != image_ids


def batch_infonce(loss, distances, negatives, margin=NONE):
    return both_directions(loss, distances, negatives, margin)


def slow_infonce(distances, image_ids, tau, beta=0.0, margin=0.0):
    size, total = len(distances), 0.0
    for direction in ("image", "text"):
        for i in range(size):
            d = [distances[i][j] if direction == "image" else distances[j][i] for j in range(size)]
            others = [j for j in range(size) if image_ids[i] != image_ids[j]]
            hardness = sum(math.exp(-beta * d[j] / 2) for j in others)
            weights = {j: len(others) * math.exp(-beta * d[j] / 2) / hardness for j in others}
            pair = math.exp(-d[i] / 2 / tau)
            total -= math.log(pair / (pair + sum(weights[j] * math.exp(-(d[j] - margin) / 2 / tau) for j in others)))
    return total / (2 * size)


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_equals_a_loop(embeddings, image_ids, beta, margin):
    d = squared_distances(*embeddings()).detach()
    loss = InfoNCELoss(InfoNCEConfig(temperature=0.5, hardness=beta))
    found = batch_infonce(loss, d, negative_pairs(image_ids), torch.tensor(margin))
    expected = slow_infonce(d.tolist(), image_ids.tolist(), 0.5, beta, margin)
    assert expected > 0.01
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_weights_tend_to_one_as_the_hardness_tends_to_zero(embeddings, image_ids):
    d, negatives = squared_distances(*embeddings()).detach().double(), negative_pairs(image_ids)
    plain, nearly = (InfoNCELoss(InfoNCEConfig(temperature=0.5, hardness=beta)) for beta in (0.0, 1e-9))
    torch.testing.assert_close(
        batch_infonce(nearly, d, negatives), batch_infonce(plain, d, negatives), rtol=1e-6, atol=0
    )


def test_weights_by_hand():
    """Two negatives at s = 0 and s = -ln 3 with beta 1: softmax 3/4 and 1/4, weights 3/2 and 1/2; tau 1, s+ = 0."""
    found = InfoNCELoss(InfoNCEConfig(temperature=1.0, hardness=1.0))(
        torch.tensor([0.0]), torch.tensor([[0.0, 2 * math.log(3)]]), torch.ones(1, 2, dtype=torch.bool), NONE
    )
    assert found.item() == pytest.approx(0.5 * math.log(1 + 3 / 2 * 1 + 1 / 2 * 1 / 3))


def test_weights_are_held_constant():
    """With s_j = s+ for one negative the weight is 1 and stays 1: the gradient is that of plain InfoNCE."""
    gradients = []
    for beta in (0.0, 5.0):
        d = torch.tensor([[0.4, 1.0]], requires_grad=True)
        loss = InfoNCELoss(InfoNCEConfig(temperature=1.0, hardness=beta))
        loss(torch.tensor([0.4]), d, torch.ones(1, 2, dtype=torch.bool), NONE).backward()
        gradients.append((loss.log_scale.grad, d.grad))
    # The share of a negative in the softmax, times d(-d2/2)/d(d2), times the half of a direction.
    near, far = math.exp(-0.2), math.exp(-0.5)
    weights = [2 * math.exp(-5 * x / 2) / (math.exp(-1.0) + math.exp(-2.5)) for x in (0.4, 1.0)]
    parts = [near, weights[0] * near, weights[1] * far]
    expected = [[-0.25 * part / sum(parts) for part in parts[1:]]]
    torch.testing.assert_close(gradients[1][1], torch.tensor(expected))
    assert not torch.allclose(gradients[0][1], gradients[1][1], rtol=0.1)


def test_a_margin_per_pair_is_taken_from_the_negatives_distances_only():
    margin = torch.tensor([[9.0, 0.5, 0.2]])
    d = torch.tensor([[1.0, 2.0, 3.0]])
    negatives = torch.tensor([[False, True, True]])
    loss = InfoNCELoss(InfoNCEConfig(temperature=0.5))
    expected = loss(torch.tensor([1.0]), torch.tensor([[1.0, 1.5, 2.8]]), negatives, NONE)
    torch.testing.assert_close(loss(torch.tensor([1.0]), d, negatives, margin), expected)


def test_weights_are_of_the_distances_without_the_margin():
    """Two negatives at d2 = 2, so both weigh 1; a margin of 2 on the first lifts it to s = 0; tau 1, s+ = 0."""
    found = InfoNCELoss(InfoNCEConfig(temperature=1.0, hardness=3.0))(
        torch.tensor([0.0]), torch.tensor([[2.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[2.0, 0.0]])
    )
    assert found.item() == pytest.approx(0.5 * math.log(1 + 1 + math.exp(-1)))


def test_an_anchor_without_negatives_adds_nothing():
    d = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = InfoNCELoss(InfoNCEConfig(hardness=1.0))
    found = loss(torch.tensor([1.0]), d, torch.zeros(1, 2, dtype=torch.bool), NONE)
    found.backward()
    assert found.item() == 0
    assert d.grad.tolist() == [[0, 0]]


def test_the_default_has_no_margin_and_an_adaptive_one_is_in_the_checkpoint():
    d, negatives = torch.rand(3, 3), ~torch.eye(3, dtype=torch.bool)
    assert InfoNCELoss(InfoNCEConfig()).margin(d, negatives, torch.zeros(3, 0)).item() == 0
    loss = InfoNCELoss(InfoNCEConfig(margin=MarginConfig(form="A")))
    assert set(loss.state_dict()) == {"log_scale", "margin.average"}


def test_for_unit_vectors_it_is_the_cross_entropy_of_cosines(embeddings):
    image, text = embeddings(kind="unit")
    found = batch_infonce(
        InfoNCELoss(InfoNCEConfig(temperature=0.07)), squared_distances(image, text), negative_pairs(torch.arange(7))
    )
    logits, target = image @ text.T / 0.07, torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(found, expected)


def test_of_a_collapsed_model_is_log_b(embeddings):
    d = squared_distances(*embeddings(kind="collapsed"))
    found = batch_infonce(InfoNCELoss(InfoNCEConfig()), d, negative_pairs(torch.arange(7)))
    assert found.item() == pytest.approx(math.log(7))


def test_pairs_of_one_image_leave_the_softmax(embeddings):
    d = squared_distances(*embeddings(3))
    loss = InfoNCELoss(InfoNCEConfig())
    assert batch_infonce(loss, d, negative_pairs(torch.tensor([1, 1, 1]))).item() == pytest.approx(0.0, abs=1e-7)


def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings, image_ids):
    image, text = embeddings()
    loss = InfoNCELoss(InfoNCEConfig(temperature=1.0))
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = batch_infonce(loss, squared_distances(image, text), negative_pairs(image_ids))
    swapped = batch_infonce(loss, squared_distances(text, image), negative_pairs(image_ids))
    torch.testing.assert_close(swapped, expected)
    shuffled = batch_infonce(loss, squared_distances(image[order], text[order]), negative_pairs(image_ids[order]))
    torch.testing.assert_close(shuffled, expected)


@pytest.mark.parametrize("kind", ["free", "unit", "collapsed"])
@pytest.mark.parametrize("hardness", [0.0, 20.0])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_both_sides_and_the_temperature(embeddings, image_ids, kind, hardness, bf16):
    image, text = embeddings(kind=kind)
    loss = InfoNCELoss(InfoNCEConfig(hardness=hardness))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        batch_infonce(loss, squared_distances(image, text), negative_pairs(image_ids)).backward()
    for grad in (image.grad, text.grad, loss.log_scale.grad):
        assert torch.isfinite(grad).all()
        assert kind == "collapsed" or grad.count_nonzero() > 0


def test_the_scale_stops_at_100_and_can_come_back(embeddings):
    loss = InfoNCELoss(InfoNCEConfig())
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    batch_infonce(loss, squared_distances(*embeddings()), negative_pairs(torch.arange(7))).backward()
    assert loss.learned()["temperature"].item() == pytest.approx(0.01)
    assert loss.log_scale.grad.item() != 0


def test_the_temperature_is_in_the_checkpoint_and_learned_only_if_asked():
    loss = InfoNCELoss(InfoNCEConfig(temperature=0.2))
    assert loss.learned()["temperature"].item() == pytest.approx(0.2)
    assert not loss.learned()["temperature"].requires_grad
    assert list(loss.state_dict()) == ["log_scale"]
    assert loss.log_scale.requires_grad
    assert not InfoNCELoss(InfoNCEConfig(learn=False)).log_scale.requires_grad


def test_a_temperature_below_the_bound_is_refused():
    with pytest.raises(ValueError, match=r"found InfoNCE temperature 0.001; expected at least 0.01"):
        InfoNCELoss(InfoNCEConfig(temperature=0.001))


def test_a_hardness_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"found InfoNCE hardness -1.0; expected 0 \(all negatives alike\) or more"):
        InfoNCELoss(InfoNCEConfig(hardness=-1.0))
