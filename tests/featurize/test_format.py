"""The reader that docs/cache.md shows to other programs reads what the cache holds."""

import re
from pathlib import Path

import numpy as np
import pytest

from featurize.columns import open_column
from featurize.config import FeaturizeConfig, ScenesConfig
from featurize.datasets.scenes import read_scenes
from featurize.fill import fill
from featurize.index import index
from featurize.plan import plan

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"


@pytest.fixture
def read_column():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    return names["read_column"]


def test_the_reader_of_the_documentation(read_column, tmp_path, ray_local):
    samples = list(read_scenes(tmp_path / "scenes", ScenesConfig(train=5, val=2, test=2)))
    config = FeaturizeConfig(rows_per_shard=4, precision="float32", texts=("minilm", "lexicon"))
    dataset = index(samples, "scenes", tmp_path, max_quarantined=0)
    columns = plan(dataset, config, ("pooled", "grid"), ("sentence", "tokens", "lemmas"))
    fill(dataset, config, columns)
    for planned in columns:
        column = open_column(dataset, planned.name, planned.id)
        rows = read_column(planned.folder)
        assert len(rows) == column.rows == dataset.rows(planned.modality)
        for number, row in enumerate(rows):
            np.testing.assert_array_equal(row, column.row(number))


def test_every_file_that_the_page_names_is_there():
    text = PAGE.read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`", text) + [
        f"tests/featurize/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)
    ]
    assert len(named) >= 7
    for name in named:
        assert (PAGE.parents[1] / name).is_file(), name
