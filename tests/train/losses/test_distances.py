"""Squared distances, negatives and their means against loops."""

import pytest
import torch

from train.embeddings import Embeddings
from train.losses.distances import (
    both_directions,
    masked_mean,
    mean_distances,
    negative_pairs,
    pair_distances,
    squared_distances,
)


def test_equal_a_loop(embeddings):
    u, v = embeddings(5)[0], embeddings(3, seed=1)[0]
    found = squared_distances(u, v)
    assert found.shape == (5, 3)
    for n in range(5):
        for m in range(3):
            expected = sum((u[n, d] - v[m, d]).item() ** 2 for d in range(8))
            assert found[n, m].item() == pytest.approx(expected, rel=1e-5)


def test_by_hand():
    assert squared_distances(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 3.0]])).tolist() == [[25, 1]]


def test_of_unit_vectors_is_two_minus_twice_the_cosine(embeddings):
    u, v = embeddings(kind="unit")
    torch.testing.assert_close(squared_distances(u, v), 2 - 2 * torch.cosine_similarity(u[:, None], v[None], dim=2))


def test_swapping_the_sides_transposes(embeddings):
    u, v = embeddings()
    torch.testing.assert_close(squared_distances(u, v), squared_distances(v, u).T)


def test_never_negative_and_finite_gradient_where_points_coincide():
    u = (1e3 * torch.ones(4, 33) / 7).requires_grad_()
    found = squared_distances(u, u.detach())
    assert (found >= 0).all()
    found.sum().backward()
    assert torch.isfinite(u.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_under_autocast(embeddings, dtype):
    u, v = (x.to(dtype) for x in embeddings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = squared_distances(u, v)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, squared_distances(u.float(), v.float()))


def test_float64_stays(embeddings):
    u, v = embeddings()
    assert squared_distances(u.double(), v).dtype == torch.float64


def test_gradient_equals_finite_differences(embeddings):
    u, v = (x.detach().double().requires_grad_() for x in embeddings(3, 2))
    assert torch.autograd.gradcheck(squared_distances, (u, v))


def test_pairs_of_one_image_are_no_negatives():
    found = negative_pairs(torch.tensor([4, 1, 4]), torch.tensor([4, 1, 4]))
    assert found.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


def test_pairs_mixed_with_one_image_are_no_negatives():
    found = negative_pairs(torch.tensor([0, 1, 2, 0]), torch.tensor([7, 8, 7, 9]))
    apart = [(0, 1), (1, 2), (1, 3), (2, 3)]  # 0 and 2 are mixed with image 7, 0 and 3 show image 0
    assert found.tolist() == [[(min(i, j), max(i, j)) in apart for j in range(4)] for i in range(4)]


def test_what_one_pair_shows_and_another_is_mixed_with_is_no_negative():
    """Rows 0 and 1 are mixed with each other: at equal shares they are the same."""
    found = negative_pairs(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2]))
    assert found.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_both_directions_hand_over_rows_and_then_columns():
    d = torch.arange(9.0).reshape(3, 3)
    negatives = d > 4
    margin, seen = d / 10, []

    def rank(*arguments):
        seen.append(arguments)
        return torch.tensor(float(len(seen)))

    assert both_directions(rank, d, negatives, margin).item() == 1 + 2
    for found, expected in zip(seen[0], (d.diagonal(), d, negatives, margin), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(seen[1], (d.diagonal(), d.T, negatives.T, margin.T), strict=True):
        assert torch.equal(found, expected)
    both_directions(rank, d, negatives, torch.tensor(0.5))
    assert [arguments[3].item() for arguments in seen[2:]] == [0.5, 0.5]


@pytest.mark.parametrize("block", [1, 3, 16])
def test_distances_of_pairs_are_the_diagonal_and_compare_blocks_only(embeddings, block):
    image, text = (Embeddings.of(x) for x in embeddings())
    sizes = []

    def distances(u, v):
        sizes.append(len(u))
        return squared_distances(u.vector, v.vector)

    torch.testing.assert_close(
        pair_distances(distances, image, text, block), squared_distances(image.vector, text.vector).diagonal()
    )
    assert max(sizes) == min(block, 7)
    assert sum(sizes) == 7


def test_masked_mean_by_hand():
    values, mask = torch.tensor([1.0, 5.0, torch.nan]), torch.tensor([True, True, False])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_mean_distances_by_hand():
    d = torch.tensor([[1.0, 7.0, 4.0], [7.0, 2.0, 7.0], [4.0, 7.0, 3.0]])
    positive, negative = mean_distances(d, ~torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool())
    assert (positive.item(), negative.item()) == (2.0, 7.0)
