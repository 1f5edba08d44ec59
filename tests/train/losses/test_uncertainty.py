"""Learned weights against their closed form."""

import math

import pytest
import torch

from train.losses.uncertainty import UncertaintyWeights


def test_starts_at_the_given_weights():
    module = UncertaintyWeights({"hinge": 1.0, "center": 0.1})
    found = module({"hinge": torch.tensor(2.0), "center": torch.tensor(3.0)})
    assert found.item() == pytest.approx(1.0 * 2 + 0.1 * 3 + 0.0 + math.log(10), rel=1e-6)
    assert {name: w.item() for name, w in module.weights().items()} == pytest.approx({"hinge": 1.0, "center": 0.1})


def test_gradient_is_one_minus_the_weighted_loss():
    module = UncertaintyWeights({"center": 0.1})
    value = torch.tensor(3.0, requires_grad=True)
    module({"center": value}).backward()
    assert module.log_variances["center"].grad.item() == pytest.approx(1 - 0.1 * 3)
    assert value.grad.item() == pytest.approx(0.1)


def test_settles_at_one_over_the_loss():
    module = UncertaintyWeights({"a": 1.0, "b": 1.0})
    optimiser = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(200):
        optimiser.zero_grad()
        module({"a": torch.tensor(4.0), "b": torch.tensor(0.5)}).backward()
        optimiser.step()
    assert {name: w.item() for name, w in module.weights().items()} == pytest.approx({"a": 0.25, "b": 2.0}, rel=1e-4)


def test_the_order_of_terms_does_not_matter_and_all_are_in_the_checkpoint():
    module = UncertaintyWeights({"a": 0.5, "b": 2.0})
    a, b = torch.tensor(1.0), torch.tensor(5.0)
    torch.testing.assert_close(module({"b": b, "a": a}), module({"a": a, "b": b}))
    assert set(module.state_dict()) == {"log_variances.a", "log_variances.b"}
