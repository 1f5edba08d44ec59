"""A cache that refuses what it should not hold."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from featurize.columns import open_column
from featurize.index import index
from featurize.manifest import CacheError, identity, read_manifest, read_record


def test_a_column_opens_by_identity(make_column, make_dataset):
    dataset = make_dataset()
    manifest, folder = make_column(dataset, quarantined=(4,))
    assert read_manifest(folder) == manifest
    assert manifest.missing.tolist() == [4]
    column = open_column(dataset, "one.pooled", manifest.id)
    assert column.gather(np.array([5]))[0].tolist() == [15, 16, 17]


def test_a_missing_column_names_what_is_there(make_column, make_dataset):
    dataset = make_dataset()
    make_column(dataset, weights="old")
    wanted = identity({"dataset": dataset.id, "encoder": "one", "weights": "new"})
    with pytest.raises(CacheError, match=r"not in the cache \(there is one\.pooled@[0-9a-f]{8}, of another identity\)"):
        open_column(dataset, "one.pooled", wanted)


def test_an_edited_manifest_is_refused(make_column, make_dataset):
    dataset = make_dataset()
    manifest, folder = make_column(dataset)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"encoder": "one"', '"encoder": "two"'))
    with pytest.raises(CacheError, match=r"states identity .* its ingredients give"):
        open_column(dataset, "one.pooled", manifest.id)


def test_two_columns_whose_identities_begin_alike_are_told_apart(make_column, make_dataset):
    dataset = make_dataset()
    manifest, _ = make_column(dataset)
    with pytest.raises(CacheError, match=r"two columns whose identities begin alike"):
        open_column(dataset, "one.pooled", manifest.id[:8] + "0" * 56)


def test_a_half_written_manifest_is_refused(make_column, make_dataset):
    dataset = make_dataset()
    manifest, folder = make_column(dataset)
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CacheError, match="damaged"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_column_of_another_length_is_refused(make_column, make_dataset):
    dataset = make_dataset()
    manifest, _ = make_column(dataset, shards=(4,))
    with pytest.raises(CacheError, match="4 rows, but the data set has 6"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_column_of_another_version_is_refused(make_column, make_samples, tmp_path):
    """Its rows have the same number and names."""
    samples = make_samples(tmp_path / "in")
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    changed = [replace(samples[0], captions=("changed", "another")), *samples[1:]]
    second = index(changed, "set", tmp_path / "cache", max_quarantined=0)
    manifest, folder = make_column(first)
    folder.rename(second.folder / folder.name)
    with pytest.raises(CacheError, match=f"made for the data set {first.id[:8]}, but stands in {second.id[:8]}"):
        open_column(second, "one.pooled", manifest.id)


def test_rows_out_of_place_are_refused(make_column, make_dataset):
    dataset = make_dataset()
    manifest, folder = make_column(dataset, shards=(3, 3))
    shutil.copy(folder / "000000.tar", folder / "000001.tar")
    with pytest.raises(CacheError, match=r"row 0 belongs to 'id0', expected 'id3'"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_cut_shard_is_refused(make_column, make_dataset):
    dataset = make_dataset()
    manifest, folder = make_column(dataset)
    os.truncate(folder / "000000.tar", 1500)
    with pytest.raises(CacheError, match="fewer than the 4 rows"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_record_that_is_half_written_does_not_count(tmp_path):
    assert read_record(tmp_path, 0) is None
    (tmp_path / "000000.json").write_text('{"rows": 3, "si')
    assert read_record(tmp_path, 0) is None
