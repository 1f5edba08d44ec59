"""Metrics: by hand, against loops over sorted lists, against trec_eval; reports as dictionaries and text."""

import warnings

import numpy as np
import pytest
import pytrec_eval
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.metrics import CollapseWarning, Metrics, Report, mean_metrics, measure
from evaluate.ranks import Ranks


def ranks_of(*lists, tied=0.0):
    indptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
    values = torch.tensor([rank for one in lists for rank in one])
    return Ranks(indptr, values, torch.full((len(lists),), tied, dtype=torch.float64))


def test_the_example_of_the_docstring():
    metrics = measure(ranks_of([1, 3], [2]))
    assert metrics == Metrics(r1=50, r5=100, r10=100, medr=1.5, meanr=1.5, map_r=25, r_precision=25)


def test_ragged_sets_by_hand():
    # Best ranks 1, 6, 11. First query (R = 3): hits at 1 and 3: (1/1 + 2/3) / 3. The others find nothing.
    metrics = measure(ranks_of([3, 1, 7], [6], [20, 11]))
    assert metrics.r1 == pytest.approx(100 / 3)
    assert metrics.r5 == pytest.approx(100 / 3)
    assert metrics.r10 == pytest.approx(200 / 3)
    assert metrics.medr == 6
    assert metrics.meanr == 6
    assert metrics.map_r == pytest.approx(100 * (1 + 2 / 3) / 3 / 3)
    assert metrics.r_precision == pytest.approx(100 * (2 / 3) / 3)


@pytest.mark.parametrize(
    ("ranks", "map_r", "r_precision"),
    [
        ([1, 1], 100, 100),  # two relevant items tie at the top: places 1 and 2
        ([2, 2], 25, 50),  # places 2 and 3: one hit, at half precision
        ([1, 2, 2], 100, 100),  # places 1, 2, 3
        ([2, 2, 2], 100 * (1 / 2 + 2 / 3) / 3, 200 / 3),  # places 2, 3, 4
    ],
)
def test_relevant_items_that_tie_take_places_one_after_the_other(ranks, map_r, r_precision):
    metrics = measure(ranks_of(ranks))
    assert metrics.map_r == pytest.approx(map_r)
    assert metrics.r_precision == pytest.approx(r_precision)


@st.composite
def ranked_lists(draw):
    """For each query, which places of a list of twelve are relevant."""
    places = st.lists(st.integers(1, 12), min_size=1, max_size=12, unique=True)
    return draw(st.lists(places, min_size=1, max_size=6))


@settings(deadline=None, max_examples=100)
@given(ranked_lists())
def test_equals_a_walk_down_every_list(lists):
    recall = {1: [], 5: [], 10: []}
    best, average, precision = [], [], []
    for places in lists:
        relevant = [place in places for place in range(1, 13)]
        for k, hits in recall.items():
            hits.append(any(relevant[:k]))
        best.append(relevant.index(True) + 1)
        size = sum(relevant)
        found, total = 0, 0.0
        for place, hit in enumerate(relevant[:size], start=1):
            found += hit
            total += hit * found / place
        average.append(total / size)
        precision.append(found / size)
    expected = Metrics(
        r1=100 * np.mean(recall[1]),
        r5=100 * np.mean(recall[5]),
        r10=100 * np.mean(recall[10]),
        medr=np.median(best),
        meanr=np.mean(best),
        map_r=100 * np.mean(average),
        r_precision=100 * np.mean(precision),
    )
    assert measure(ranks_of(*lists)).__dict__ == pytest.approx(expected.__dict__)


def test_equals_trec_eval():
    rng = np.random.default_rng(0)
    lists = [rng.choice(np.arange(1, 41), size=rng.integers(1, 8), replace=False) for _ in range(50)]
    relevant = {f"q{q}": {f"i{place}": 1 for place in places} for q, places in enumerate(lists)}
    run = {query: {f"i{place}": float(-place) for place in range(1, 41)} for query in relevant}
    evaluator = pytrec_eval.RelevanceEvaluator(
        relevant, {"success.1,5,10", "Rprec", "recip_rank", "map_cut.1,2,3,4,5,6,7"}
    )
    answers = list(evaluator.evaluate(run).values())
    ours = measure(ranks_of(*[places.tolist() for places in lists]))

    def mean(name):
        return 100 * np.mean([answer[name] for answer in answers])

    assert ours.r1 == pytest.approx(mean("success_1"))
    assert ours.r5 == pytest.approx(mean("success_5"))
    assert ours.r10 == pytest.approx(mean("success_10"))
    assert ours.r_precision == pytest.approx(mean("Rprec"))
    assert ours.meanr == pytest.approx(np.mean([1 / answer["recip_rank"] for answer in answers]))
    cut = [answer[f"map_cut_{len(places)}"] for answer, places in zip(answers, lists, strict=True)]
    assert ours.map_r == pytest.approx(100 * np.mean(cut))


def test_collapse_warns_above_a_tenth_of_ties():
    with pytest.warns(CollapseWarning, match=r"ties with 11% of the non-relevant ones .* has collapsed"):
        measure(ranks_of([90], tied=0.11))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(ranks_of([90], tied=0.1))


I2T = Metrics(r1=50, r5=60, r10=70, medr=1.5, meanr=12.25, map_r=33, r_precision=44)
T2I = Metrics(r1=10, r5=20, r10=30, medr=8, meanr=100, map_r=10, r_precision=10)
PLAIN = Report("val", "full", I2T, T2I)
FOLDED = Report("test", "coco_5k", I2T, T2I, Report("test", "coco_1k", T2I, I2T))


def test_report_as_nested_dictionary():
    expected = {
        "split": "val",
        "protocol": "full",
        "i2t": {
            "r1": 50,
            "r5": 60,
            "r10": 70,
            "medr": 1.5,
            "meanr": 12.25,
            "map_r": 33,
            "r_precision": 44,
        },
        "t2i": {"r1": 10, "r5": 20, "r10": 30, "medr": 8, "meanr": 100, "map_r": 10, "r_precision": 10},
        "rsum": 240,
    }
    assert PLAIN.as_dict() == expected
    folded = FOLDED.as_dict()
    assert set(folded) == {*expected, "folds_1k"}
    assert folded["folds_1k"]["i2t"]["r1"] == 10


def test_report_as_flat_numbers():
    flat = PLAIN.as_flat()
    assert len(flat) == 15
    assert flat["i2t/r1"] == 50
    assert flat["t2i/r_precision"] == 10
    assert flat["rsum"] == 240
    folded = FOLDED.as_flat()
    assert len(folded) == 30
    assert folded["folds_1k/t2i/medr"] == 1.5
    assert folded["folds_1k/rsum"] == 240


def test_report_as_text():
    assert PLAIN.as_table().splitlines() == [
        "val, full: rSum 240.0",
        "                    R@1     R@5    R@10    medR   meanR   mAP@R     R-P",
        "image to text      50.0    60.0    70.0     1.5    12.2    33.0    44.0",
        "text to image      10.0    20.0    30.0     8.0   100.0    10.0    10.0",
    ]
    assert FOLDED.as_table().splitlines()[4:6] == ["", "test, coco_1k: rSum 240.0"]


def test_mean_of_folds():
    assert mean_metrics([I2T, T2I]) == Metrics(30, 40, 50, 4.75, 56.125, 21.5, 27)
