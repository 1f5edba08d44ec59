"""The hinge against a loop, by hand, and its properties."""

from functools import partial

import pytest
import torch

from train.config import HingeConfig, MarginConfig
from train.losses.distances import both_directions, squared_distances
from train.losses.hinge import HingeLoss, hinge

MININGS = ["hardest", "sum", "mean", "weighted"]


def negative_pairs(image_ids):
    return image_ids[:, None] != image_ids


def batch_hinge(distances, negatives, margin, mining):
    return both_directions(partial(hinge, mining=mining), distances, negatives, margin)


def slow_hinge(distances, image_ids, margin, mining):
    """Two loops over anchors, one over their negatives."""
    size, total = len(distances), 0.0
    for direction in ("image", "text"):
        for i in range(size):
            violations = []
            for j in range(size):
                if image_ids[i] != image_ids[j]:
                    other = distances[i][j] if direction == "image" else distances[j][i]
                    violations.append(max(0.0, margin[i][j] + distances[i][i] - other))
            active = [v for v in violations if v > 0]
            if active:
                weights = [v**2 if mining == "weighted" else 1.0 for v in active]
                mean = sum(w * v for w, v in zip(weights, active, strict=True)) / sum(weights)
                total += {"hardest": max(active), "sum": sum(active)}.get(mining, mean) / size
    return total


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("pairwise", [True, False])
def test_equals_a_loop(embeddings, image_ids, mining, pairwise):
    d = squared_distances(*embeddings()).detach()
    margin = torch.tensor(2.0)
    if pairwise:
        r = torch.rand(7, 7, generator=torch.Generator().manual_seed(3))
        margin = 4 * (r + r.T)
    expected = slow_hinge(d.tolist(), image_ids.tolist(), margin.expand(7, 7).tolist(), mining)
    found = batch_hinge(d, negative_pairs(image_ids), margin, mining)
    assert expected > 0.1
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_by_hand():
    """Margin 1: anchors 0 and 1 violate by 2 and 1.5 as images, by 1.5 and 2 as captions; pair 2 is far."""
    d = torch.tensor([[1.0, 0.0, 9.0], [0.5, 1.0, 9.0], [9.0, 9.0, 1.0]])
    negatives = negative_pairs(torch.arange(3))
    found = batch_hinge(d, negatives, torch.tensor(1.0), "hardest")
    assert found.item() == pytest.approx((2 + 1.5 + 0) / 3 + (1.5 + 2 + 0) / 3)


@pytest.mark.parametrize(("mining", "anchor"), [("mean", (2 + 1) / 2), ("sum", 2 + 1)])
def test_mean_and_sum_are_of_violations_not_of_negatives(mining, anchor):
    """Image anchor 0 violates by 2 and 1, captions 1 and 2 against image 0 by the same; all else is far."""
    d = torch.full((4, 4), 50.0).fill_diagonal_(1.0)
    d[0] = torch.tensor([1.0, 0.0, 1.0, 50.0])
    found = batch_hinge(d, negative_pairs(torch.arange(4)), torch.tensor(1.0), mining)
    assert found.item() == pytest.approx((anchor + (2 + 1)) / 4)


def test_in_the_sum_every_violation_pulls_alike():
    """An anchor with many violations weighs more than one with few, as in VSE0; in the mean both weigh the same."""
    distances = torch.tensor([[0.5, 9.0, 9.0], [0.5, 0.5, 0.5]], requires_grad=True)
    negatives = torch.ones(2, 3, dtype=torch.bool)
    for mining, expected in (("sum", [0.5, 1.5]), ("mean", [0.5, 0.5])):
        found = hinge(torch.ones(2), distances, negatives, torch.tensor(0.2), mining)
        gradient = torch.autograd.grad(found, distances)[0]
        torch.testing.assert_close(-gradient.sum(1), torch.tensor(expected))


def test_weights_are_squares_of_violations():
    """Image anchor 0 violates by 2 and 1: (4 * 2 + 1 * 1) / (4 + 1)."""
    d = torch.full((4, 4), 50.0).fill_diagonal_(1.0)
    d[0] = torch.tensor([1.0, 0.0, 1.0, 50.0])
    found = batch_hinge(d, negative_pairs(torch.arange(4)), torch.tensor(1.0), "weighted")
    assert found.item() == pytest.approx((9 / 5 + 2 + 1) / 4)


