"""Who used what, why two things differ, making again what is broken, freeing what nobody needs."""

import json
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock
from upath import UPath

from featurize import describe
from featurize.columns import open_column
from featurize.config import FeaturizeConfig, ScenesConfig
from featurize.datasets.scenes import read_scenes
from featurize.fill import fill
from featurize.index import index
from featurize.manifest import CacheError, read_manifest, touch, write_record
from featurize.places import files, publish
from featurize.plan import plan
from featurize.upkeep import dataset_folders, explain, note_use, removable, remove, repair, uses
from featurize.verify import drift, verify

CONFIG = FeaturizeConfig(rows_per_shard=4, precision="float32", max_quarantined=0.5)


@pytest.fixture(scope="module")
def original(tmp_path_factory, ray_local):
    """Ten pictures, described."""
    folder = tmp_path_factory.mktemp("original")
    samples = list(read_scenes(folder / "scenes", ScenesConfig(train=6, val=2, test=2)))
    dataset = index(samples, "scenes", folder / "cache", max_quarantined=0)
    fill(dataset, CONFIG, plan(dataset, CONFIG, ("pooled",), ("sentence", "tokens")))
    return dataset


@pytest.fixture
def extracted(original, tmp_path):
    """A copy to break: the data set and its column folders, by name."""
    shutil.copytree(original.folder, tmp_path / original.folder.name)
    dataset = replace(original, folder=tmp_path / original.folder.name)
    return dataset, {path.name.partition("@")[0]: path for path in sorted(dataset.folder.glob("*@*"))}


def damage(path):
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def age(folder, days):
    moment = time.time() - days * 86400
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (moment, moment))


def test_broken_shards_are_made_again_and_no_others(extracted, capsys):
    dataset, folders = extracted
    before = {path: path.read_bytes() for folder in folders.values() for path in folder.glob("[!.]*")}
    damage(folders["efficientnet-lite0.pooled"] / "000001.tar")
    damage(folders["minilm.tokens"] / "000000.tar")
    (folders["minilm.sentence"] / "000002.tar").unlink()
    problems = list(verify(dataset.folder))
    assert {(problem.folder, problem.shard) for problem in problems} == {
        (folders["efficientnet-lite0.pooled"], 1),
        (folders["minilm.tokens"], 0),
        (folders["minilm.sentence"], 2),
    }
    repair(dataset, problems, CONFIG)
    captions = [len(sample.captions) for sample in dataset.samples]
    assert f"{4 + sum(captions[:4]) + sum(captions[8:])} rows to extract" in capsys.readouterr().out
    assert not list(verify(dataset.folder))
    after = {path: path.read_bytes() for folder in folders.values() for path in folder.glob("[!.]*")}
    assert after == before


def test_a_repair_with_another_network_gives_nothing_up(extracted, monkeypatch):
    """And the others are mended, whichever comes first."""
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    manifest = read_manifest(folder)
    damage(folder / "000001.tar")
    damage(folders["minilm.sentence"] / "000000.tar")
    other = describe.image_encoder("efficientnet-lite0", "float32")
    changed = replace(other.card, preprocessing={**other.card.preprocessing, "resize": [7, 7]})
    monkeypatch.setattr(other, "card", changed)
    for problems in (list(verify(dataset.folder)), list(verify(dataset.folder))[::-1]):
        _, (refused,) = repair(dataset, problems, CONFIG)
        assert refused.folder == folder
        assert "is not the one that made it (preprocessing.resize: [224, 224], [7, 7])" in str(refused)
        assert read_manifest(folder) == manifest
        assert [problem.folder for problem in verify(dataset.folder)] == [folder]


