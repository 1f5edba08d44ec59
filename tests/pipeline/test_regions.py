"""Regions from extraction to a picture query: a detector's boxes are the parts that a tower reads."""

import json
import math

import numpy as np
import pytest

from evaluate.search import Searcher
from featurize.images.decode import decode
from pipeline.__main__ import main
from train.batches import FeatureReader
from train.config import SettingsError
from train.models import open_model

pytestmark = pytest.mark.slow

SMALL = [
    *("--data.scenes.train", "24", "--data.scenes.val", "12", "--data.scenes.test", "4"),
    *("--featurize.views", "plain,flip"),
    *("--train.model.image.vectors", ""),
    *("--train.workers", "0", "--train.epochs", "2", "--train.batch", "32", "--train.model.dim", "32"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, detector_file, ray_local):
    """Trains a method on regions; all share one cache."""
    place = tmp_path_factory.mktemp("place")
    images = f"regions:fasterrcnn_mobilenet_v3_large_320_fpn@{detector_file}+k=6+score=0.3"

    def train(method, parts, *more):
        places = ["--cache", str(place / "cache"), "--runs", str(place / "runs"), "--name", method]
        settings = [*SMALL, "--featurize.images", images, "--train.model.image.parts", parts, *more]
        assert main(["run", method, *places, *settings]) == 0
        return place / "runs" / method

    return train


def rsum(folder):
    return json.loads((folder / "metrics.json").read_text())["rsum"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("sede-vse", "regions"),
        ("sede-vsrn", "placed"),
        ("hier", "regions", "--train.model.image.aggregator", "attention"),  # there is no other vector of the image
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_vector_of_regions_finds_its_own_picture(run, arguments):
    folder = run(*arguments)
    assert math.isfinite(rsum(folder))
    searcher = Searcher.open(folder)
    reader = FeatureReader(searcher.inputs)
    rows = np.arange(len(reader.dataset.samples))
    assert len(reader.images(rows, 0 * rows).masks[0].sum(1).unique()) > 1  # numbers of regions differ
    for sample in reader.dataset.samples[:3]:
        hits = searcher.search(decode(sample.read()), k=2)
        assert hits[0].sample.image_id == sample.image_id
        assert hits[0].distance < 0.02 < hits[1].distance


def test_scan_compares_regions_with_words(run):
    folder = run("sede-scan", "regions")
    assert math.isfinite(rsum(folder))
    model, inputs = open_model(folder / "model")
    assert [[ref.output for ref in views] for views in inputs.image_parts] == [["regions", "regions"]]
    with pytest.raises(SettingsError, match="so there is no"):
        model.require_index()
