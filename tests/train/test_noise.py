"""Dropout is a property of the global batch, not of a worker."""

import torch

from train.noise import Noise


def test_workers_see_the_rows_of_the_global_noise():
    x = torch.ones(10, 37)
    whole = Noise(1, 5, 10, slice(0, 10))
    halves = [Noise(1, 5, 10, slice(0, 4)), Noise(1, 5, 10, slice(4, 10))]
    for _ in range(3):  # the stream stays aligned over several layers
        expected = whole.dropout(x, 0.5)
        torch.testing.assert_close(torch.cat([halves[0].dropout(x[:4], 0.5), halves[1].dropout(x[4:], 0.5)]), expected)


def test_rate_and_scale():
    dropped = Noise(0, 0, 400, slice(0, 400)).dropout(torch.ones(400, 500), 0.3)
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.02


def test_nearly_all_is_not_all():
    dropped = Noise(0, 0, 400, slice(0, 400)).dropout(torch.ones(400, 500), 0.999)
    assert dropped.isfinite().all()
    assert 0 < float((dropped > 0).float().mean()) < 0.01


def test_zero_changes_nothing():
    x = torch.randn(4, 3)
    assert Noise(0, 0, 4, slice(0, 4)).dropout(x, 0.0) is x


def test_steps_differ_and_repeat():
    x = torch.ones(8, 64)

    def at(step):
        return Noise(0, step, 8, slice(0, 8)).dropout(x, 0.5)

    torch.testing.assert_close(at(1), at(1))
    assert (at(1) != at(2)).any()


def test_parts_of_a_row_lose_the_same_features():
    owner = torch.tensor([0, 0, 1, 2, 2, 2])
    x = torch.ones(3, 16)
    by_row = Noise(0, 0, 3, slice(0, 3)).dropout(x, 0.5)
    by_part = Noise(0, 0, 3, slice(0, 3)).dropout(x[owner], 0.5, owner)
    torch.testing.assert_close(by_part, by_row[owner])
    assert (by_part == 0).any()
