"""Imported features as columns of the cache, beside extracted ones."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest

from featurize.columns import open_column
from featurize.config import FeaturizeConfig
from featurize.datasets.sample import DataError
from featurize.encoder import EncoderError
from featurize.extract import extract_shard
from featurize.fill import fill, tasks_for
from featurize.index import index, open_dataset
from featurize.manifest import CacheError, read_manifest
from featurize.plan import plan
from featurize.verify import drift, verify

CONFIG = FeaturizeConfig(rows_per_shard=3, max_quarantined=0.5, texts=())


@pytest.fixture
def regions(tmp_path, values):
    """Regions of six of the seven images, in an order of their own."""
    features = values(6, 4, 8)
    with h5py.File(tmp_path / "bua.h5", "w") as file:
        file["image_features"] = features
        file["ids"] = [f"picture-{number}" for number in (6, 1, 0, 2, 4, 5)]
    return tmp_path / "bua.h5", features


def extract(dataset, config, images, texts=()):
    """The planned columns, made in this process."""
    columns = plan(dataset, config, images, texts)
    tasks, _ = tasks_for(dataset, config, columns)
    for task in tasks:
        extract_shard(task)
    fill(dataset, config, columns)  # starts no task: only manifests are missing
    return {column.name: column for column in columns}


def test_columns_hold_the_file_s_rows(dataset, regions):
    path, features = regions
    columns = extract(dataset, replace(CONFIG, images=(f"import:{path}",)), ("regions", "pooled"))
    assert list(columns) == ["import-bua.regions", "import-bua.pooled"]
    column = open_column(dataset, "import-bua.regions", columns["import-bua.regions"].id)
    assert column.shape == (4, 8)
    np.testing.assert_array_equal(column.gather(np.array([0, 1, 2, 4, 5, 6])), features[[2, 1, 3, 4, 5, 0]])
    assert [str(problem) for problem in verify(dataset.folder)] == []


def test_a_row_that_is_not_in_the_file_is_quarantined(dataset, regions):
    columns = extract(dataset, replace(CONFIG, images=(f"import:{regions[0]}",)), ("regions",))
    manifest = read_manifest(columns["import-bua.regions"].folder)
    assert manifest.missing.tolist() == [3]
    row = open_column(dataset, "import-bua.regions", manifest.id).gather(np.array([3]))
    assert np.isnan(row).all()
    (line,) = map(json.loads, (dataset.folder / "quarantine.jsonl").read_text().splitlines())
    expected = {
        "image_id": "picture-3",
        "stage": "import",
        "reason": "no row in bua.h5",
        "columns": ["import-bua.regions"],
    }
    assert {key: line[key] for key in expected} == expected
    assert open_dataset(dataset.folder).quarantine == ()


def test_too_many_missing_rows_end_the_job(dataset, regions):
    config = replace(CONFIG, images=(f"import:{regions[0]}",), max_quarantined=0.1)
    with pytest.raises(CacheError, match=r"1 of 7 images cannot be used(.|\n)*picture-3: import: no row in bua.h5"):
        extract(dataset, config, ("regions",))


def test_only_wanted_outputs_are_read(dataset, regions, monkeypatch):
    from featurize.imports.reader import FeatureFile

    asked = []
    read = FeatureFile.read

    def noted(self, outputs, places):
        asked.append((tuple(output.name for output in outputs), len(places)))
        return read(self, outputs, places)

    monkeypatch.setattr(FeatureFile, "read", noted)
    extract(dataset, replace(CONFIG, images=(f"import:{regions[0]}",)), ("pooled",))
    assert asked == [(("pooled",), 3), (("pooled",), 3), (("pooled",), 1)]


@pytest.mark.parametrize(("storage", "error"), [("float32", 0), ("float16", 0.25), ("int8", 1.25)])
def test_they_are_stored_as_asked(dataset, tmp_path, values, storage, error):
    array = values(7, 8) + np.float32(0.001)
    np.save(tmp_path / "a.npy", array)
    config = replace(CONFIG, images=(f"import:{tmp_path / 'a.npy'}",), storage=storage)
    columns = extract(dataset, config, ("pooled",))
    found = open_column(dataset, "import-a.pooled", columns["import-a.pooled"].id).gather(np.arange(7))
    assert np.abs(found.astype(np.float32) - array).max() <= error
    assert (error == 0) == np.array_equal(found, array)


def test_regions_of_different_number_are_a_ragged_column(dataset, tmp_path, values):
    rows = {f"picture-{number}": values(1 + number, 8) for number in range(6)}
    np.savez(tmp_path / "r.npz", **rows)
    columns = extract(dataset, replace(CONFIG, images=(f"import:{tmp_path / 'r.npz'}",)), ("tokens",))
    column = open_column(dataset, "import-r.tokens", columns["import-r.tokens"].id)
    np.testing.assert_array_equal(column.row(4), rows["picture-4"])
    assert len(column.row(6)) == 0
    assert read_manifest(column.folder).missing.tolist() == [6]
    assert [str(problem) for problem in verify(dataset.folder)] == []


def test_vectors_that_pandas_wrote_are_a_fixed_column(dataset, samples, tmp_path, values):
    import pandas as pd

    array = values(7, 8)
    table = pd.DataFrame({"image_id": [sample.image_id for sample in samples], "pooled": list(array)})
    table.to_parquet(tmp_path / "clip.parquet")
    columns = extract(dataset, replace(CONFIG, images=(f"import:{tmp_path / 'clip.parquet'}",)), ("pooled",))
    column = open_column(dataset, "import-clip.pooled", columns["import-clip.pooled"].id)
    assert (column.ragged, column.shape) == (False, (8,))
    np.testing.assert_array_equal(column.gather(np.arange(7)), array)


def test_an_image_with_infinity_is_quarantined(dataset, tmp_path, values):
    array = values(7, 8)
    array[2, 0] = np.inf
    np.save(tmp_path / "a.npy", array)
    columns = extract(dataset, replace(CONFIG, images=(f"import:{tmp_path / 'a.npy'}",)), ("pooled",))
    manifest = read_manifest(columns["import-a.pooled"].folder)
    assert manifest.missing.tolist() == [2]
    (line,) = map(json.loads, (dataset.folder / "quarantine.jsonl").read_text().splitlines())
    assert (line["stage"], line["reason"]) == ("import", "row 2 of a.npy holds infinity")


def test_captions_by_position(dataset, tmp_path, values):
    array = values(35, 8)
    np.save(tmp_path / "clip.npy", array)
    config = replace(CONFIG, images=(), texts=(f"import:{tmp_path / 'clip.npy'}",))
    columns = extract(dataset, config, (), ("sentence",))
    column = open_column(dataset, "import-clip.sentence", columns["import-clip.sentence"].id)
    np.testing.assert_array_equal(column.gather(np.arange(35)), array)


def test_another_content_is_another_column(dataset, tmp_path, values):
    path = tmp_path / "a.npy"
    config = replace(CONFIG, images=(f"import:{path}",))
    ids = set()
    for shift in (0, 1):
        np.save(path, values(7, 8) + shift)
        (column,) = plan(dataset, config, ("pooled",), ())
        ids.add(column.id)
    assert len(ids) == 2


def test_a_refused_file_begins_no_column(dataset, tmp_path, values):
    np.save(tmp_path / "a.npy", values(6, 8))
    with pytest.raises(DataError, match="found 6 rows without ids"):
        extract(dataset, replace(CONFIG, images=(f"import:{tmp_path / 'a.npy'}",)), ("pooled",))
    assert not list(dataset.folder.glob("*@*/*.json"))


def test_a_file_that_changes_under_way_is_refused(dataset, tmp_path, values):
    path = tmp_path / "a.npy"
    np.save(path, values(7, 8))
    config = replace(CONFIG, images=(f"import:{path}",))
    tasks, _ = tasks_for(dataset, config, plan(dataset, config, ("pooled",), ()))
    np.save(path, values(7, 8) + 1)
    with pytest.raises(CacheError, match="every machine must hold the same weights"):
        extract_shard(tasks[0])


def test_another_version_of_the_data_set_reads_the_file_again(dataset, samples, tmp_path, values):
    """Rows by position belong to other images when the order changes, so none is taken from the first version."""
    array = values(7, 8)
    np.save(tmp_path / "a.npy", array)
    config = replace(CONFIG, images=(f"import:{tmp_path / 'a.npy'}",))
    extract(dataset, config, ("pooled",))
    turned = index(samples[::-1], "set", tmp_path / "cache", max_quarantined=0)
    columns = extract(turned, config, ("pooled",))
    column = open_column(turned, "import-a.pooled", columns["import-a.pooled"].id)
    np.testing.assert_array_equal(column.gather(np.arange(7)), array)


def test_views_are_refused_when_a_run_is_planned(dataset, regions):
    config = replace(CONFIG, images=(f"import:{regions[0]}",), views=("plain", "flip"))
    with pytest.raises(EncoderError, match="holds one view of each image"):
        plan(dataset, config, ("regions",), ())


def test_rows_are_read_again_to_see_the_drift(dataset, regions):
    columns = extract(dataset, replace(CONFIG, images=(f"import:{regions[0]}",)), ("regions",))
    folder = columns["import-bua.regions"].folder
    found = drift(dataset, folder, read_manifest(folder), images=4)
    assert (found.rows, found.largest) == (4, 0)
    assert found.cosine == pytest.approx(1)


@pytest.mark.slow
def test_beside_extracted_columns_by_ray_tasks(tmp_path, values, ray_local):
    from featurize.config import ScenesConfig
    from featurize.datasets.scenes import read_scenes

    samples = list(read_scenes(tmp_path / "scenes", ScenesConfig(train=4, val=1, test=1)))
    dataset = index(samples, "scenes", tmp_path / "cache", max_quarantined=0)
    features = values(6, 8)
    np.savez(tmp_path / "theirs.npz", pooled=features, ids=np.array([s.image_id for s in samples]))
    images = ("efficientnet-lite0", f"import:{tmp_path / 'theirs.npz'}")
    config = replace(CONFIG, images=images, precision="float32")
    columns = plan(dataset, config, ("pooled",), ())
    fill(dataset, config, columns)
    assert [column.name for column in columns] == ["efficientnet-lite0.pooled", "import-theirs.pooled"]
    np.testing.assert_array_equal(
        open_column(dataset, "import-theirs.pooled", columns[1].id).gather(np.arange(6)), features
    )
