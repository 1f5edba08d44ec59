"""Both forms of the center loss against loops, by hand, and their properties."""

import math

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


def build(form="batch", **settings):
    return CenterLoss(CenterConfig(weight=1.0, form=form, **settings), 8, 6)


def slow_batch_form(image, text, concepts, *, slack, delta, push):
    """Embedding by embedding, pair of concepts by pair of concepts."""
    members = {c: [] for c in concepts}
    for rows in (image, text):
        for row, concept in zip(rows, concepts, strict=True):
            members[concept].append(row)
    means = {c: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for c, rows in members.items()}
    pull = 0.0
    for rows in (image, text):
        for row, concept in zip(rows, concepts, strict=True):
            pull += 0.5 * max(math.dist(row, means[concept]) - slack, 0.0) ** 2 / len(concepts)
    pairs = [(a, b) for a in means for b in means if a != b]
    apart = sum(max(2 * delta - math.dist(means[a], means[b]), 0.0) ** 2 for a, b in pairs)
    return pull + push * apart / max(len(pairs), 1)


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


@pytest.mark.parametrize("form", ["table", "batch"])
def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings, form):
    image, text = embeddings()
    loss = build(form, delta=2.0).eval()
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected = loss(image, text, CONCEPTS)
    torch.testing.assert_close(loss(text, image, CONCEPTS), expected)
    torch.testing.assert_close(loss(image[order], text[order], CONCEPTS[order]), expected)


@pytest.mark.parametrize("kind", ["free", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_of_the_table_form_are_finite_and_reach_both_sides(embeddings, loss, kind, bf16):
    image, text = embeddings(kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        half = (x.bfloat16() if bf16 else x for x in (image, text))
        loss(*half, CONCEPTS).backward()
    for grad in (image.grad, text.grad):
        assert torch.isfinite(grad).all()
        assert grad.count_nonzero() > 0
    assert torch.isfinite(loss.table.centres).all()


@pytest.mark.parametrize(
    ("slack", "delta", "push"), [(0.0, 2.0, 1.0), (1.5, 1.8, 0.3), (0.0, 0.1, 1.0), (0.0, 2.0, 0.0)]
)
def test_the_batch_form_equals_a_loop(embeddings, slack, delta, push):
    image, text = embeddings()
    found = build(slack=slack, delta=delta, push=push)(image, text, CONCEPTS)
    expected = slow_batch_form(image.tolist(), text.tolist(), CONCEPTS.tolist(), slack=slack, delta=delta, push=push)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_batch_form_by_hand():
    """Concept 0: 0 and 2, mean 1; concept 4: 4 and 4. Pull ½ (½ 1 + ½ 1); means 3 apart, [2 · 2 - 3]² = 1."""
    image, text, concepts = torch.tensor([[0.0], [4.0]]), torch.tensor([[2.0], [4.0]]), torch.tensor([0, 4])
    loss = CenterLoss(CenterConfig(weight=1.0, form="batch", delta=2.0, push=10.0), 1, 5)
    assert loss(image, text, concepts).item() == pytest.approx(0.5 + 10.0)
    slack = CenterLoss(CenterConfig(weight=1.0, form="batch", slack=0.5, push=0.0), 1, 5)
    assert slack(image, text, concepts).item() == pytest.approx(0.125)


def test_the_pull_of_the_batch_form_is_that_of_a_table_that_holds_the_means(embeddings):
    image, text = embeddings()
    table = build("table").eval()
    for concept in CONCEPTS.unique():
        rows = torch.cat((image, text)).detach()[torch.cat((CONCEPTS, CONCEPTS)) == concept]
        table.table.centres[concept] = rows.mean(0)
    torch.testing.assert_close(build(push=0.0)(image, text, CONCEPTS), table(image, text, CONCEPTS))


def test_the_batch_form_holds_no_state_and_needs_no_known_concepts(embeddings):
    loss = build()
    assert not loss.state_dict()
    large = CONCEPTS + 10**12
    torch.testing.assert_close(loss(*embeddings(), large), loss(*embeddings(), CONCEPTS))


def test_one_concept_has_nobody_to_push(embeddings):
    image, text = embeddings()
    one = torch.zeros(7, dtype=torch.int64)
    torch.testing.assert_close(build(delta=50.0)(image, text, one), build(push=0.0)(image, text, one))


def test_far_concepts_are_left_alone_and_close_ones_part(embeddings):
    image, text = embeddings()
    far = build(delta=1e-3)(image, text, CONCEPTS)
    torch.testing.assert_close(far, build(push=0.0)(image, text, CONCEPTS))
    image, text = (torch.tensor([[0.0], [0.1]], requires_grad=True) for _ in range(2))
    CenterLoss(CenterConfig(weight=1.0, form="batch"), 1, 2)(image, text, torch.tensor([0, 1])).backward()
    assert image.grad[0] > 0 > image.grad[1]  # a step against the gradient
    torch.testing.assert_close(image.grad, text.grad)


def test_gradient_of_the_batch_form_flows_through_the_means():
    """Numerically, in float64, with repeats and slack; without slack the means' own share of the pull cancels."""
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    concepts, step = torch.tensor([0, 1, 0, 2, 1]), 1e-3
    settings = {"slack": 0.4, "delta": 1.5, "push": 0.7}
    loss = CenterLoss(CenterConfig(weight=1.0, form="batch", **settings), 3, 3)
    loss(image, text, concepts).backward()

    def at(shift):
        moved = image.detach().clone()
        moved[2, 1] += shift
        return slow_batch_form(moved.tolist(), text.tolist(), concepts.tolist(), **settings)

    assert image.grad[2, 1].item() == pytest.approx((at(step) - at(-step)) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("kind", ["free", "unit", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_of_the_batch_form_are_finite_and_reach_both_sides(embeddings, kind, bf16):
    image, text = embeddings(kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        half = (x.bfloat16() if bf16 else x for x in (image, text))
        build(delta=2.0)(*half, CONCEPTS).backward()
    for grad in (image.grad, text.grad):
        assert torch.isfinite(grad).all()
        assert kind == "collapsed" or grad.count_nonzero() > 0


def test_means_that_nearly_coincide_are_pushed_no_harder_than_others():
    """The push's gradient on a mean is 2 (2 delta - d) of unit length, however small d."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(64, generator=generator)
    rows = (base + 1e-4 * torch.randn(2, 64, generator=generator)).requires_grad_()
    loss = CenterLoss(CenterConfig(weight=1.0, form="batch", delta=0.5), 64, 2)
    loss(rows, rows.detach(), torch.tensor([0, 1])).backward()
    assert rows.grad[0].norm().item() == pytest.approx(0.5 * 2 * 1.0, rel=1e-2)  # half of the mean is the image


@pytest.mark.parametrize(("setting", "value"), [("slack", -0.1), ("delta", 0.0), ("push", -1.0)])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}.*expected slack and push of 0 or more, delta above 0"):
        build(**{setting: value})
