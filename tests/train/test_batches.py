"""Exact epochs, rows that belong together, and the same order for any number of workers."""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from featurize.cache import CacheError
from train.batches import (
    FeatureReader,
    Schedule,
    compares_captions,
    epoch_order,
    prefetch,
    wanted_outputs,
    worker_slices,
)
from train.config import HingeConfig, MarginConfig, ObjectiveConfig, TowerConfig

OWNER = np.repeat(np.arange(50), 1 + np.arange(50) % 5)


def test_every_caption_is_used_once_an_epoch():
    schedule = Schedule(np.arange(len(OWNER)) + 1000, OWNER, batch=16, views=2, seed=3)
    chunks = [captions for captions, _ in schedule.epoch(0)]
    assert sorted(np.concatenate(chunks)) == list(range(1000, 1000 + len(OWNER)))
    assert {len(chunk) for chunk in chunks} <= {15, 16}
    assert len(chunks) == schedule.steps


def test_the_order_depends_on_seed_and_epoch_alone():
    np.testing.assert_array_equal(epoch_order(OWNER, 1, 2), epoch_order(OWNER, 1, 2))
    assert (epoch_order(OWNER, 1, 2) != epoch_order(OWNER, 1, 3)).any()
    assert (epoch_order(OWNER, 1, 2) != epoch_order(OWNER, 2, 2)).any()


def test_rounds_show_each_image_once():
    order = epoch_order(OWNER, 0, 0)
    first_round = OWNER[order[:50]]
    assert len(set(first_round)) == 50
    counts = [len(set(OWNER[order[start:end]])) for start, end in [(50, 90), (90, 120)]]
    assert counts == [40, 30]


def test_an_epoch_resumes_in_its_middle():
    schedule = Schedule(np.arange(len(OWNER)), OWNER, batch=16, views=3, seed=0)
    whole = list(schedule.epoch(1))
    rest = list(schedule.epoch(1, first_step=4))
    assert len(rest) == len(whole) - 4
    for (rows, views), (others, other_views) in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(rows, others)
        np.testing.assert_array_equal(views, other_views)


def test_all_views_are_chosen():
    schedule = Schedule(np.arange(len(OWNER)), OWNER, batch=16, views=2, seed=0)
    assert set(np.concatenate([views for _, views in schedule.epoch(0)])) == {0, 1}


@pytest.mark.parametrize(("total", "workers"), [(10, 1), (10, 3), (7, 7), (256, 8)])
def test_slices_cover_a_batch_evenly(total, workers):
    slices = worker_slices(total, workers)
    assert [row for part in slices for row in range(total)[part]] == list(range(total))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1


def test_pairs_belong_together(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    captions = np.array([7, 3, 100])
    batch = reader.batch(captions, np.array([1, 0, 1]))
    images = tiny_cache.dataset.caption_image[captions]
    assert batch.image_ids.tolist() == images.tolist()
    both = [reader.images(images, np.full(3, view)).vectors for view in (0, 1)]
    torch.testing.assert_close(batch.image.vectors, torch.stack([both[1][0], both[0][1], both[1][2]]))
    assert batch.image.vectors.shape == (3, 28)
    assert batch.text.vectors.shape == (3, 16)
    assert batch.semantic.shape == (3, 0)


def test_parts_come_with_masks(tiny_cache, tiny_config):
    model = replace(
        tiny_config.model,
        image=TowerConfig(vectors=(), parts=("one.grid",)),
        text=TowerConfig(vectors=("sentence",), parts=("tokens",)),
    )
    reader = FeatureReader(tiny_cache.inputs(replace(tiny_config, model=model)))
    batch = reader.batch(np.arange(6), np.zeros(6, np.int64))
    assert batch.image.vectors.shape == (6, 0)
    assert batch.image.parts[0].shape == (6, 5, 6)
    assert batch.image.masks[0].all()
    assert batch.text.masks[0].sum(1).tolist() == [1, 2, 3, 4, 5, 6]
    assert not batch.text.parts[0][~batch.text.masks[0]].any()
    assert reader.image_dims == (0, (6,))
    assert reader.text_dims == (16, (10,))


def test_margins_that_compare_captions_read_sentences(tiny_cache, tiny_config):
    objective = ObjectiveConfig(hinge=HingeConfig(margin=MarginConfig(form="B")))
    config = replace(tiny_config, objective=objective)
    assert compares_captions(objective)
    assert not compares_captions(replace(objective, ranking="infonce"))
    batch = FeatureReader(tiny_cache.inputs(config)).batch(np.arange(4), np.zeros(4, np.int64))
    torch.testing.assert_close(batch.semantic.norm(dim=1), torch.ones(4), atol=2e-2, rtol=0)


def test_wanted_outputs_follow_the_towers(tiny_config):
    assert wanted_outputs(tiny_config) == (("pooled",), ("sentence",))
    model = replace(tiny_config.model, text=TowerConfig(vectors=(), parts=("tokens",)))
    objective = ObjectiveConfig(hinge=HingeConfig(margin=MarginConfig(form="C")))
    assert wanted_outputs(replace(tiny_config, model=model, objective=objective)) == (
        ("pooled",),
        ("tokens", "sentence"),
    )


def test_splits_hold_their_images_and_captions(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    images, captions = reader.split("val")
    assert images.tolist() == list(range(48, 72))
    assert set(reader.caption_image[captions]) == set(range(48, 72))
    with pytest.raises(CacheError, match=r"no images of split 'test'; found \['train', 'val'\]"):
        reader.split("test")


def test_prefetch_keeps_order_and_hands_errors_over():
    assert list(prefetch(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        raise OSError("disk gone")

    made = prefetch(broken())
    assert next(made) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(made)


def test_prefetch_stops_when_nobody_listens():
    before = threading.active_count()
    made = prefetch(itertools.count())
    assert next(made) == 0
    made.close()
    assert threading.active_count() == before