@pytest.mark.parametrize("there", [True, False])
def test_a_repair_without_the_images_gives_nothing_up(extracted, tmp_path, there):
    """Captions need none."""
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    manifest = read_manifest(folder)
    damage(folder / "000001.tar")
    damage(folders["minilm.tokens"] / "000000.tar")
    other = tmp_path / "other.jpg"
    if there:
        other.write_bytes(b"other")
    samples = tuple(replace(sample, image=str(other), span=None) for sample in dataset.samples)
    mended, (refused,) = repair(replace(dataset, samples=samples), verify(dataset.folder), CONFIG)
    assert mended == [folders["minilm.tokens"]]
    what = "is not the image that was indexed as" if there else "cannot be read ([Errno 2] No such file or directory"
    assert str(refused).startswith(f"{folder}: {other}: {what}")
    assert read_manifest(folder) == manifest
    assert [(problem.folder, problem.shard) for problem in verify(dataset.folder)] == [(folder, 1)]


def test_an_image_that_had_no_values_may_be_missing(extracted, tmp_path):
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    manifest = read_manifest(folder)
    first, second, third = manifest.shards
    replace(manifest, shards=(first, replace(second, quarantined=(1,), reasons=("gone",)), third)).write(folder)
    damage(folder / "000001.tar")
    samples = list(dataset.samples)
    samples[5] = replace(samples[5], image=str(tmp_path / "gone.jpg"), span=None)
    assert repair(replace(dataset, samples=tuple(samples)), verify(dataset.folder), CONFIG) == ([folder], [])
    assert read_manifest(folder).missing.tolist() == [5]
    assert not list(verify(dataset.folder))


def test_a_repair_that_was_interrupted_goes_on(extracted, monkeypatch, capsys):
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    whole = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    damage(folder / "000001.tar")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("featurize.upkeep.fill", stopped)
        with pytest.raises(KeyboardInterrupt):
            repair(dataset, verify(dataset.folder), CONFIG)
    assert read_manifest(folder) is None
    problems = list(verify(dataset.folder))
    assert [(problem.folder, problem.begun) for problem in problems] == [(folder, True)]
    capsys.readouterr()
    assert repair(dataset, problems, CONFIG) == ([folder], [])
    assert "4 rows to extract" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.glob("[!.]*")} == whole
    assert not list(verify(dataset.folder))


def test_an_unfinished_column_without_its_images_is_left(extracted, tmp_path):
    """Those of finished shards are not needed."""
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    read_manifest(folder).reopen(folder, sound=(0, 2))
    gone = [replace(sample, image=str(tmp_path / "gone.jpg"), span=None) for sample in dataset.samples]
    needed = replace(dataset, samples=(*dataset.samples[:6], *gone[6:]))
    mended, (refused,) = repair(needed, verify(dataset.folder), CONFIG)
    assert (mended, refused.folder) == ([], folder)
    assert "gone.jpg: cannot be read" in str(refused)
    needless = replace(dataset, samples=(*gone[:4], *dataset.samples[4:8], *gone[8:]))
    assert repair(needless, verify(dataset.folder), CONFIG) == ([folder], [])
    assert not list(verify(dataset.folder))


def test_what_a_job_left_that_died_at_the_very_end_makes_no_shard_sound(extracted):
    """The manifest is published, the records are still there."""
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    manifest = read_manifest(folder)
    for number, record in enumerate(manifest.shards):
        write_record(folder, number, record)
    damage(folder / "000001.tar")
    assert repair(dataset, verify(dataset.folder), CONFIG) == ([folder], [])
    assert read_manifest(folder) == manifest
    assert not list(verify(dataset.folder))


def test_a_damaged_index_that_versions_share_is_repaired(extracted, tmp_path):
    """One length within the padding of its member, so that nothing but the tar tells it."""
    dataset, _ = extracted
    version = index(dataset.samples[:9], "scenes", tmp_path, max_quarantined=0)
    config = replace(CONFIG, texts=("lexicon",))
    for one in (dataset, version):
        (column,) = plan(one, config, (), ("lemmas",))
        fill(one, config, [column])
    beside = column.folder / "000000.idx.npy"
    assert beside.stat().st_nlink == 2
    data = bytearray(beside.read_bytes())
    data[136] ^= 1
    with beside.open("r+b") as file:
        file.write(data)
    for broken in (dataset, version):
        problems = list(verify(broken.folder))
        assert [problem.shard for problem in problems] == [0]
        repair(broken, problems, CONFIG)
        assert not list(verify(broken.folder))


