"""Towers read what they are told to, and padding is nothing to them."""

import pytest
import torch
from torch.nn import functional as F

from train.batches import Features
from train.config import TowerConfig
from train.lexicon import Vocabulary
from train.noise import Noise
from train.towers import BlockLinear, Dims, ResidualMLP, Standardise, Tower

BOTH = Dims(8, (6,))


def embed(tower, x, noise=None):
    return tower.pool(tower.encode(x, noise))


def features(rows=5, parts=4, pad=0):
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(rows, parts, 6, generator=generator)
    mask = torch.ones(rows, parts, dtype=torch.bool)
    if pad:
        grid = torch.cat([grid, torch.full((rows, pad, 6), torch.nan)], 1)
        mask = torch.cat([mask, torch.zeros(rows, pad, dtype=torch.bool)], 1)
    return Features(torch.randn(rows, 8, generator=generator), (grid,), (mask,))


@pytest.mark.parametrize("aggregator", ["mean", "max", "attention", "gpo", "netvlad", "memory"])
@pytest.mark.parametrize("context", ["none", "bigru", "transformer", "graph"])
def test_a_padded_part_changes_nothing(aggregator, context):
    torch.manual_seed(0)
    config = TowerConfig(parts=("grid",), aggregator=aggregator, context=context, layers=2, width=16)
    tower = Tower(config, 12, BOTH).eval()
    torch.testing.assert_close(embed(tower, features()), embed(tower, features(pad=3)), atol=1e-5, rtol=1e-5)


def test_pooling_some_parts_is_pooling_them_alone():
    torch.manual_seed(0)
    tower = Tower(TowerConfig(parts=("grid",), width=16), 12, BOTH)
    x = features()
    encoded = tower.encode(x, None)
    some = encoded.mask.clone()
    some[:, 2:] = False
    alone = Features(x.vectors, (x.parts[0][:, :2],), (x.masks[0][:, :2],))
    torch.testing.assert_close(tower.pool(encoded, some), embed(tower, alone))


def test_branches_add_up():
    torch.manual_seed(0)
    x = features()
    words = torch.tensor([[3, 5], [5, 0], [3, 3], [7, 0], [0, 0]])
    known = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    x = Features(x.vectors, x.parts, x.masks, (words,), (known,))
    tower = Tower(TowerConfig(parts=("grid",), bags=("lemmas",), width=16), 12, Dims(8, (6,), (4,)))
    tower.bags[0].fit(Vocabulary(torch.tensor([3, 5, 7]), torch.tensor([1.0, 2.0, 3.0])))
    pooled = tower.aggregator(*tower.project_parts(x))
    vectors = tower.vectors(tower.standardise_vectors(x.vectors), None)
    bag = tower.bags[0](words, known)
    assert bag[:4].abs().sum(1).min() > 0
    torch.testing.assert_close(embed(tower, x), vectors + bag + pooled)


def test_parts_are_projected_by_one_layer_or_an_mlp():
    assert ResidualMLP(6, 0, 12, 0.0).hidden is None
    linear = Tower(TowerConfig(parts=("grid",), part_width=0), 12, BOTH)
    deep = Tower(TowerConfig(parts=("grid",), part_width=10), 12, BOTH)
    assert sum(p.numel() for p in linear.parts.parameters()) == 6 * 12 + 12
    assert sum(p.numel() for p in deep.parts.parameters()) == 6 * 12 + 12 + (6 * 10 + 10) + (10 * 12 + 12)


def test_a_block_of_a_linear_map_sees_its_own_inputs():
    layer = BlockLinear(6, 4, 2)
    x = torch.randn(3, 5, 6)
    first, second = (
        F.linear(x[..., 3 * b : 3 * b + 3], layer.weight[b], layer.bias[2 * b : 2 * b + 2]) for b in (0, 1)
    )
    torch.testing.assert_close(layer(x), torch.cat([first, second], -1))


def test_standardise_gives_mean_zero_and_deviation_one():
    x = torch.randn(1000, 3) * torch.tensor([1.0, 5.0, 0.1]) + 2
    layer = Standardise(3, signed_sqrt=False)
    layer.fit(x)
    torch.testing.assert_close(layer(x).mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_signed_square_root():
    layer = Standardise(2, signed_sqrt=True)
    torch.testing.assert_close(layer(torch.tensor([[4.0, -9.0]])), torch.tensor([[2.0, -3.0]]))


def test_a_feature_that_was_the_same_in_all_rows_drowns_nothing():
    """As a channel that is 0 in the sample, and 0.01 in a row that is met later."""
    layer = Standardise(2, signed_sqrt=False)
    layer.fit(torch.tensor([[1.0, 0.0], [1.0, 2.0]]).repeat(5, 1))
    torch.testing.assert_close(layer(torch.tensor([[1.0, 0.0], [1.01, 2.0]])), torch.tensor([[0.0, -1.0], [0.0, 1.0]]))


def test_statistics_leave_padding_out():
    tower = Tower(TowerConfig(parts=("grid",), width=8), 4, BOTH)
    tower.fit_inputs(features())
    padded = Tower(TowerConfig(parts=("grid",), width=8), 4, BOTH)
    padded.fit_inputs(features(pad=2))
    torch.testing.assert_close(tower.standardise_parts[0].mean, padded.standardise_parts[0].mean)


def test_dropout_only_with_noise():
    tower = Tower(TowerConfig(width=16), 12, Dims(8))
    x = Features(torch.randn(5, 8))
    torch.testing.assert_close(embed(tower, x), embed(tower, x))
    assert (embed(tower, x, Noise(0, 0, 5, slice(0, 5))) != embed(tower, x)).any()


def test_a_tower_that_reads_nothing_is_refused():
    with pytest.raises(ValueError, match="a tower reads nothing"):
        Tower(TowerConfig(vectors=()), 12, Dims())
