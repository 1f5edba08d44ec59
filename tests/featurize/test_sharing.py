"""Versions of a data set: what they have in common is neither described nor stored twice."""

import re
from dataclasses import replace

import numpy as np
import pytest

from featurize.columns import open_column
from featurize.config import FeaturizeConfig, ScenesConfig
from featurize.datasets.scenes import read_scenes
from featurize.fill import fill, tasks_for
from featurize.index import index
from featurize.manifest import read_manifest
from featurize.plan import PlannedColumn, plan
from featurize.quarantine import read_quarantine
from featurize.sharing import known_rows
from featurize.upkeep import repair
from featurize.verify import verify

CONFIG = FeaturizeConfig(rows_per_shard=4, precision="float32", views=("plain", "crop"), max_quarantined=0.5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return list(read_scenes(tmp_path_factory.mktemp("scenes"), ScenesConfig(train=8, val=2, test=2)))


@pytest.fixture(scope="module")
def cache(pictures, tmp_path_factory, ray_local):
    """A cache with a version of ten images."""
    folder = tmp_path_factory.mktemp("cache")
    made(folder, pictures[:10])
    return folder


def version(cache, samples):
    dataset = index(samples, "scenes", cache, max_quarantined=0.5)
    return dataset, plan(dataset, CONFIG, ("pooled",), ("sentence", "tokens"))


def made(cache, samples, config=CONFIG):
    dataset, columns = version(cache, samples)
    fill(dataset, config, columns)
    assert not list(verify(dataset.folder))
    return dataset, {column.name: column for column in columns}


def rows_to_describe(tasks):
    return sum(len(task.unknown) for task in tasks)


def same_values(cache, one, other, pairs):
    """Whether rows of two versions hold the same numbers, in every column."""
    for name in one[1]:
        columns = [open_column(dataset, name, found[name].id) for dataset, found in (one, other)]
        for rows in pairs["text" if name.startswith("minilm") else "image"]:
            np.testing.assert_array_equal(*(column.row(row) for column, row in zip(columns, rows, strict=True)))


def test_appended_rows_alone_are_described(cache, pictures, capsys):
    dataset, columns = version(cache, pictures)
    tasks, known = tasks_for(dataset, CONFIG, columns)
    captions = sum(len(sample.captions) for sample in pictures[10:])
    assert rows_to_describe(tasks) == 2 * 2 + captions
    earlier = sum(len(sample.captions) for sample in pictures[:10])
    assert known == 2 * 10 + 2 * earlier
    fill(dataset, CONFIG, columns)
    assert f"{2 * 2 + captions} rows to extract" in capsys.readouterr().out
    assert not list(verify(dataset.folder))
    one, other = made(cache, pictures[:10]), (dataset, {column.name: column for column in columns})
    images, texts = [(row, row) for row in range(10)], [(row, row) for row in range(earlier)]
    same_values(cache, one, other, {"image": images, "text": texts})


def test_whole_shards_are_the_same_file(cache, pictures):
    _, first = made(cache, pictures[:10])
    _, second = made(cache, pictures)
    for name, column in first.items():
        files = [[path.stat().st_ino for path in sorted(c.folder.glob("*.tar"))] for c in (column, second[name])]
        assert files[0][:2] == files[1][:2], name
        assert files[0][2] != files[1][2], name  # two rows of four
        shards = [read_manifest(c.folder).shards for c in (column, second[name])]
        assert shards[0][:2] == shards[1][:2]


def test_removed_rows_shift_the_others_without_describing_them(cache, pictures, capsys):
    kept = [*pictures[:3], *pictures[5:10]]
    second = made(cache, kept)
    assert ", 0 rows to extract" in capsys.readouterr().out
    images = [(row, row + 2 * (row > 2)) for row in range(8)]
    same_values(cache, second, made(cache, pictures[:10]), {"image": images, "text": []})


def test_changed_captions_leave_the_image_columns_alone(cache, pictures):
    samples = [replace(pictures[0], captions=("something else", *pictures[0].captions[1:])), *pictures[1:10]]
    dataset, columns = version(cache, samples)
    (task,) = [task for task in tasks_for(dataset, CONFIG, columns)[0] if task.unknown]
    assert (task.modality, task.unknown) == ("text", [0])


def test_changed_bytes_are_described_again(cache, pictures):
    samples = [*pictures[:9], replace(pictures[9], image=pictures[11].image, span=pictures[11].span)]
    dataset, columns = version(cache, samples)
    tasks = [task for task in tasks_for(dataset, CONFIG, columns)[0] if task.unknown]
    assert [(task.view, task.number, task.unknown) for task in tasks] == [("plain", 2, [1]), ("crop", 2, [1])]


def test_int8_is_made_of_float16_without_a_network(cache, pictures, capsys):
    half = made(cache, pictures[:10])
    config = replace(CONFIG, storage="int8")
    columns = plan(half[0], config, ("pooled",), ("sentence", "tokens"))
    assert {column.output.dtype for column in columns} == {"int8"}
    capsys.readouterr()
    fill(half[0], config, columns)
    assert "0 columns found, 0 rows to extract" in capsys.readouterr().out
    assert not list(verify(half[0].folder))
    for column in columns:
        kept = open_column(half[0], column.name, half[1][column.name].id)
        small = open_column(half[0], column.name, column.id)
        if column.name != "minilm.sentence":  # 768 bytes are not worth it: a member of a tar takes 512 at a time
            assert read_manifest(column.folder).size < 0.8 * read_manifest(half[1][column.name].folder).size
        for row in range(kept.rows):
            atol = np.abs(kept.row(row)).max() / 127
            np.testing.assert_allclose(small.row(row), kept.row(row), atol=atol, rtol=0)


def test_int8_is_the_same_with_and_without_float16_beside_it(cache, pictures, tmp_path, ray_local):
    config = replace(CONFIG, storage="int8")
    both = [(index(pictures[:10], "scenes", place, max_quarantined=0)) for place in (cache, tmp_path)]
    planned = [plan(dataset, config, ("pooled",), ("tokens",)) for dataset in both]
    for dataset, columns in zip(both, planned, strict=True):
        fill(dataset, config, columns)
    for one, other in zip(*planned, strict=True):
        assert read_manifest(one.folder).shards == read_manifest(other.folder).shards


def test_float32_is_described_anew_and_keeps_more(cache, pictures):
    half = made(cache, pictures[:10])
    config = replace(CONFIG, storage="float32", views=("plain",))
    (column,) = plan(half[0], config, ("pooled",), ())
    tasks, known = tasks_for(half[0], config, [column])
    assert (rows_to_describe(tasks), known) == (10, 0)
    fill(half[0], config, [column])
    full = open_column(half[0], column.name, column.id).gather(np.arange(10))
    assert full.dtype == np.float32
    kept = open_column(half[0], column.name, half[1][column.name].id).gather(np.arange(10))
    np.testing.assert_array_equal(full.astype(np.float16), kept)


def test_damage_is_not_handed_on(pictures, tmp_path, ray_local):
    _, columns = made(tmp_path, pictures[:4])
    tar = columns["efficientnet-lite0.pooled"].folder / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    second, copies = made(tmp_path, [pictures[5], *pictures[:4]])  # `made` asks `verify`
    rows = open_column(second, "efficientnet-lite0.pooled", copies["efficientnet-lite0.pooled"].id)
    assert rows.row(1).tobytes() != data[640:3200]


def test_a_damaged_shard_gets_no_second_name(pictures, tmp_path, ray_local):
    _, columns = made(tmp_path, pictures[:4])
    tar = columns["efficientnet-lite0.pooled"].folder / "000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700] + b"!" + whole[701:])
    _, copies = made(tmp_path, pictures[:5])  # `made` asks `verify`
    again = copies["efficientnet-lite0.pooled"].folder / "000000.tar"
    assert (again.read_bytes(), again.stat().st_nlink) == (whole, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_a_damaged_shard_that_versions_share_is_repaired_in_all(pictures, tmp_path, ray_local, capsys, order):
    """Whichever version is asked for it first, what it was found to be is forgotten when it is repaired."""
    versions = [made(tmp_path, pictures[:count]) for count in (4, 5, 6)]
    versions = [versions[place] for place in order]
    tars = [columns["efficientnet-lite0.pooled"].folder / "000000.tar" for _, columns in versions]
    assert {tar.stat().st_nlink for tar in tars} == {3}
    whole = tars[0].read_bytes()
    with tars[0].open("r+b") as file:
        file.seek(700)
        file.write(b"!")
    capsys.readouterr()
    for dataset, _ in versions:
        problems = list(verify(dataset.folder))
        assert [problem.shard for problem in problems] == [0]
        repair(dataset, problems, CONFIG)
        assert not list(verify(dataset.folder))
    told = re.findall(r"(\d+) rows to extract(?:, (\d+) rows are known already)?", capsys.readouterr().out)
    assert (told[0], told[2]) == (("4", ""), ("0", "4"))  # the second may ask the third, which is damaged still
    assert [tar.read_bytes() for tar in tars] == [whole] * 3


def test_a_damaged_version_is_left_aside(pictures, tmp_path, ray_local, capsys):
    dataset, _ = made(tmp_path, pictures[:4])
    (dataset.folder / "samples.parquet").write_bytes(b"gone")
    for folder in dataset.folder.glob("minilm.tokens@*"):
        (folder / "manifest.json").write_text("{")
    capsys.readouterr()
    second, columns = version(tmp_path / "elsewhere", pictures[:5])
    second = replace(second, folder=tmp_path / second.folder.name)
    second.folder.mkdir()
    columns = [replace(column, folder=second.folder / column.folder.name) for column in columns]
    tasks, known = tasks_for(second, CONFIG, columns)
    assert known == 0
    assert rows_to_describe(tasks) == 2 * 5 + sum(len(sample.captions) for sample in pictures[:5])


@pytest.mark.parametrize("kept", [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
def test_a_column_that_was_brought_from_another_version_gives_nothing(make_samples, make_column, tmp_path, kept):
    """Its rows are not those of the images beside it, whether or not they are as many."""
    samples = make_samples(tmp_path / "in")
    first, second, third = (
        index(chosen, "set", tmp_path / "cache", max_quarantined=0)
        for chosen in (samples, [samples[row] for row in kept], samples[1:])
    )
    manifest, folder = make_column(first)
    column = PlannedColumn.of(third.folder / folder.name, manifest)
    known = known_rows(third, column)
    assert [row.donor.path.parent for row in known] == [folder] * 5
    moved = second.folder / folder.name
    folder.rename(moved)
    assert known_rows(third, column) == []


def test_quarantined_rows_stay_so_until_they_are_tried_again(pictures, tmp_path, ray_local, capsys):
    """The first job could not read two images that were there when they were indexed."""
    paths = [tmp_path / f"{number}.jpg" for number in range(6)]
    samples = [replace(picture, image=str(path), span=None) for picture, path in zip(pictures, paths, strict=False)]
    for path, picture in zip(paths, pictures, strict=False):
        path.write_bytes(picture.read())
    dataset, columns = version(tmp_path, samples)
    away = [paths[number].rename(tmp_path / f"away{number}") for number in (1, 5)]
    fill(dataset, CONFIG, columns)
    names = ("efficientnet-lite0.pooled", "efficientnet-lite0.pooled.crop")
    found = [(problem.image_id, problem.stage, problem.columns) for problem in read_quarantine(dataset.folder)]
    assert found == [(samples[number].image_id, "read", names) for number in (1, 5)]
    for path, number in zip(away, (1, 5), strict=True):
        path.rename(paths[number])
    before = {column.name: open_column(dataset, column.name, column.id) for column in columns}

    capsys.readouterr()
    fill(dataset, CONFIG, columns)
    assert "4 columns found, 0 rows to extract" in capsys.readouterr().out
    assert read_manifest(columns[0].folder).missing.tolist() == [1, 5]

    fill(dataset, replace(CONFIG, retry_quarantined=True), columns)
    assert "2 columns found, 4 rows to extract, 8 rows are known already" in capsys.readouterr().out
    assert read_quarantine(dataset.folder) == []
    assert not list(verify(dataset.folder))
    for column in columns:
        after = open_column(dataset, column.name, column.id)
        for row in range(after.rows):
            assert np.isfinite(after.row(row)).all()
            if column.modality == "text" or row not in (1, 5):
                np.testing.assert_array_equal(after.row(row), before[column.name].row(row))
