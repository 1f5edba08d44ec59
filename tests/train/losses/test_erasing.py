"""Which parts are erased, and the erasing loss, by hand and against loops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from train.embeddings import Embeddings, Erased
from train.losses.distances import both_directions, squared_distances
from train.losses.erasing import attended, erasing


def distances(image, text):
    return squared_distances(image.vector, text.vector)


def all_real(weights):
    return torch.ones_like(weights, dtype=torch.bool)


def test_the_attended_parts_stay_and_the_others_go():
    """Mean 0.25: the sign that must not be turned."""
    weights = torch.tensor([[0.05, 0.6, 0.25, 0.1]])
    assert attended(weights, all_real(weights), 1.0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0.0, [True, True, True, True]),
        (0.2, [True, True, True, True]),
        (0.3, [False, True, True, True]),
        (1.1, [False, True, False, False]),
        (2.4, [False, True, False, False]),
        (100.0, [False, True, False, False]),  # nothing reaches the threshold: the most attended part stays
    ],
)
def test_the_threshold_is_a_multiple_of_the_mean(keep, expected):
    weights = torch.tensor([[0.05, 0.6, 0.25, 0.1]])
    assert attended(weights, all_real(weights), keep).tolist() == [expected]


def test_the_mean_is_over_real_parts_and_padding_never_stays():
    """Real parts 0.2 and 0.4, mean 0.3; with the padding counted it would be 0.15, and both would stay."""
    weights = torch.tensor([[0.2, 0.4, 0.0, 0.0], [0.2, 0.4, 9.0, float("nan")]])
    mask = torch.tensor([[True, True, False, False]] * 2)
    assert attended(weights, mask, 1.0).tolist() == [[False, True, False, False]] * 2
    assert attended(weights, mask, 50.0).tolist() == [[False, True, False, False]] * 2


def test_a_row_without_real_parts_keeps_none():
    assert not attended(torch.rand(1, 3), torch.zeros(1, 3, dtype=torch.bool), 1.0).any()


@pytest.mark.parametrize("parts", [3, 7, 36, 49, 196])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_attention_keeps_all_parts_whatever_the_rounding(parts, dtype):
    weights = torch.full((2, parts), 1 / parts).to(dtype)
    assert attended(weights, all_real(weights), 1.0).all()


def test_attention_of_zero_on_every_part_keeps_all():
    assert attended(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 1.0).all()


def test_equally_attended_parts_stay_together():
    weights = torch.tensor([[0.4, 0.4, 0.2]])
    assert attended(weights, all_real(weights), 100.0).tolist() == [[True, True, False]]


def test_a_single_part_stays():
    assert attended(torch.tensor([[0.3]]), torch.ones(1, 1, dtype=torch.bool), 2.0).all()


def slow_attended(weights, mask, keep):
    kept = []
    for row, real in zip(weights, mask, strict=True):
        chosen = [k for k in range(len(row)) if real[k]]
        mean = sum(row[k] for k in chosen) / max(1, len(chosen))
        best = max((row[k] for k in chosen), default=None)
        kept.append([k in chosen and (row[k] >= keep * mean or row[k] == best) for k in range(len(row))])
    return kept


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.3, 3.0]))
def test_equals_a_loop_and_its_properties(seed, keep):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 9, (4, 6), generator=generator) / 8  # exact in binary, with ties
    mask = torch.rand(4, 6, generator=generator) < 0.7
    kept = attended(weights, mask, keep)
    assert kept.tolist() == slow_attended(weights.tolist(), mask.tolist(), keep)
    assert not (kept & ~mask).any()
    assert torch.equal(kept.any(1), mask.any(1))
    assert torch.equal(attended(8 * weights, mask, keep), kept)  # only proportions count
    order = torch.randperm(6, generator=generator)
    assert torch.equal(attended(weights[:, order], mask[:, order], keep), kept[:, order])
    assert not (attended(weights, mask, keep + 0.5) & ~kept).any()  # a higher threshold keeps no other part
    padded = attended(F.pad(weights, (0, 2), value=5.0), F.pad(mask, (0, 2)), keep)
    assert torch.equal(padded, F.pad(kept, (0, 2)))


@pytest.fixture
def batch(embeddings):
    """Whole pairs and their views as leaves, and two rows without dropped parts on each side."""
    image, text = embeddings()
    between = (image + text).detach() / 2  # so that some dropped parts match better than the whole, some worse
    views = [*embeddings(seed=1), *((between + noise.detach() / 2).requires_grad_() for noise in embeddings(seed=2))]
    erased = Erased(
        image_kept=Embeddings.of(views[0]),
        image_dropped=Embeddings.of(views[2]),
        text_kept=Embeddings.of(views[1]),
        text_dropped=Embeddings.of(views[3]),
        image_partial=torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool),
        text_partial=torch.tensor([0, 1, 1, 1, 0, 1, 1], dtype=torch.bool),
    )
    return Embeddings.of(image), Embeddings.of(text), erased


def mean_distance(squared):
    """A stand-in for a ranking loss that tells rows from columns."""
    return (squared * torch.arange(49.0).reshape(7, 7)).mean()


def run(batch, irrelevant=0.5):
    image, text, erased = batch
    full = distances(image, text).diagonal()
    return erasing(image, text, erased, distances, mean_distance, full, irrelevant)


def test_equals_a_loop(batch):
    image, text, erased = batch
    found, parts = run(batch, irrelevant=0.7)
    kept = (
        mean_distance(squared_distances(erased.image_kept.vector, text.vector))
        + mean_distance(squared_distances(image.vector, erased.text_kept.vector))
    ) / 2
    sides = []
    for dropped, partial, other, whole in (
        (erased.image_dropped, erased.image_partial, text, image),
        (erased.text_dropped, erased.text_partial, image, text),
    ):
        nearer = []
        for i in range(7):
            if partial[i]:
                own = (dropped.vector[i] - other.vector[i]).square().sum().item()
                nearer.append(max(0.0, (whole.vector[i] - other.vector[i]).square().sum().item() - own))
        sides.append(sum(nearer) / len(nearer))
    assert min(sides) > 0.1
    assert parts["kept"].item() == pytest.approx(kept.item(), rel=1e-5)
    assert parts["irrelevant"].item() == pytest.approx(sum(sides) / 2, rel=1e-5)
    assert found.item() == pytest.approx(kept.item() + 0.7 * sum(sides) / 2, rel=1e-5)
    assert not any(part.requires_grad for part in parts.values())


def test_dropped_parts_that_match_better_are_pushed_away_and_the_whole_pulled():
    """Caption at 0, whole image at 2, dropped parts at 1: [4 - 1]₊, gradient 2·2 on the whole, -2·1 on the dropped."""
    whole, dropped, text = (torch.tensor([[x]], requires_grad=True) for x in (2.0, 1.0, 0.0))
    none = Embeddings.of(torch.zeros(1, 1))
    erased = Erased(none, Embeddings.of(dropped), none, none, torch.tensor([True]), torch.tensor([False]))
    image, caption = Embeddings.of(whole), Embeddings.of(text)
    full = distances(image, caption).diagonal()
    found, parts = erasing(image, caption, erased, distances, lambda squared: 0 * squared.sum(), full, 1.0)
    found.backward()
    assert parts["irrelevant"].item() == 3.0 / 2
    assert (whole.grad.item(), dropped.grad.item()) == (4.0 / 2, -2.0 / 2)


def test_dropped_parts_that_match_worse_cost_nothing():
    whole, dropped = torch.tensor([[1.0]]), torch.tensor([[2.0]], requires_grad=True)
    text = none = Embeddings.of(torch.zeros(1, 1))
    erased = Erased(none, Embeddings.of(dropped), none, none, torch.tensor([True]), torch.tensor([False]))
    image = Embeddings.of(whole)
    full = distances(image, text).diagonal()
    found, _ = erasing(image, text, erased, distances, lambda squared: 0 * squared.sum(), full, 1.0)
    found.backward()
    assert found.item() == 0
    assert dropped.grad.item() == 0


def test_rows_without_dropped_parts_are_not_compared(batch):
    """They may hold anything, and their gradient stays finite."""
    image, text, erased = batch
    _, expected = run(batch)
    spoiled = erased.image_dropped.vector.detach().clone()
    spoiled[~erased.image_partial] = torch.nan
    spoiled.requires_grad_()
    erased = Erased(**{**vars(erased), "image_dropped": Embeddings.of(spoiled)})
    found, parts = run((image, text, erased))
    found.backward()
    assert parts["irrelevant"].item() == expected["irrelevant"].item()
    assert spoiled.grad[~erased.image_partial].count_nonzero() == 0
    assert torch.isfinite(image.vector.grad).all()


def test_a_batch_whose_every_part_is_attended_only_ranks(batch):
    image, text, erased = batch
    nowhere = torch.zeros(7, dtype=torch.bool)
    erased = Erased(**{**vars(erased), "image_partial": nowhere, "text_partial": nowhere})
    found, parts = run((image, text, erased))
    assert parts["irrelevant"].item() == 0
    assert found.item() == parts["kept"].item()


def test_a_weight_of_zero_leaves_the_ranking(batch):
    found, parts = run(batch, irrelevant=0.0)
    assert found.item() == parts["kept"].item()
    assert parts["irrelevant"].item() > 0


def test_swapping_modalities_changes_nothing(batch):
    image, text, erased = batch
    swapped = Erased(
        erased.text_kept,
        erased.text_dropped,
        erased.image_kept,
        erased.image_dropped,
        erased.text_partial,
        erased.image_partial,
    )
    full = distances(image, text).diagonal()

    def rank(squared):
        return both_directions(lambda positive, d, *_: (positive[:, None] - d).tanh().mean(), squared, squared, full)

    expected, _ = erasing(image, text, erased, distances, rank, full, 0.5)
    found, _ = erasing(text, image, swapped, distances, rank, full, 0.5)
    torch.testing.assert_close(found, expected)


def test_gradients_reach_every_view(batch):
    image, text, erased = batch
    run(batch)[0].backward()
    for side in (image, text, erased.image_kept, erased.image_dropped, erased.text_kept, erased.text_dropped):
        assert torch.isfinite(side.vector.grad).all()
        assert side.vector.grad.count_nonzero() > 0