def test_rows_described_again_are_the_same_on_the_same_machine(extracted):
    dataset, folders = extracted
    for folder in folders.values():
        found = drift(dataset, folder, read_manifest(folder), 3)
        expected = 3 if "pooled" in folder.name else None
        assert expected in (None, found.rows)
        assert found.largest < 2e-2, found
        assert found.cosine > 0.9999, found


def test_drift_is_measured(extracted, make_column, make_dataset):
    """One row with its sign turned: the cosine is that of opposites, the difference twice its largest value."""
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    manifest = read_manifest(folder)
    stored = open_column(dataset, manifest.name, manifest.id)
    row = np.array(stored.row(5), np.float64)
    data = bytearray((folder / "000001.tar").read_bytes())
    stride = stored.shards[1].stride
    values = np.frombuffer(data, np.float16, 1280, stride + 640)
    values[:] = -values
    (folder / "000001.tar").write_bytes(data)
    found = drift(dataset, folder, manifest, 10)
    assert found.rows == 10
    assert found.cosine == pytest.approx(-1, abs=1e-4)
    assert found.largest == pytest.approx(2 * row.max(), rel=1e-2)


def test_drift_of_a_changed_image_is_refused(extracted, tmp_path):
    dataset, folders = extracted
    folder = folders["efficientnet-lite0.pooled"]
    other = tmp_path / "other.jpg"
    other.write_bytes(b"other")
    samples = tuple(replace(sample, image=str(other), span=None) for sample in dataset.samples)
    with pytest.raises(CacheError, match="is not the image that was indexed as"):
        drift(replace(dataset, samples=samples), folder, read_manifest(folder), 2)


def test_what_differs_between_columns_is_named(make_column, make_dataset):
    dataset = make_dataset()
    _, one = make_column(dataset, weights="a" * 64, preprocessing={"resize": [224, 224], "filter": "bicubic"})
    _, other = make_column(dataset, weights="b" * 64, preprocessing={"resize": [240, 240], "filter": "bicubic"})
    assert explain(one, other) == [f"weights: {'a' * 12}, {'b' * 12}", "preprocessing.resize: [224, 224], [240, 240]"]
    assert explain(one, one) == []


def test_what_differs_between_versions_is_named(make_samples, make_column, tmp_path):
    samples = make_samples(tmp_path / "in")
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    (tmp_path / "in" / "2.jpg").write_bytes(b"changed")
    changed = [
        replace(samples[1], captions=("new",)),
        samples[2],
        replace(samples[3], split="val"),
        replace(samples[0], image_id="new"),
        samples[5],
        samples[4],
    ]
    second = index(changed, "set", tmp_path / "cache", max_quarantined=0)
    expected = [
        "images only in the first: 1 (id0)",
        "images only in the second: 1 (new)",
        "images with other bytes: 1 (id2)",
        "images with other captions: 1 (id1)",
        "other splits: 1 (id3)",
        "the order of the images",
    ]
    assert explain(first.folder, second.folder) == expected
    columns = [make_column(dataset)[1] for dataset in (first, second)]
    assert explain(*columns) == [f"dataset: {first.id[:12]}, {second.id[:12]}", *expected]


def test_folders_that_cannot_be_compared_are_refused(make_column, make_dataset, tmp_path):
    dataset = make_dataset()
    _, column = make_column(dataset)
    for one, other in ((column, dataset.folder), (tmp_path, tmp_path)):
        with pytest.raises(CacheError, match=r"expected the folders of two columns .* or of two data sets"):
            explain(one, other)


def test_uses_are_remembered_once_for_each_run(make_dataset, tmp_path):
    dataset = make_dataset()
    assert uses(dataset.folder) == []
    run = tmp_path / "runs" / "one"
    note_use(dataset, run, [("b", "1" * 64), ("a", "2" * 64)])
    note_use(dataset, run, [("b", "1" * 64)])
    (use,) = uses(dataset.folder)
    assert (use.run, use.columns, use.exists) == (str(run), ("b@11111111",), False)
    run.mkdir(parents=True)
    assert use.exists


