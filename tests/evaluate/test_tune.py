"""The local half's share is the one that retrieves best."""

import torch

from evaluate.tune import tune_share
from train.config import LocalConfig, ModelConfig, TowerConfig
from train.embeddings import Embeddings
from train.hosts import DualEncoder
from train.towers import Dims

TOWER = TowerConfig(vectors=(), parts=("x",))
OWNER = torch.arange(40).repeat_interleave(2)


def model():
    config = ModelConfig(dim=16, image=TOWER, text=TOWER, local=LocalConfig(dim=16, share=0.3))
    return DualEncoder(config, Dims(0, (6,)), Dims(0, (6,)))


def unit(rows, seed):
    return torch.nn.functional.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_useless_half_gets_no_share():
    host, meaning = model(), unit(40, 0)
    images = Embeddings.of(meaning, unit(40, 1))
    captions = Embeddings.of(meaning[OWNER], unit(80, 2))
    assert tune_share(host, images, captions, OWNER, tile=64) == 0.0
    assert float(host.share) == 0.0


def test_a_half_that_tells_more_gets_more():
    host, meaning = model(), unit(40, 0)
    images = Embeddings.of(unit(40, 1), meaning)
    captions = Embeddings.of(unit(80, 2), meaning[OWNER])
    best = tune_share(host, images, captions, OWNER, tile=64)
    assert best > 0.5
    assert float(host.share) == torch.tensor(best)
