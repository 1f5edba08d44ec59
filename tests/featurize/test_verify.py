"""What no longer is what it says is found."""

import hashlib
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurize.encoder import Output
from featurize.index import index
from featurize.manifest import CacheError, ShardRecord, identity, read_manifest
from featurize.plan import PlannedColumn
from featurize.shards import row_key, write_shard
from featurize.verify import verify


def texts(dataset):
    return [str(problem) for problem in verify(dataset.folder)]


def test_a_sound_cache_has_no_problems(make_column, make_dataset):
    dataset = make_dataset()
    values = np.arange(18, dtype=np.float16).reshape(6, 3)
    values[4] = np.nan
    make_column(dataset, quarantined=(4,), values=values)
    assert texts(dataset) == []


def test_a_changed_byte(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset)
    with (folder / "000001.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"!")
    (problem,) = verify(dataset.folder)
    assert str(problem) == f"{folder / '000001.tar'}: changed since it was written (sha256 differs)"
    assert (problem.folder, problem.shard) == (folder, 1)


def test_a_gap(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset, shards=(2, 2, 2))
    (folder / "000001.tar").unlink()
    (problem,) = verify(dataset.folder)
    assert (str(problem), problem.shard) == (f"{folder / '000001.tar'}: is missing", 1)


def test_a_shard_too_many(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset)
    shutil.copy(folder / "000001.tar", folder / "000002.tar")
    (problem,) = verify(dataset.folder)
    assert str(problem).startswith(f"{folder / '000002.tar'}: stands in no manifest")
    assert problem.shard is None


def test_rows_of_another_number(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset, shards=(4,))
    assert texts(dataset) == [f"{folder}: 4 rows, but the data set has 6"]


def test_rows_out_of_order(make_column, make_dataset):
    dataset = make_dataset()
    manifest, folder = make_column(dataset, shards=(3, 3))
    swapped = (manifest.shards[1], manifest.shards[0])
    for one, other in (("000000.tar", "kept"), ("000001.tar", "000000.tar"), ("kept", "000001.tar")):
        (folder / one).rename(folder / other)
    object.__setattr__(manifest, "shards", swapped)
    manifest.write(folder)
    assert [text.partition(": ")[2].partition(";")[0] for text in texts(dataset)] == [
        "row 0 belongs to 'id3', expected 'id0'",
        "row 0 belongs to 'id0', expected 'id3'",
    ]


def test_values_that_are_not_finite(make_column, make_dataset):
    dataset = make_dataset()
    values = np.zeros((6, 3), np.float16)
    values[1, 2] = np.inf
    _, folder = make_column(dataset, values=values)
    assert texts(dataset) == [f"{folder / '000000.tar'}: row 1 holds values that are not finite"]


def test_a_quarantined_row_that_holds_values(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset, quarantined=(5,))
    assert texts(dataset) == [f"{folder / '000001.tar'}: row 1 is quarantined and holds values"]


def test_values_of_another_kind(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset, values=np.zeros((6, 3), np.float32))
    assert texts(dataset)[0] == f"{folder / '000000.tar'}: holds float32(3,), its manifest says float16(3,)"


def test_an_unfinished_column(make_column, make_dataset):
    dataset = make_dataset()
    (dataset.folder / "two.pooled@00000000").mkdir()
    assert texts(dataset) == [
        f"{dataset.folder / 'two.pooled@00000000'}: unfinished (no manifest.json); run `featurize` again to finish it"
    ]


def test_an_unfinished_column_that_says_what_it_is_to_become(make_column, make_samples, tmp_path):
    samples = make_samples(tmp_path / "in")
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    manifest, folder = make_column(dataset)
    manifest.reopen(folder, sound=(0,))
    (problem,) = verify(dataset.folder)
    assert str(problem).endswith("unfinished (no manifest.json); `featurize` or `cache repair` goes on with it")
    assert (problem.begun, problem.shard, problem.mendable) == (True, None, True)
    (folder / "column.json").write_text("{")
    (problem,) = verify(dataset.folder)
    assert str(problem).startswith(f"{folder / 'column.json'}: damaged")
    assert not problem.mendable


def test_what_a_finished_column_was_to_become_is_nobody_s_business(make_column, make_dataset):
    """A job that dies at the very end leaves it."""
    dataset = make_dataset()
    _, folder = make_column(dataset)
    (folder / "column.json").write_text("{")
    assert texts(dataset) == []


def test_an_unfinished_column_of_another_version(make_column, make_samples, tmp_path):
    samples = make_samples(tmp_path / "in")
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    second = index(samples[:5], "set", tmp_path / "cache", max_quarantined=0)
    manifest, folder = make_column(first)
    manifest.reopen(folder, sound=(0,))
    moved = second.folder / folder.name
    folder.rename(moved)
    (problem,) = verify(second.folder)
    assert (
        str(problem) == f"{moved}: was made for the data set {first.id[:8]}, but stands in {second.id[:8]}; remove it"
    )
    assert not problem.mendable


def test_a_shard_that_cannot_be_read(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset)
    (folder / "000001.tar").unlink()
    (folder / "000001.tar").mkdir()
    (problem,) = verify(dataset.folder)
    assert str(problem).startswith(f"{folder / '000001.tar'}: cannot be read (")
    assert problem.shard == 1


def test_a_key_that_is_no_text(make_column, make_dataset):
    """A writer that is not ours, or damage before the checksum was taken."""
    dataset = make_dataset()
    manifest, folder = make_column(dataset)
    with (folder / "000001.tar").open("r+b") as file:
        file.write(b"\xe9")
    digest = hashlib.sha256((folder / "000001.tar").read_bytes()).hexdigest()
    replace(manifest, shards=(manifest.shards[0], replace(manifest.shards[1], sha256=digest))).write(folder)
    (problem,) = verify(dataset.folder)
    assert "row 0 belongs to '\ufffdd4', expected 'id4'" in str(problem)


def test_a_damaged_manifest_hides_no_other_column(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset)
    (folder / "manifest.json").write_text("{")
    _, other = make_column(dataset, "two.pooled", values=np.full((6, 3), np.nan, np.float16))
    first, *rest = texts(dataset)
    assert first.startswith(f"{folder / 'manifest.json'}: damaged")
    assert rest == [f"{other / f'00000{n}.tar'}: row 0 holds values that are not finite" for n in (0, 1)]


def test_an_index_that_was_edited(make_dataset):
    dataset = make_dataset()
    path = dataset.folder / "samples.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1).replace_schema_metadata(table.schema.metadata), path)
    assert f"its rows do not give the identity {dataset.id[:8]} that it states" in texts(dataset)[0]
    path.write_bytes(b"gone")
    assert "not a readable index" in texts(dataset)[0]


def test_an_index_of_something_else(make_dataset):
    dataset = make_dataset()
    path = dataset.folder / "samples.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["split"]).replace_schema_metadata({"name": "set"}), path)
    assert texts(dataset) == [f"{path}: not the index of a data set (it lacks dataset_id, split); remove it"]


def test_a_damaged_quarantine(make_dataset, make_samples, tmp_path):
    dataset = make_dataset()
    path = dataset.folder / "quarantine.jsonl"
    for damage in ('{"image_id": "a"', '{"image_id": "a"}\n', "[]\n", "\xff"):
        path.write_bytes(damage.encode("latin-1"))
        (text,) = texts(dataset)
        assert text.startswith(f"{path}: damaged (")
        assert text.endswith("run `featurize` again, which writes it anew")
    assert index(make_samples(tmp_path / "in"), "set", tmp_path / "cache", max_quarantined=0) == dataset
    assert texts(dataset) == []


def test_a_column_of_another_version(make_column, make_samples, tmp_path):
    """It has as many rows, of the same names, in the same order."""
    samples = make_samples(tmp_path / "in")
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    changed = [replace(samples[0], captions=("changed", "another")), *samples[1:]]
    second = index(changed, "set", tmp_path / "cache", max_quarantined=0)
    _, folder = make_column(first)
    moved = second.folder / folder.name
    folder.rename(moved)
    assert texts(second) == [
        f"{moved}: was made for the data set {first.id[:8]}, but stands in {second.id[:8]}; remove it"
    ]


def test_a_format_that_is_not_known_here(make_column, make_dataset):
    dataset = make_dataset()
    _, folder = make_column(dataset, format=2)
    with pytest.raises(CacheError, match="has format 2, this version of isthmus reads format 1"):
        read_manifest(folder)
    assert "use the version that wrote it, or another cache" in texts(dataset)[0]


def make_regions(dataset):
    """A ragged column of one shard; returns its folder."""
    made = {"dataset": dataset.id, "encoder": "one", "output": "regions", "view": "plain"}
    folder = dataset.folder / f"one.regions@{identity(made)[:8]}"
    folder.mkdir()
    rows = [np.full((length, 3), length, np.float16) for length in (1, 0, 2, 3, 1, 1)]
    file = write_shard(folder / "000000.tar", [row_key(s.image_id) for s in dataset.samples], rows, ragged=True)
    column = PlannedColumn("one.regions", "image", "one", Output("regions", (3,), ragged=True), "plain", made, folder)
    column.manifest(6, [ShardRecord(file.rows, file.size, file.sha256)]).write(folder)
    return folder


def check_index(dataset, damage):
    """The damage of a ragged shard's index is found, and nothing else."""
    folder = make_regions(dataset)
    assert texts(dataset) == []
    beside = folder / "000000.idx.npy"
    np.save(beside, damage(np.load(beside)))
    (problem,) = verify(dataset.folder)
    assert (str(problem), problem.shard) == (f"{beside}: is not the index of the tar beside it", 0)


def test_an_index_beside_a_ragged_shard(make_dataset, index_damage):
    check_index(make_dataset(), index_damage)


def test_an_index_that_is_wrong_within_the_padding(make_dataset):
    def shorter(index):
        index[2, 1] -= 1
        return index

    check_index(make_dataset(), shorter)


@pytest.mark.parametrize("content", [None, b"", b"\x93NUMPY", b"PK\x03\x04 no archive"])
def test_an_index_that_is_no_array(make_dataset, content):
    dataset = make_dataset()
    beside = make_regions(dataset) / "000000.idx.npy"
    beside.unlink()
    if content is not None:
        beside.write_bytes(content)
    (problem,) = verify(dataset.folder)
    assert str(problem).startswith(f"{beside}: not readable (")
    assert problem.shard == 0


def test_a_folder_that_was_renamed(make_dataset):
    dataset = make_dataset()
    moved = dataset.folder.with_name("set@00000000")
    dataset.folder.rename(moved)
    (problem,) = verify(moved)
    assert "the folder was renamed" in str(problem)


@pytest.mark.parametrize("size", [100, 2000])
def test_a_cut_shard(make_column, make_dataset, size):
    dataset = make_dataset()
    _, folder = make_column(dataset)
    os.truncate(folder / "000000.tar", size)
    assert texts(dataset) == [f"{folder / '000000.tar'}: changed since it was written (sha256 differs)"]
