"""Columns as files for others: what other readers see, and the same values when they are imported again."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from featurize.columns import column_folder, open_column
from featurize.encoder import Output
from featurize.export import FORMATS, export
from featurize.imports import open_import
from featurize.index import index
from featurize.manifest import CacheError, ShardRecord, identity
from featurize.plan import PlannedColumn
from featurize.shards import row_key, write_shard

NONE_LOST = frozenset()
IDS = ["plain", "a/b", "dots.in.name", "../up", "ümlaut", "x" * 120]
KINDS = ["h5", "npy", "parquet", "webdataset"]


@pytest.fixture
def dataset(make_samples, tmp_path):
    """Six images whose ids are hard to be keys, with two captions each."""
    from dataclasses import replace

    samples = [replace(s, image_id=name) for s, name in zip(make_samples(tmp_path / "in"), IDS, strict=True)]
    return index(samples, "set", tmp_path / "cache", max_quarantined=0)


@pytest.fixture
def column(dataset):
    """(output, rows, modality, lost) -> the folder of a finished column in shards of four images and two."""

    def make(output, rows, modality="image", lost=(), encoder="one"):
        made = {"dataset": dataset.id, "encoder": encoder, "output": output.name, "view": "plain"}
        name = f"{encoder}.{output.name}"
        folder = column_folder(dataset, name, identity(made))
        folder.mkdir()
        keys = [row_key(s.image_id) for s in dataset.samples]
        step = 4
        if modality == "text":
            keys = [row_key(s.image_id, number) for s in dataset.samples for number in range(2)]
            step = 8
        records = []
        for number, start in enumerate(range(0, len(keys), step)):
            inside = slice(start, start + step)
            file = write_shard(folder / f"{number:06d}.tar", keys[inside], rows[inside], ragged=output.ragged)
            bad = tuple(row - start for row in lost if start <= row < start + step)
            records.append(ShardRecord(file.rows, file.size, file.sha256, bad, tuple("cut" for _ in bad)))
        PlannedColumn(name, modality, encoder, output, "plain", made, folder).manifest(4, records).write(folder)
        return folder

    return make


@pytest.fixture
def numbers():
    return lambda *shape: np.random.default_rng(3).normal(size=shape).astype(np.float16)


def target_of(tmp_path, kind):
    return tmp_path / {"h5": "out.h5", "npy": "out", "parquet": "out.parquet", "webdataset": "out"}[kind]


def read_back(tmp_path, target, name, dataset, modality="image"):
    features = open_import(f"import:{target}", modality, tmp_path / "cache")
    output = next(output for output in features.card.outputs if output.name == name)
    return features.read([output], features.places(dataset.samples, NONE_LOST))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_command_line_knows_every_format():
    from pipeline.__main__ import EXPORT_FORMATS

    assert tuple(FORMATS) == EXPORT_FORMATS == tuple(KINDS)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_a_round_trip_changes_nothing(tmp_path, dataset, column, numbers, kind, shape):
    rows = numbers(6, *shape)
    name = "pooled" if len(shape) == 1 else "grid"
    target = target_of(tmp_path, kind)
    assert export([column(Output(name, shape), rows)], target, kind) == 0
    found, failed = read_back(tmp_path, target, name, dataset)
    assert failed == {}
    np.testing.assert_array_equal(np.stack(found[name]), rows)


def test_ragged_captions_there_and_back(tmp_path, dataset, column, numbers, kind):
    rows = [numbers(1 + number % 4, 5) for number in range(12)]
    target = target_of(tmp_path, kind)
    export([column(Output("tokens", (5,), ragged=True), rows, "text")], target, kind)
    found, _ = read_back(tmp_path, target, "tokens", dataset, "text")
    for row, back in zip(rows, found["tokens"], strict=True):
        np.testing.assert_array_equal(back, row)


def test_lemmas_there_and_back(tmp_path, dataset, column, kind):
    rows = [np.arange(number % 3, dtype=np.int32) + 10**6 for number in range(12)]
    target = target_of(tmp_path, kind)
    export([column(Output("lemmas", (), ragged=True, dtype="int32"), rows, "text")], target, kind)
    found, _ = read_back(tmp_path, target, "lemmas", dataset, "text")
    for row, back in zip(rows, found["lemmas"], strict=True):
        assert back.dtype == np.int32
        np.testing.assert_array_equal(back, row)


def test_ragged_regions_there_and_back(tmp_path, dataset, column, numbers, kind):
    rows = [numbers(1 + number, 5) for number in range(6)]
    target = target_of(tmp_path, kind)
    export([column(Output("regions", (5,), ragged=True), rows)], target, kind)
    features = open_import(f"import:{target}", "image", tmp_path / "cache")
    assert Output("regions", (5,), ragged=True) in features.card.outputs
    found, _ = features.read(features.card.outputs, features.places(dataset.samples, NONE_LOST))
    for row, back in zip(rows, found["regions"], strict=True):
        np.testing.assert_array_equal(back, row)


@pytest.mark.parametrize("same", [False, True])
def test_scores_and_labels_there_and_back(tmp_path, dataset, column, numbers, kind, same):
    counts = [3] * 6 if same else [1, 3, 2, 2, 1, 4]
    scores = [numbers(count) for count in counts]
    labels = [np.arange(count, dtype=np.int32) + 70_000 for count in counts]
    folders = [
        column(Output("scores", (), ragged=True), scores),
        column(Output("labels", (), ragged=True, dtype="int32"), labels),
    ]
    target = target_of(tmp_path, kind)
    export(folders, target, kind)
    for name, rows in (("scores", scores), ("labels", labels)):
        found, failed = read_back(tmp_path, target, name, dataset)
        assert failed == {}
        for row, back in zip(rows, found[name], strict=True):
            np.testing.assert_array_equal(back, row)


def test_rows_without_values_are_left_out(tmp_path, dataset, column, numbers, kind):
    rows = numbers(6, 5)
    rows[4] = np.nan
    pooled = column(Output("pooled", (5,)), rows, lost=(4,))
    grid = column(Output("grid", (2, 5)), numbers(6, 2, 5))
    target = target_of(tmp_path, kind)
    assert export([pooled, grid], target, kind) == 1
    for name in ("pooled", "grid"):
        found, failed = read_back(tmp_path, target, name, dataset)
        assert list(failed) == [4]
        np.testing.assert_array_equal(found[name][5], {"pooled": rows, "grid": numbers(6, 2, 5)}[name][5])


def test_two_columns_of_one_output_keep_their_whole_names(tmp_path, column, numbers):
    folders = [column(Output("pooled", (5,)), numbers(6, 5), encoder=encoder) for encoder in ("one", "two")]
    export(folders, tmp_path / "out", "npy")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ids.npy", "one.pooled.npy", "two.pooled.npy"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its last file open
def test_webdataset_joins_columns_in_one_sample(tmp_path, dataset, column, numbers):
    pooled, grid = numbers(6, 5), numbers(6, 2, 5)
    folders = [column(Output("pooled", (5,)), pooled), column(Output("grid", (2, 5)), grid)]
    export(folders, tmp_path / "out", "webdataset")
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(shards) == 2
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == IDS
    assert [sample["__key__"] for sample in samples[:4]] == ["plain", "a/b", "dots%2Ein%2Ename", "%2E%2E%2Fup"]
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["pooled.npy"], pooled[row])
        np.testing.assert_array_equal(sample["grid.npy"], grid[row])


def test_pandas_reads_lists(tmp_path, column, numbers):
    rows = numbers(6, 5)
    export([column(Output("pooled", (5,)), rows)], tmp_path / "a.parquet", "parquet")
    table = pq.read_table(tmp_path / "a.parquet").to_pandas()
    assert table["ids"].tolist() == IDS
    np.testing.assert_array_equal(np.stack(table["pooled"].tolist()), rows)


def test_numpy_reads_npy(tmp_path, column, numbers):
    rows = [numbers(1 + number, 5) for number in range(6)]
    export([column(Output("regions", (5,), ragged=True), rows)], tmp_path / "out", "npy")
    values, offsets = (np.load(tmp_path / "out" / f"regions{end}.npy") for end in ("", ".offsets"))
    np.testing.assert_array_equal(values, np.concatenate(rows))
    assert offsets.tolist() == [0, 1, 3, 6, 10, 15, 21]
    assert np.load(tmp_path / "out" / "ids.npy").tolist() == IDS


def test_nothing_is_written_over(tmp_path, column, numbers, kind):
    folder, target = column(Output("pooled", (5,)), numbers(6, 5)), target_of(tmp_path, kind)
    target.write_text("mine")
    with pytest.raises(CacheError, match=f"{target} exists; give another name"):
        export([folder], target, kind)
    assert target.read_text() == "mine"


def test_what_fails_leaves_nothing_behind(tmp_path, dataset, column, numbers, kind, monkeypatch):
    folder = column(Output("pooled", (5,)), numbers(6, 5))
    calls = iter(range(100))
    write = FORMATS[kind]

    def fail(table, path):
        write(table, path)
        assert next(calls) == 0
        raise OSError("no space left")

    monkeypatch.setitem(FORMATS, kind, fail)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="no space left"):
        export([folder], target_of(tmp_path, kind), kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_columns_of_other_rows_are_not_joined(tmp_path, column, numbers):
    image = column(Output("pooled", (5,)), numbers(6, 5))
    text = column(Output("sentence", (5,)), numbers(12, 5), "text")
    with pytest.raises(CacheError, match=r"text rows of .*, but one.pooled has image rows of .* have the same rows"):
        export([image, text], tmp_path / "a.h5", "h5")


def test_one_column_twice_is_refused(tmp_path, column, numbers):
    folder = column(Output("pooled", (5,)), numbers(6, 5))
    with pytest.raises(CacheError, match=r"two columns are called 'one.pooled'; export them one by one"):
        export([folder, folder], tmp_path / "a.h5", "h5")


def test_a_folder_without_a_column_is_refused(tmp_path):
    with pytest.raises(CacheError, match="no finished column here; give <cache>/<dataset>@<id>/<column>@<id>"):
        export([tmp_path], tmp_path / "a.h5", "h5")


def test_an_unknown_format_is_refused(tmp_path, column, numbers):
    with pytest.raises(CacheError, match="unknown format 'csv'; expected h5, npy, parquet, webdataset"):
        export([column(Output("pooled", (5,)), numbers(6, 5))], tmp_path / "a.csv", "csv")


def test_the_column_itself_is_not_touched(tmp_path, dataset, column, numbers, kind):
    rows = numbers(6, 5)
    folder = column(Output("pooled", (5,)), rows)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    export([folder], target_of(tmp_path, kind), kind)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    made = {"dataset": dataset.id, "encoder": "one", "output": "pooled", "view": "plain"}
    np.testing.assert_array_equal(open_column(dataset, "one.pooled", identity(made)).gather(np.arange(6)), rows)


def test_damage_does_not_go_out(tmp_path, column, numbers, kind):
    folder = column(Output("pooled", (3,)), numbers(6, 3))
    tar = folder / "000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:640] + b"!!" + whole[642:])
    with pytest.raises(CacheError, match=r"000001\.tar: changed since it was written .* cache repair"):
        export([folder], target_of(tmp_path, kind), kind)
    assert not target_of(tmp_path, kind).exists()