def test_a_run_on_another_node_is_not_seen_and_keeps_what_it_reads(make_dataset, make_column, tmp_path, monkeypatch):
    """Several nodes share the cache, each has its runs on a disk of its own."""
    dataset = make_dataset()
    manifest, _ = make_column(dataset)
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "other")
        note_use(dataset, tmp_path / "run", [("one.pooled", manifest.id)])
        assert not uses(dataset.folder)[0].exists
    (use,) = uses(dataset.folder)
    assert (use.machine, use.exists, use.elsewhere) == ("other", True, True)
    age(dataset.folder, 9)
    assert removable(dataset.folder, 7) == []
    (tmp_path / "run").mkdir()  # a disk that both have
    assert (use.exists, use.elsewhere) == (True, False)


def test_what_an_earlier_version_noted_is_this_machine_s(make_dataset, tmp_path):
    dataset = make_dataset()
    note_use(dataset, tmp_path / "run", [])
    (path,) = (dataset.folder / "uses").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": ""}))
    (use,) = uses(dataset.folder)
    assert (use.exists, use.elsewhere) == (False, False)


def test_what_no_run_reads_may_go(make_dataset, make_column, tmp_path):
    dataset = make_dataset()
    folders = {name: make_column(dataset, name)[1] for name in ("read", "gone", "never", "young")}
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    note_use(dataset, run, [("read", manifests["read"].id)])
    note_use(dataset, run.with_name("two"), [("gone", manifests["gone"].id), ("read", manifests["read"].id)])
    for name in ("read", "gone", "never"):
        age(folders[name], 9)
    found = removable(dataset.folder, 7)
    assert {one.folder: one.reason for one in found} == {
        folders["gone"]: f"its last run, {run.with_name('two')}, is gone; 9 days old",
        folders["never"]: "no run reads it; 9 days old",
    }
    assert removable(dataset.folder, 10) == []
    size = sum(path.stat().st_size for path in folders["gone"].iterdir())
    assert next(one.size for one in found if one.folder == folders["gone"]) == size
    remove(found)
    assert {name for name, folder in folders.items() if folder.exists()} == {"read", "young"}


def test_what_a_job_may_read_stays_while_it_makes_the_rest(make_dataset, make_column):
    """It notes that it reads the columns that it found when all are made, which may be days later."""
    dataset = make_dataset()
    _, found = make_column(dataset, "found.pooled")
    making = dataset.folder / "making.pooled@00000000"
    making.mkdir()
    age(dataset.folder, 9)
    with FileLock(making / ".lock"):
        assert removable(dataset.folder, 0) == []
    assert [one.folder for one in removable(dataset.folder, 7)] == [found]


def test_what_a_job_has_found_is_young(make_dataset, make_column):
    dataset = make_dataset()
    _, folder = make_column(dataset)
    _, other = make_column(dataset, "two.pooled")
    age(dataset.folder, 9)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    touch(folder)
    assert [one.folder for one in removable(dataset.folder, 7)] == [other]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    touch(dataset.folder / "gone.pooled@00000000")
    assert not (dataset.folder / "gone.pooled@00000000").exists()


def test_what_a_job_has_found_in_a_store_is_young(make_dataset, make_column):
    dataset = make_dataset()
    _, local = make_column(dataset)
    folder = UPath(f"memory://touched/{local.parent.name}/{local.name}")
    for path in local.iterdir():
        publish(folder / path.name, path.read_bytes())
    touch(folder)
    assert [file.name for file in files(folder) if file.name.startswith(".")] == [".used"]
    touch(folder.with_name("gone.pooled@00000000"))
    assert files(folder.with_name("gone.pooled@00000000")) == []


