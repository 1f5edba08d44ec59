"""Targets: what the objective asks for, of the training split alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.batches import FeatureReader
from train.config import CenterConfig, LocalLossConfig, ObjectiveConfig
from train.targets import Targets


def targets(tiny_cache, tiny_config, objective):
    config = replace(tiny_config, objective=objective)
    reader = FeatureReader(tiny_cache.inputs(config))
    return reader, Targets.of(reader, "train", objective, 0)


def test_images_are_numbered_within_the_split(tiny_cache, tiny_config):
    reader, found = targets(tiny_cache, tiny_config, ObjectiveConfig())
    images, captions = reader.split("train")
    assert np.array_equal(images[found.image_ids[captions]], reader.caption_image[captions])
    assert found.labels.shape == (48, 0)
    assert found.concepts.equal(torch.arange(48))
    assert found.count == 48


@pytest.mark.parametrize(("concept", "most"), [("image", 48), ("cluster", 5), ("lexical", 48)])
def test_concepts_of_every_kind(tiny_cache, tiny_config, concept, most):
    objective = ObjectiveConfig(center=CenterConfig(weight=1.0, concept=concept, concepts=5))
    _, found = targets(tiny_cache, tiny_config, objective)
    assert found.count == len(found.concepts.unique()) <= most
    assert len(found.concepts) == 48
    assert found.labels.shape == (48, 0)  # read for the concepts, and by no loss


def test_labels_for_the_local_loss_are_0_or_1(tiny_cache, tiny_config):
    _, found = targets(tiny_cache, tiny_config, ObjectiveConfig(local=LocalLossConfig(weight=1.0, vocabulary=6)))
    assert found.labels.shape == (48, 6)
    assert found.labels.unique().tolist() == [0, 1]
    assert found.idf.shape == (6,)


@pytest.mark.parametrize("concept", ["cluster", "lexical"])
def test_without_the_center_loss_nothing_is_read_for_it(tiny_cache, tiny_config, concept):
    objective = ObjectiveConfig(center=CenterConfig(weight=0.0, concept=concept))
    reader = FeatureReader(tiny_cache.inputs(replace(tiny_config, objective=objective)))
    found = Targets.of(reader, "train", objective, 0)
    assert found.concepts.equal(torch.arange(48))
    assert found.count == 48
