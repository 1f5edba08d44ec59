"""The reader and the writer that docs/cache.md shows to other programs read what the cache holds, and write it."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from featurize.columns import open_column
from featurize.config import FeaturizeConfig, ScenesConfig
from featurize.datasets.sample import Sample
from featurize.datasets.scenes import read_scenes
from featurize.fill import fill
from featurize.index import index, open_dataset
from featurize.manifest import read_manifest
from featurize.plan import plan
from featurize.shards import write_shard
from featurize.verify import verify

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"


def shown(place):
    """What one of the page's two programs defines; they import nothing of this project."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(programs) == 2
    assert not re.search(r"(featurize|train|evaluate|pipeline)\b.*import|import.*\b(featurize|train)", programs[place])
    names = {}
    exec(programs[place], names)
    return names


@pytest.fixture
def read_column():
    return shown(0)["read_column"]


@pytest.fixture
def writer():
    return SimpleNamespace(**shown(1))


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


LONG = "x/y " * 40
IMAGES = [("a", "train", ["one", "two"]), ("../b.c", "val", ["drei \u00fc"]), (LONG, "train", ["four", "five", "six"])]


@pytest.fixture
def images(tmp_path):
    """(image_id, split, captions, path) of three files, and the samples that they are here."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"picture %d" % number)
    listed = [(*image, str(tmp_path / f"{number}.jpg")) for number, image in enumerate(IMAGES)]
    return listed, [Sample(image_id, path, tuple(captions), split) for image_id, split, captions, path in listed]


def made_of(encoder, output, dtype, identity):
    names = {"weights": "0" * 64, "preprocessing": {"size": 3}, "view": "plain"}
    return {"format": 1, "dataset": identity, "encoder": encoder, "output": output, "dtype": dtype, **names}


def by_shard(writer, values, *, captions, reasons=None):
    """Rows of the three images, or of their six captions, in shards of two images."""
    keys = [
        [writer.row_key(image_id, k) for k in range(len(texts))] if captions else [writer.row_key(image_id)]
        for image_id, _, texts in IMAGES
    ]
    flat = [key for of_image in keys for key in of_image]
    rows = [
        (key, value, (reasons or {}).get(number, ""))
        for number, (key, value) in enumerate(zip(flat, values, strict=True))
    ]
    first = sum(map(len, keys[:2]))
    return [rows[:first], rows[first:]]


def test_the_writer_of_the_documentation(writer, read_column, images, tmp_path):
    listed, samples = images
    folder, identity = writer.write_dataset(tmp_path / "cache", "theirs", listed)
    ours = index(samples, "theirs", tmp_path / "ours", max_quarantined=0)
    dataset = open_dataset(folder)
    assert (dataset.id, folder.name, dataset.samples, dataset.digests) == (
        identity,
        ours.folder.name,
        ours.samples,
        ours.digests,
    )
    assert ours.id == identity
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(3, 70)).astype(np.float16)
    pooled[1] = np.nan
    small = np.zeros(3, [("scale", "<f4"), ("values", "i1", (70,))])
    small["scale"], small["values"] = 0.5, rng.integers(-127, 128, (3, 70))
    tokens = [rng.normal(size=(length, 4)).astype(np.float16) for length in (2, 0, 5, 1, 1, 12)]
    words = [np.arange(length, dtype=np.int32) for length in (1, 2, 0, 3, 4, 5)]
    columns = {  # name: modality, dtype, shape, ragged, rows
        "net.pooled": ("image", "float16", [70], False, list(pooled)),
        "net.small": ("image", "int8", [70], False, list(small)),
        "net.tokens": ("text", "float16", [4], True, tokens),
        "net.words": ("text", "int32", [], True, words),
    }
    for name, (modality, dtype, shape, ragged, values) in columns.items():
        made = made_of("net", name.partition(".")[2], dtype, identity)
        reasons = {1: "DecodeError: cut"} if name == "net.pooled" else {}
        shards = by_shard(writer, values, captions=modality == "text", reasons=reasons)
        column = writer.write_column(folder, name, modality, made, shape, ragged, shards, 2, "net")
        opened = open_column(dataset, name, read_manifest(column).id)
        for row, value in enumerate(values):
            wanted = value["scale"] * value["values"].astype(np.float16) if dtype == "int8" else value
            np.testing.assert_array_equal(opened.row(row), wanted)
            np.testing.assert_array_equal(read_column(column)[row], value)
        for number, rows in enumerate(shards):
            again = tmp_path / f"{number:06d}.tar"
            write_shard(again, [key for key, _, _ in rows], [value for _, value, _ in rows], ragged=ragged)
            assert again.read_bytes() == (column / again.name).read_bytes()
            if ragged:
                assert (
                    again.with_suffix(".idx.npy").read_bytes()
                    == (column / again.name).with_suffix(".idx.npy").read_bytes()
                )
    assert list(verify(folder)) == []
    assert read_manifest(folder / next(folder.glob("net.pooled@*")).name).missing.tolist() == [1]


def test_what_another_program_wrote_is_found_by_a_job(writer, images, tmp_path, capsys, monkeypatch):
    """A column with the ingredients that a run computes needs no extraction."""
    listed, samples = images
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    config = FeaturizeConfig(texts=("lexicon",))
    (column,) = plan(dataset, config, (), ("lemmas",))
    rows = [np.array([number], np.int32) for number in range(6)]
    shards = by_shard(writer, rows, captions=True)
    made = column.ingredients
    folder, identity = writer.write_dataset(tmp_path / "cache", "set", listed)
    assert folder == dataset.folder
    assert made["dataset"] == identity
    writer.write_column(folder, column.name, "text", made, [], True, shards, 2, "lexicon")
    monkeypatch.setattr("featurize.fill._run", lambda *_: pytest.fail("something is extracted"))
    (manifest,) = fill(dataset, config, [column])
    assert "1 columns found, 0 rows to extract" in capsys.readouterr().out
    assert manifest.rows == 6


def test_every_file_that_the_page_names_is_there():
    text = PAGE.read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`", text) + [
        f"tests/featurize/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)
    ]
    assert len(named) >= 7
    for name in named:
        assert (PAGE.parents[1] / name).is_file(), name
