"""Bootstrap: against scipy and the binomial formula, loops over drawn images, clustering, pairs, errors."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from evaluate.intervals import METRICS, Clusters, Interval, bootstrap, paired_bootstrap
from evaluate.metrics import Report, measure
from evaluate.ranks import EvaluationError, Ranks


def ranks_of(*lists):
    indptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
    values = torch.tensor([rank for one in lists for rank in one])
    return Ranks(indptr, values, torch.zeros(len(lists), dtype=torch.float64))


def run_of(image_hits, caption_hits=None):
    """One caption an image: found at rank 1 or not within ten; captions like images unless given."""
    to_text = ranks_of(*[[1 if hit else 50] for hit in image_hits])
    to_image = to_text if caption_hits is None else ranks_of(*[[1 if hit else 50] for hit in caption_hits])
    return Clusters.of(to_text, to_image, torch.arange(len(image_hits)))


RAGGED = (
    ranks_of([1, 7], [3], [12, 30, 6]),
    ranks_of([1], [20], [4], [2], [9], [1]),
    torch.tensor([0, 0, 1, 2, 2, 2]),
)


def test_the_whole_split_gives_the_report():
    to_text, to_image, owner = RAGGED
    values = Clusters.of(to_text, to_image, owner).metrics(torch.ones(1, 3, dtype=torch.float64))[0]
    flat = Report("test", "full", measure(to_text), measure(to_image)).as_flat()
    assert values.tolist() == pytest.approx([flat[name] for name in METRICS])
    assert METRICS == ("i2t/r1", "i2t/r5", "i2t/r10", "t2i/r1", "t2i/r5", "t2i/r10", "rsum")


def test_a_drawn_image_brings_all_its_captions():
    # Image 0 once, image 2 twice. Best ranks of images: 1, 6, 6; of captions: 1, 20, then 2, 9, 1 twice.
    values = Clusters.of(*RAGGED).metrics(torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64))[0]
    recalls = [100 / 3, 100 / 3, 100, 300 / 8, 500 / 8, 700 / 8]
    assert values.tolist() == pytest.approx([*recalls, sum(recalls)])


def test_captions_may_stand_in_any_order():
    to_text, to_image, owner = RAGGED
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    shuffled = Ranks(to_image.indptr, to_image.values[order], to_image.tied)
    found = Clusters.of(to_text, shuffled, owner[order])
    assert found.found.equal(Clusters.of(*RAGGED).found)


def test_agrees_with_scipy_and_the_binomial_formula():
    rng = np.random.default_rng(0)
    hits = rng.random(400) < 0.7
    found = bootstrap(run_of(hits), samples=4000, seed=1)["i2t/r1"]
    scipys = stats.bootstrap(
        (100.0 * hits,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.low == pytest.approx(scipys.low, abs=0.6)
    assert found.high == pytest.approx(scipys.high, abs=0.6)
    half = 1.96 * math.sqrt(hits.mean() * (1 - hits.mean()) / 400) * 100
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        interval = bootstrap(run_of(rng.random(150) < 0.6), samples=400, level=0.9, seed=seed)["i2t/r1"]
        covered += interval.low <= 60 <= interval.high
    assert 0.82 <= covered / 200 <= 0.97  # 0.9, three standard errors either way


def test_captions_that_agree_widen_the_interval():
    rng = np.random.default_rng(4)
    owner = torch.arange(300).repeat_interleave(5)
    to_text = ranks_of(*[[1] * 5] * 300)
    alike = np.repeat(rng.random(300) < 0.5, 5)
    apart = rng.permutation(alike)
    widths = []
    for hits in (alike, apart):
        run = Clusters.of(to_text, ranks_of(*[[1 if hit else 50] for hit in hits]), owner)
        interval = bootstrap(run, samples=1000)["t2i/r1"]
        widths.append(interval.high - interval.low)
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(5), rel=0.15)


def test_nothing_varies_where_everything_is_found():
    assert bootstrap(run_of([True] * 20), samples=50)["rsum"] == Interval(600, 600)


def test_the_level_sets_the_width():
    run = run_of(np.random.default_rng(5).random(300) < 0.5)
    wide, narrow = (bootstrap(run, level=level)["rsum"] for level in (0.95, 0.5))
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(
        stats.norm.ppf(0.975) / stats.norm.ppf(0.75), rel=0.1
    )


def test_a_seed_decides_the_samples():
    run = run_of(np.random.default_rng(6).random(100) < 0.5)
    assert bootstrap(run, samples=300, seed=1) == bootstrap(run, samples=300, seed=1)
    assert bootstrap(run, samples=300, seed=1) != bootstrap(run, samples=300, seed=2)


def test_a_true_shift_is_found_though_the_intervals_overlap():
    rng = np.random.default_rng(7)
    before = rng.random(1000) < 0.5
    after = before | (rng.random(1000) < 0.05)
    found = paired_bootstrap(run_of(before), run_of(after))["i2t/r1"]
    assert found.value == pytest.approx(100 * (after.mean() - before.mean()))
    assert 0 < found.interval.low < found.value < found.interval.high
    assert found.p == pytest.approx(2 / 2001)
    first, second = (bootstrap(run_of(hits))["i2t/r1"] for hits in (before, after))
    assert first.high > second.low
    back = paired_bootstrap(run_of(after), run_of(before))["i2t/r1"]
    assert (back.value, back.p) == (-found.value, found.p)


def test_every_metric_has_its_difference():
    run = run_of([True, False, True, True], [False, False, True, True])
    found = paired_bootstrap(run, run_of([True] * 4), samples=100)
    assert list(found) == list(METRICS)
    assert [found[name].value for name in METRICS] == [25, 25, 25, 50, 50, 50, 225]


def test_a_run_against_itself_is_no_difference():
    run = run_of([True, False, True])
    assert {one.p for one in paired_bootstrap(run, run, samples=20).values()} == {1.0}


def test_the_null_is_rejected_about_as_often_as_it_says():
    rng = np.random.default_rng(8)
    ps = []
    for seed in range(200):
        first, second = (run_of(rng.random(200) < 0.6) for _ in range(2))
        ps.append(paired_bootstrap(first, second, samples=300, seed=seed)["i2t/r1"].p)
    assert 0.03 <= np.mean(np.array(ps) <= 0.1) <= 0.18  # 0.1, three standard errors either way


def test_errors():
    to_text, to_image, owner = RAGGED
    with pytest.raises(EvaluationError, match=r"an image row for each of 6 ranked captions, found shape \(5,\)"):
        Clusters.of(to_text, to_image, owner[:5])
    with pytest.raises(EvaluationError, match=r"rows 0 to 2, .* for 3 ranked images, found rows 0 to 2, 1 of them"):
        Clusters.of(to_text, to_image, torch.tensor([0, 0, 0, 2, 2, 2]))
    with pytest.raises(EvaluationError, match=r"found rows 0 to 3, 0 of them missing"):
        Clusters.of(to_text, to_image, torch.tensor([0, 1, 3, 2, 2, 2]))
    with pytest.raises(EvaluationError, match=r"found 0 samples, level 0.95"):
        bootstrap(Clusters.of(*RAGGED), samples=0)
    with pytest.raises(EvaluationError, match=r"found 10 samples, level 1.0"):
        bootstrap(Clusters.of(*RAGGED), samples=10, level=1.0)
    with pytest.raises(EvaluationError, match=r"found 3 images with 6 captions and 2 with 2"):
        paired_bootstrap(Clusters.of(*RAGGED), run_of([True, True]))
