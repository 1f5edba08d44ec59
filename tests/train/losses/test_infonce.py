"""InfoNCE against a loop, a closed form, and its properties."""

import math

import pytest
import torch
import torch.nn.functional as F

from train.config import InfoNCEConfig
from train.losses.distances import negative_pairs, squared_distances
from train.losses.infonce import InfoNCELoss


def slow_infonce(distances, image_ids, tau):
    size, total = len(distances), 0.0
    for direction in ("image", "text"):
        for i in range(size):
            allowed = [j for j in range(size) if j == i or image_ids[i] != image_ids[j]]
            logits = {j: -(distances[i][j] if direction == "image" else distances[j][i]) / (2 * tau) for j in allowed}
            total += math.log(sum(math.exp(x) for x in logits.values())) - logits[i]
    return total / (2 * size)


def test_equals_a_loop(embeddings, image_ids):
    d = squared_distances(*embeddings()).detach()
    found = InfoNCELoss(InfoNCEConfig(temperature=0.5))(d, negative_pairs(image_ids))
    assert found.item() == pytest.approx(slow_infonce(d.tolist(), image_ids.tolist(), 0.5), rel=1e-5)


def test_for_unit_vectors_it_is_the_cross_entropy_of_cosines(embeddings):
    image, text = embeddings(kind="unit")
    found = InfoNCELoss(InfoNCEConfig(temperature=0.07))(
        squared_distances(image, text), negative_pairs(torch.arange(7))
    )
    logits, target = image @ text.T / 0.07, torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(found, expected)


def test_of_a_collapsed_model_is_log_b(embeddings):
    d = squared_distances(*embeddings(kind="collapsed"))
    found = InfoNCELoss(InfoNCEConfig())(d, negative_pairs(torch.arange(7)))
    assert found.item() == pytest.approx(math.log(7))


def test_pairs_of_one_image_leave_the_softmax(embeddings):
    d = squared_distances(*embeddings(3))
    loss = InfoNCELoss(InfoNCEConfig())
    assert loss(d, negative_pairs(torch.tensor([1, 1, 1]))).item() == pytest.approx(0.0, abs=1e-7)


def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings, image_ids):
    image, text = embeddings()
    loss = InfoNCELoss(InfoNCEConfig(temperature=1.0))
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = loss(squared_distances(image, text), negative_pairs(image_ids))
    torch.testing.assert_close(loss(squared_distances(text, image), negative_pairs(image_ids)), expected)
    shuffled = loss(squared_distances(image[order], text[order]), negative_pairs(image_ids[order]))
    torch.testing.assert_close(shuffled, expected)


@pytest.mark.parametrize("kind", ["free", "unit", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_both_sides_and_the_temperature(embeddings, image_ids, kind, bf16):
    image, text = embeddings(kind=kind)
    loss = InfoNCELoss(InfoNCEConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss(squared_distances(image, text), negative_pairs(image_ids)).backward()
    for grad in (image.grad, text.grad, loss.log_scale.grad):
        assert torch.isfinite(grad).all()
        assert kind == "collapsed" or grad.count_nonzero() > 0


def test_the_scale_stops_at_100_and_can_come_back(embeddings):
    loss = InfoNCELoss(InfoNCEConfig())
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    loss(squared_distances(*embeddings()), negative_pairs(torch.arange(7))).backward()
    assert loss.temperature.item() == pytest.approx(0.01)
    assert loss.log_scale.grad.item() != 0


def test_the_temperature_is_in_the_checkpoint_and_learned_only_if_asked():
    loss = InfoNCELoss(InfoNCEConfig(temperature=0.2))
    assert loss.temperature.item() == pytest.approx(0.2)
    assert not loss.temperature.requires_grad
    assert list(loss.state_dict()) == ["log_scale"]
    assert loss.log_scale.requires_grad
    assert not InfoNCELoss(InfoNCEConfig(learn=False)).log_scale.requires_grad


def test_a_temperature_below_the_bound_is_refused():
    with pytest.raises(ValueError, match=r"found InfoNCE temperature 0.001; expected at least 0.01"):
        InfoNCELoss(InfoNCEConfig(temperature=0.001))
