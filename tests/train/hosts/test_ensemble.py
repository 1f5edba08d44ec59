"""Several models as one: each as it would be alone, distances the mean of theirs."""

import pytest
import torch

from train.batches import Features
from train.config import LocalConfig, ModelConfig, SettingsError, TowerConfig
from train.hosts import Ensemble, build_host
from train.towers import Dims

TOWER = TowerConfig(parts=("grid",), width=8)
DIMS = Dims(8, (6,))
CONFIGS = [
    ModelConfig(dim=12, image=TOWER, text=TOWER),
    ModelConfig(dim=8, blocks=2, image=TOWER, text=TOWER),
    ModelConfig(dim=4, local=LocalConfig(dim=6, queries=2, share=0.4), image=TOWER, text=TOWER),
]


@pytest.fixture
def members():
    torch.manual_seed(0)
    return [build_host(config, DIMS, DIMS).eval() for config in CONFIGS]


def features(seed, rows=5):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(rows, 3, 6, generator=generator)
    return Features(torch.randn(rows, 8, generator=generator), (parts,), (torch.ones(rows, 3, dtype=torch.bool),))


@torch.no_grad()
def test_the_joined_vector_holds_every_members_own(members):
    ensemble = Ensemble(members)
    views = [features(0), features(1)]
    joined = ensemble.index_vectors(ensemble.mean_of_views([ensemble.embed_images(view) for view in views]))
    alone = [m.index_vectors(m.mean_of_views([m.embed_images(view) for view in views])) for m in members]
    torch.testing.assert_close(joined, torch.cat(alone, 1) / 3**0.5)
    torch.testing.assert_close(joined.norm(dim=1), torch.ones(5))


@torch.no_grad()
def test_distances_are_the_mean_of_the_members(members):
    ensemble = Ensemble(members)
    images, texts = features(0), features(1, 7)
    found = ensemble.distances(ensemble.embed_images(images), ensemble.embed_texts(texts))
    each = [
        torch.cdist(m.index_vectors(m.embed_images(images)), m.index_vectors(m.embed_texts(texts))).square()
        for m in members
    ]
    torch.testing.assert_close(found, torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)


def test_what_has_no_vector_is_not_joined(members):
    scan = build_host(ModelConfig(host="scan", image=TOWER, text=TOWER), Dims(0, (6,)), Dims(0, (6,)))
    with pytest.raises(SettingsError, match="no vector to index"):
        Ensemble([members[0], scan])
    with pytest.raises(SettingsError, match="at least one model"):
        Ensemble([])
