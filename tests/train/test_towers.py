"""Towers read what they are told to, and padding is nothing to them."""

from dataclasses import replace

import pytest
import torch

from train.batches import Features
from train.config import ModelConfig, TowerConfig
from train.noise import Noise
from train.towers import DualEncoder, Standardise, Tower


def features(rows=5, parts=4, pad=0):
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(rows, parts, 6, generator=generator)
    mask = torch.ones(rows, parts, dtype=torch.bool)
    if pad:
        grid = torch.cat([grid, torch.full((rows, pad, 6), 9.0)], 1)
        mask = torch.cat([mask, torch.zeros(rows, pad, dtype=torch.bool)], 1)
    return Features(torch.randn(rows, 8, generator=generator), (grid,), (mask,))


@pytest.mark.parametrize("aggregator", ["mean", "max", "attention", "gpo", "netvlad"])
def test_a_padded_part_changes_nothing(aggregator):
    torch.manual_seed(0)
    tower = Tower(TowerConfig(parts=("grid",), aggregator=aggregator, width=16), 12, 8, (6,)).eval()
    torch.testing.assert_close(tower(features(), None), tower(features(pad=3), None), atol=1e-5, rtol=1e-5)


def test_standardise_gives_mean_zero_and_deviation_one():
    x = torch.randn(1000, 3) * torch.tensor([1.0, 5.0, 0.1]) + 2
    layer = Standardise(3, signed_sqrt=False)
    layer.fit(x)
    torch.testing.assert_close(layer(x).mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_signed_square_root():
    layer = Standardise(2, signed_sqrt=True)
    torch.testing.assert_close(layer(torch.tensor([[4.0, -9.0]])), torch.tensor([[2.0, -3.0]]))


def test_a_constant_feature_stays_finite():
    layer = Standardise(1, signed_sqrt=False)
    layer.fit(torch.ones(10, 1))
    assert layer(torch.ones(1, 1)).isfinite().all()


def test_statistics_leave_padding_out():
    tower = Tower(TowerConfig(parts=("grid",), width=8), 4, 8, (6,))
    tower.fit_inputs(features())
    padded = Tower(TowerConfig(parts=("grid",), width=8), 4, 8, (6,))
    padded.fit_inputs(features(pad=2))
    torch.testing.assert_close(tower.standardise_parts[0].mean, padded.standardise_parts[0].mean)


def test_unit_sphere_or_free():
    model = ModelConfig(dim=12, image=TowerConfig(width=16), text=TowerConfig(width=16))
    x = Features(torch.randn(5, 8))
    unit = DualEncoder(model, (8, ()), (8, ()))
    torch.testing.assert_close(unit.embed_images(x).norm(dim=1), torch.ones(5))
    free = DualEncoder(replace(model, normalise=False), (8, ()), (8, ()))
    assert (free.embed_images(x).norm(dim=1) - 1).abs().max() > 1e-2


def test_dropout_only_with_noise():
    tower = Tower(TowerConfig(width=16), 12, 8, ())
    x = Features(torch.randn(5, 8))
    torch.testing.assert_close(tower(x, None), tower(x, None))
    assert (tower(x, Noise(0, 0, 5, slice(0, 5))) != tower(x, None)).any()


def test_a_tower_that_reads_nothing_is_refused():
    with pytest.raises(ValueError, match="a tower reads nothing"):
        Tower(TowerConfig(vectors=()), 12, 0, ())


def test_one_codebook_serves_both_towers():
    tower = TowerConfig(vectors=(), parts=("grid",), aggregator="netvlad", clusters=3, width=16)
    config = ModelConfig(dim=12, shared_codebook=True, image=tower, text=tower)
    model = DualEncoder(config, (0, (6,)), (0, (6,)))
    assert model.image.aggregator.codebook is model.text.aggregator.codebook
    before = model.image.aggregator.codebook.centres.clone()
    model.fit_inputs(features(rows=20), features(rows=20))
    assert (model.image.aggregator.codebook.centres != before).any()


def test_a_codebook_each():
    tower = TowerConfig(vectors=(), parts=("grid",), aggregator="netvlad", clusters=3, width=16)
    model = DualEncoder(ModelConfig(dim=12, image=tower, text=tower), (0, (6,)), (0, (6,)))
    assert model.image.aggregator.codebook is not model.text.aggregator.codebook
    model.fit_inputs(features(rows=20), features(rows=20))


def test_the_mean_of_views_is_a_unit_vector():
    model = DualEncoder(ModelConfig(dim=2, image=TowerConfig(width=4), text=TowerConfig(width=4)), (8, ()), (8, ()))
    mean = model.mean_of_views([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    torch.testing.assert_close(mean, torch.full((1, 2), 0.5**0.5))
