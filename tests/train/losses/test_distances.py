"""Squared distances, negatives and their means against loops."""

import pytest
import torch

from train.losses.distances import masked_mean, mean_distances, negative_pairs, squared_distances


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
    found = negative_pairs(torch.tensor([4, 1, 4]))
    assert found.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


def test_masked_mean_by_hand():
    values, mask = torch.tensor([1.0, 5.0, torch.nan]), torch.tensor([True, True, False])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_mean_distances_by_hand():
    d = torch.tensor([[1.0, 7.0, 4.0], [7.0, 2.0, 7.0], [4.0, 7.0, 3.0]])
    positive, negative = mean_distances(d, negative_pairs(torch.tensor([4, 1, 4])))
    assert (positive.item(), negative.item()) == (2.0, 7.0)