def test_the_end_of_the_warm_up_keeps_the_size_of_the_gradient(embeddings):
    sizes = {}
    for mining in MININGS:
        image, text = embeddings(64, 16, kind="unit")
        d = squared_distances(image, text)
        batch_hinge(d, negative_pairs(torch.arange(64)), torch.tensor(0.2), mining).backward()
        sizes[mining] = image.grad.norm().item()
    assert 0.2 < sizes["hardest"] / sizes["mean"] < 5
    assert 0.2 < sizes["weighted"] / sizes["mean"] < 5


@pytest.mark.parametrize("mining", MININGS)
def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings, image_ids, mining):
    image, text = embeddings()
    margin = torch.tensor(2.0)

    def value(u, v, ids):
        return batch_hinge(squared_distances(u, v), negative_pairs(ids), margin, mining)

    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = value(image, text, image_ids)
    torch.testing.assert_close(value(text, image, image_ids), expected)
    torch.testing.assert_close(value(image[order], text[order], image_ids[order]), expected)


@pytest.mark.parametrize("mining", MININGS)
def test_a_pair_of_the_same_image_is_never_pushed(embeddings, mining):
    image, text = embeddings(2)
    d = squared_distances(image, text)
    found = batch_hinge(d, negative_pairs(torch.tensor([8, 8])), torch.tensor(50.0), mining)
    found.backward()
    assert found.item() == 0
    assert image.grad.count_nonzero() == 0


def test_a_satisfied_batch_costs_nothing():
    d = torch.full((3, 3), 9.0).fill_diagonal_(1.0)
    assert batch_hinge(d, negative_pairs(torch.arange(3)), torch.tensor(0.5), "hardest").item() == 0


@pytest.mark.parametrize("kind", ["free", "unit", "collapsed"])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_both_sides(embeddings, image_ids, kind, mining, bf16):
    image, text = embeddings(kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        d = squared_distances(image, text)
        loss = batch_hinge(d, negative_pairs(image_ids), torch.tensor(3.0), mining)
    loss.backward()
    assert loss.item() > 0
    for grad in (image.grad, text.grad):
        assert torch.isfinite(grad).all()
        assert kind == "collapsed" or grad.count_nonzero() > 0


@pytest.mark.parametrize(
    ("mining", "progress", "used", "not_used"),
    [
        ("hardest", 0.29, "mean", "hardest"),
        ("hardest", 0.3, "hardest", "mean"),
        ("weighted", 0.29, "mean", "weighted"),
        ("weighted", 0.3, "weighted", "mean"),
        ("mean", 1.0, "mean", "hardest"),
        ("sum", 0.0, "sum", "mean"),
    ],
)
def test_mining_waits_for_the_warm_up(embeddings, image_ids, mining, progress, used, not_used):
    d, negatives = squared_distances(*embeddings()), negative_pairs(image_ids)
    arguments = (d.diagonal(), d, negatives, torch.tensor(2.0))
    found = HingeLoss(HingeConfig(mining=mining, warmup=0.3))(*arguments, progress)
    torch.testing.assert_close(found, hinge(*arguments, used))
    assert found.item() != hinge(*arguments, not_used).item()


@pytest.mark.parametrize("mining", MININGS)
def test_candidates_need_not_be_partners(mining):
    """Anchor 0 violates by 1 and 2, anchor 1 by 3 against the second of three candidates; the rest is far or masked."""
    found = hinge(
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0, 0.0, 90.0], [90.0, 0.0, 0.0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
        torch.tensor(1.0),
        mining,
    )
    first = {"hardest": 2.0, "sum": 3.0, "mean": 1.5, "weighted": (1 + 8) / 5}[mining]
    assert found.item() == pytest.approx((first + 3) / 2)


def test_the_margin_is_part_of_the_checkpoint():
    assert list(HingeLoss(HingeConfig(margin=MarginConfig(form="C"))).state_dict()) == ["margin.average"]


@pytest.mark.parametrize("warmup", [-0.1, 5.0])
def test_a_warm_up_that_is_no_share_is_refused(warmup):
    with pytest.raises(ValueError, match=f"found hinge warmup {warmup}; expected a share of training, 0 to 1"):
        HingeLoss(HingeConfig(warmup=warmup))
