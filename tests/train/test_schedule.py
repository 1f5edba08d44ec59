"""Exact epochs, the same order for any number of workers, and steps that are made ahead."""

import itertools
import threading

import numpy as np
import pytest

from train.schedule import Schedule, epoch_order, prefetch, windows, worker_slices

OWNER = np.repeat(np.arange(50), 1 + np.arange(50) % 5)


def test_every_caption_is_used_once_an_epoch():
    schedule = Schedule(np.arange(len(OWNER)) + 1000, OWNER, batch=16, views=2, seed=3)
    chunks = [draw.captions for draw in schedule.epoch(0)]
    assert sorted(np.concatenate(chunks)) == list(range(1000, 1000 + len(OWNER)))
    assert {len(chunk) for chunk in chunks} <= {15, 16}
    assert len(chunks) == schedule.steps


@pytest.mark.parametrize(("batch", "together"), [(16, 1), (13, 1), (12, 3), (1000, 1)])
def test_the_smallest_step_is_known(batch, together):
    schedule = Schedule(np.arange(len(OWNER)), OWNER, batch, 2, 0, together)
    assert schedule.smallest == min(len(draw.views) for draw in schedule.epoch(0))


def test_the_order_depends_on_seed_and_epoch_alone():
    order, _ = epoch_order(OWNER, 1, 2)
    np.testing.assert_array_equal(order, epoch_order(OWNER, 1, 2)[0])
    assert (order != epoch_order(OWNER, 1, 3)[0]).any()
    assert (order != epoch_order(OWNER, 2, 2)[0]).any()


def test_rounds_show_each_image_once():
    order, group = epoch_order(OWNER, 0, 0)
    np.testing.assert_array_equal(group, np.arange(len(OWNER)))
    first_round = OWNER[order[:50]]
    assert len(set(first_round)) == 50
    counts = [len(set(OWNER[order[start:end]])) for start, end in [(50, 90), (90, 120)]]
    assert counts == [40, 30]


@pytest.mark.parametrize("together", [2, 3, 9])
def test_captions_of_an_image_stay_together(together):
    """Images have one to five captions; the last group of an image holds what is left."""
    schedule = Schedule(np.arange(len(OWNER)), OWNER, 12, 2, 0, together)
    draws = list(schedule.epoch(0))
    assert sorted(np.concatenate([draw.captions for draw in draws])) == list(range(len(OWNER)))
    assert len(draws) == schedule.steps
    sizes = []
    for draw in draws:
        assert len(draw.views) <= max(1, 12 // together)
        assert set(draw.owner) == set(range(len(draw.views)))
        images = [set(OWNER[draw.captions[draw.owner == group]]) for group in range(len(draw.views))]
        assert all(len(image) == 1 for image in images)
        sizes += np.bincount(draw.owner).tolist()
    captions = np.bincount(OWNER)
    expected = [min(together, count - first) for count in captions for first in range(0, count, together)]
    assert sorted(sizes) == sorted(expected)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_a_draw_by_images(workers):
    draw = next(Schedule(np.arange(len(OWNER)), OWNER, 30, 2, 0, 2).epoch(0))
    parts = [draw.part(*own) for own in draw.slices(workers)]
    np.testing.assert_array_equal(np.concatenate([part.captions for part in parts]), draw.captions)
    np.testing.assert_array_equal(np.concatenate([part.views for part in parts]), draw.views)
    for part in parts:
        assert set(part.owner) == set(range(len(part.views)))
        assert len(set(zip(part.owner, OWNER[part.captions], strict=True))) == len(part.views)


def test_an_epoch_resumes_in_its_middle():
    schedule = Schedule(np.arange(len(OWNER)), OWNER, batch=16, views=3, seed=0)
    whole = list(schedule.epoch(1))
    rest = list(schedule.epoch(1, first_step=4))
    assert len(rest) == len(whole) - 4
    for expected, draw in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(draw.captions, expected.captions)
        np.testing.assert_array_equal(draw.views, expected.views)


def test_all_views_are_chosen():
    schedule = Schedule(np.arange(len(OWNER)), OWNER, batch=16, views=2, seed=0)
    assert set(np.concatenate([draw.views for draw in schedule.epoch(0)])) == {0, 1}


SHARDS = OWNER // 8  # seven, the last of two images


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_windows_of_shards_come_one_after_the_other(window, together):
    schedule = Schedule(np.arange(len(OWNER)), OWNER, 16, 2, 0, together, SHARDS, window)
    draws = list(schedule.epoch(4))
    assert len(draws) == schedule.steps == Schedule(np.arange(len(OWNER)), OWNER, 16, 2, 0, together).steps
    captions = np.concatenate([draw.captions for draw in draws])
    assert sorted(captions) == list(range(len(OWNER)))
    turn = windows(SHARDS, window, 0, 4)[captions]
    assert (np.diff(turn) >= 0).all()
    for number in range(-(-7 // window)):
        inside = SHARDS[captions[turn == number]]
        assert len(set(inside)) == min(window, 7 - number * window)
    for start in range(0, len(captions), 8):  # at most two windows are open
        assert len(set(SHARDS[captions[start : start + 8]])) <= 2 * window


def test_rows_of_a_window_are_mixed_and_shards_come_in_another_order_each_epoch():
    schedule = Schedule(np.arange(len(OWNER)), OWNER, 16, 2, 0, 1, SHARDS, 3)
    one, other = (np.concatenate([draw.captions for draw in schedule.epoch(epoch)]) for epoch in (0, 1))
    assert (windows(SHARDS, 3, 0, 0) != windows(SHARDS, 3, 0, 1)).any()
    assert (np.diff(SHARDS[one]) != 0).mean() > 0.3
    assert (one != other).any()
    again = np.concatenate([draw.captions for draw in schedule.epoch(0)])
    np.testing.assert_array_equal(one, again)
    rest = np.concatenate([draw.captions for draw in schedule.epoch(0, first_step=5)])
    np.testing.assert_array_equal(one[-len(rest) :], rest)


def test_without_a_window_the_order_is_as_it_was():
    draws = Schedule(np.arange(len(OWNER)), OWNER, 16, 2, 0, 1, SHARDS, 0).epoch(0)
    plain = Schedule(np.arange(len(OWNER)), OWNER, 16, 2, 0).epoch(0)
    for one, other in zip(draws, plain, strict=True):
        np.testing.assert_array_equal(one.captions, other.captions)


@pytest.mark.parametrize(("total", "workers"), [(10, 1), (10, 3), (7, 7), (256, 8)])
def test_slices_cover_a_batch_evenly(total, workers):
    slices = worker_slices(total, workers)
    assert [row for part in slices for row in range(total)[part]] == list(range(total))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1


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