def test_shared_shards_free_nothing(make_dataset, make_column):
    dataset = make_dataset()
    _, folder = make_column(dataset)
    os.link(folder / "000000.tar", dataset.folder / "second name")
    age(folder, 9)
    (found,) = removable(dataset.folder, 7)
    assert found.size == sum(path.stat().st_size for path in folder.iterdir() if path.name != "000000.tar")


def test_a_data_set_that_nobody_needs_goes_as_a_whole(make_dataset, make_column, tmp_path):
    dataset = make_dataset()
    make_column(dataset)
    unfinished = dataset.folder / "two.pooled@00000000"
    unfinished.mkdir()
    age(dataset.folder, 30)
    (found,) = removable(dataset.folder, 7)
    assert (found.folder, found.reason) == (dataset.folder, "no run reads any of its 2 columns; 30 days old")
    note_use(dataset, tmp_path, [])
    assert [one.reason for one in removable(dataset.folder, 7)] == [
        "no run reads it; 30 days old",
        "unfinished, no run reads it; 30 days old",
    ]
    remove([found])
    assert not dataset.folder.exists()


def test_a_use_survives_as_plain_json(make_dataset, tmp_path):
    dataset = make_dataset()
    note_use(dataset, tmp_path / "run", [("a", "1" * 64)])
    (path,) = (dataset.folder / "uses").iterdir()
    assert json.loads(path.read_text())["columns"] == ["a@11111111"]


def test_a_damaged_use_is_no_licence_to_free(make_dataset, make_column, tmp_path):
    dataset = make_dataset()
    make_column(dataset)
    note_use(dataset, tmp_path, [])
    (path,) = (dataset.folder / "uses").iterdir()
    for damage in ("{", "[]", "{}"):
        path.write_text(damage)
        with pytest.raises(CacheError, match=r"damaged .* remove it if its run is gone"):
            removable(dataset.folder, 0)


def test_what_a_removal_left_when_it_was_killed_is_found_again(make_dataset, make_column):
    """Indexes and manifests go first: without them the rest must not be forgotten."""
    dataset = make_dataset()
    _, folder = make_column(dataset)
    (dataset.folder / "samples.parquet").unlink()
    (folder / "manifest.json").unlink()
    (dataset.folder.parent / "package@1.0.0" / "data").mkdir(parents=True)
    (dataset.folder.parent / "other@01234567").mkdir()
    age(dataset.folder, 9)
    assert dataset_folders(dataset.folder.parent) == [dataset.folder]
    (found,) = removable(dataset.folder, 7)
    assert (found.folder, found.reason) == (dataset.folder, "no run reads any of its 1 columns; 9 days old")
    remove([found])
    assert dataset_folders(dataset.folder.parent) == []
    assert dataset_folders(dataset.folder.parent / "gone") == []


def test_a_damaged_column_may_go_too(make_dataset, make_column):
    dataset = make_dataset()
    make_column(dataset, "young.pooled")
    _, folder = make_column(dataset)
    (folder / "manifest.json").write_text("{")
    age(folder, 9)
    assert [one.reason for one in removable(dataset.folder, 7)] == ["damaged, no run reads it; 9 days old"]


def test_damage_of_a_column_stops_no_job_that_does_without_it(extracted, capsys):
    dataset, folders = extracted
    (folders["minilm.tokens"] / "manifest.json").write_text("{")
    fill(dataset, CONFIG, plan(dataset, CONFIG, ("pooled",), ("sentence",)))
    assert "2 columns found, 0 rows to extract" in capsys.readouterr().out
    with pytest.raises(CacheError, match=r"manifest\.json: damaged"):
        fill(dataset, CONFIG, plan(dataset, CONFIG, (), ("tokens",)))


def test_other_libraries_are_told_beside_the_ingredients(make_column, make_dataset):
    dataset = make_dataset()
    manifest, one = make_column(dataset, weights="a")
    _, other = make_column(dataset, weights="b")
    changed = replace(manifest, environment={**manifest.environment, "torch": "0.1"})
    changed.write(one)
    torch = manifest.environment["torch"]
    assert explain(one, other) == ["weights: a, b", f"environment.torch: 0.1, {torch} (no part of the identity)"]
