"""The four forms of the margin against closed forms."""

import pytest
import torch

from train.config import MarginConfig
from train.margin import Margin

NEGATIVES = ~torch.eye(2, dtype=torch.bool)
# Captions at cosine 0.6.
SEMANTIC = torch.tensor([[1.0, 0.0], [0.6, 0.8]])


def distances(gap, pair=0.5):
    return torch.full((2, 2), pair + gap).fill_diagonal_(pair)


def test_fixed_is_the_start_and_has_no_state():
    margin = Margin(MarginConfig(form="fixed", start=0.3))
    assert margin(distances(1.0), NEGATIVES, SEMANTIC).item() == pytest.approx(0.3)
    assert margin.state_dict() == {}


def test_form_a_follows_the_closed_form_of_the_average():
    """average_t = decay^t start / weight + (1 - decay) sum_k decay^(t - k) gap_k; margin = weight average."""
    config = MarginConfig(form="A", start=0.2, weight=0.4, decay=0.9, low=0.0, high=10.0)
    margin, gaps = Margin(config), [1.0, 2.0, 0.5, 3.0]
    for t in range(1, 5):
        found = margin(distances(gaps[t - 1]), NEGATIVES, SEMANTIC).item()
        average = 0.9**t * 0.2 / 0.4 + 0.1 * sum(0.9 ** (t - k) * gaps[k - 1] for k in range(1, t + 1))
        assert found == pytest.approx(0.4 * average, rel=1e-5)


def test_form_a_begins_at_the_start_without_bias_to_zero():
    margin = Margin(MarginConfig(form="A", start=0.2, weight=0.5))
    assert margin.eval()(distances(1.0), NEGATIVES, SEMANTIC).item() == pytest.approx(0.2)
    margin.train()
    for _ in range(50):  # a gap of start / weight keeps it there
        assert margin(distances(0.4), NEGATIVES, SEMANTIC).item() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize(("gap", "bound"), [(-5.0, 0.05), (9.0, 1.0)])
def test_form_a_is_clipped(gap, bound):
    margin = Margin(MarginConfig(form="A", decay=0.0, low=0.05, high=1.0))
    assert margin(distances(gap), NEGATIVES, SEMANTIC).item() == pytest.approx(bound)


def test_form_a_counts_only_negatives():
    d = torch.tensor([[1.0, 2.0, 9.0], [2.0, 1.0, 3.0], [9.0, 3.0, 1.0]])
    negatives = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)  # rows 0 and 2: one image
    margin = Margin(MarginConfig(form="A", weight=1.0, decay=0.0, high=10.0))
    assert margin(d, negatives, SEMANTIC).item() == pytest.approx((2 + 2 + 3 + 3) / 4 - 1)


def test_form_b_by_hand():
    margin = Margin(MarginConfig(form="B", start=0.5))
    found = margin(distances(1.0), NEGATIVES, SEMANTIC)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.2], [0.2, 0.0]]))
    assert margin.state_dict() == {}


@pytest.mark.parametrize("form", ["B", "C"])
def test_captions_are_compared_by_their_directions(form):
    """What others extracted may have any length."""
    margins = [Margin(MarginConfig(form=form))(distances(1.0), NEGATIVES, s) for s in (SEMANTIC, 7 * SEMANTIC)]
    torch.testing.assert_close(margins[1], margins[0])


def test_form_c_is_form_a_shaped_by_the_captions():
    config = MarginConfig(form="C", weight=0.5, decay=0.0)
    found = Margin(config)(distances(1.2), NEGATIVES, SEMANTIC)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.24], [0.24, 0.0]]))  # 0.6 * (1 - 0.6)


def test_evaluation_does_not_move_the_average():
    margin = Margin(MarginConfig(form="A")).eval()
    before = margin.average.clone()
    margin(distances(5.0), NEGATIVES, SEMANTIC)
    assert torch.equal(margin.average, before)


def test_a_batch_without_negatives_does_not_move_the_average():
    margin = Margin(MarginConfig(form="A"))
    before = margin.average.clone()
    margin(distances(5.0), torch.zeros(2, 2, dtype=torch.bool), SEMANTIC)
    assert torch.equal(margin.average, before)


def test_state_round_trip_continues_the_same_series():
    margin = Margin(MarginConfig(form="A"))
    for gap in (0.1, 0.9):
        margin(distances(gap), NEGATIVES, SEMANTIC)
    other = Margin(MarginConfig(form="A"))
    other.load_state_dict(margin.state_dict())
    assert torch.equal(other(distances(0.7), NEGATIVES, SEMANTIC), margin(distances(0.7), NEGATIVES, SEMANTIC))


@pytest.mark.parametrize("form", ["fixed", "A", "B", "C"])
def test_no_gradient_passes(form):
    found = Margin(MarginConfig(form=form))(distances(1.0).requires_grad_(), NEGATIVES, SEMANTIC)
    assert not found.requires_grad


def test_forms_of_captions_need_their_vectors():
    with pytest.raises(ValueError, match="margin form B compares captions, but they come without frozen vectors"):
        Margin(MarginConfig(form="B"))(distances(1.0), NEGATIVES, torch.zeros(2, 0))


@pytest.mark.parametrize("wrong", [{"weight": 0.0}, {"decay": 1.0}, {"low": 2.0}])
def test_settings_that_form_a_cannot_use_are_refused(wrong):
    with pytest.raises(ValueError, match=r"margin form A: found weight .* expected weight > 0"):
        Margin(MarginConfig(form="A", **wrong))


@pytest.mark.parametrize("form", ["fixed", "A", "B", "C"])
def test_a_negative_start_is_refused(form):
    with pytest.raises(ValueError, match=r"found margin start -0\.1; expected 0 or more"):
        Margin(MarginConfig(form=form, start=-0.1))
