"""Everything on an S3 server: images and cache there, extraction, training, upkeep; the same numbers as from a disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate.embed import embed_split
from evaluate.protocols import evaluate_host
from featurize import copies
from featurize import fill as filling
from featurize.columns import column_folders, open_column
from featurize.config import DataConfig, FeaturizeConfig, ScenesConfig, TableConfig
from featurize.datasets.scenes import read_scenes
from featurize.extract import extract_shard
from featurize.index import open_dataset
from featurize.leases import LOCK
from featurize.manifest import CacheError, read_manifest
from featurize.places import files, found, publish, read, remove_file
from featurize.remote import OPEN
from featurize.verify import verify
from pipeline import stages
from pipeline import upkeep as commands
from pipeline.config import RayConfig, RunConfig
from train.batches import FeatureReader
from train.checkpoints import Checkpoints
from train.loop import Work, train_worker
from train.state import read_state

ROOT = Path(__file__).parents[2]


class NoBar:
    def update(self, n=1):
        pass

    def set_description(self, desc):
        pass

    def close(self):
        pass


def moved(tiny_cache, bucket):
    """The tiny cache in a store."""
    folder = tiny_cache.dataset.folder
    there = bucket / "cache" / folder.name
    for path in folder.rglob("*"):
        if path.is_file():
            publish(there / path.relative_to(folder).as_posix(), path.read_bytes())
    columns = [replace(column, folder=there / column.folder.name) for column in tiny_cache.columns]
    return replace(tiny_cache, dataset=open_dataset(there), columns=columns)


def trained(cache, config, folder):
    """Losses, rSums and weights of a training in this process."""
    inputs = cache.inputs(config)
    logged = []

    def validate(model):
        embedded = embed_split(model, FeatureReader(inputs), "val")
        return evaluate_host(model, *embedded, split="val", protocol="full", tile=1024).as_flat()

    work = Work(config, inputs, "train", validate, lambda metrics, step: logged.append((step, dict(metrics))))
    train_worker(work, Checkpoints(folder), torch.device("cpu"), lambda _total, _done: NoBar())
    return logged, read_state(Checkpoints(folder).latest())["best_weights"]


@pytest.mark.parametrize("gib", ["1", "0", "0.00004"], ids=["copied", "streamed", "evicted"])
def test_training_from_a_store_gives_the_same_numbers(
    tiny_cache, tiny_config, bucket, node, tmp_path, monkeypatch, gib
):
    config = replace(tiny_config, epochs=1)
    expected, weights = trained(tiny_cache, config, tmp_path / "here")
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", gib)
    logged, found = trained(moved(tiny_cache, bucket), config, tmp_path / "there")
    assert logged == expected
    assert found.keys() == weights.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, weights[name], atol=0, rtol=0)
    copies = sum(path.stat().st_size for path in node.glob("*.tar")) if node.exists() else 0
    assert copies <= float(gib) * 2**30
    assert bool(copies) == (gib != "0")


def test_windows_with_a_disk_smaller_than_the_cache(tiny_cache, tiny_config, bucket, node, monkeypatch):
    """Room for two windows of one shard of each column; every shard is fetched about once an epoch."""
    config = replace(tiny_config, epochs=2, window=1)
    expected, _ = trained(tiny_cache, config, node.parent / "here")
    cache = moved(tiny_cache, bucket)
    names = ("one.pooled", "one.pooled.flip", "two.pooled", "two.pooled.flip", "words.sentence")
    shards = [shard for c in cache.columns if c.name in names for shard in read_manifest(c.folder).shards]
    room = 2 * sum(max(s.size for s in read_manifest(c.folder).shards) for c in cache.columns if c.name in names)
    assert room < sum(shard.size for shard in shards)
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", repr(room / 2**30))
    fetched, most = [], []
    fetch = copies._fetch

    def counting(settings, source, record, path):
        fetched.append(str(source))
        held = fetch(settings, source, record, path)
        most.append(sum(one.stat().st_size for one in node.glob("*.tar")))
        return held

    monkeypatch.setattr(copies, "_fetch", counting)
    logged, _ = trained(cache, config, node.parent / "there")
    assert logged == expected
    assert max(most) <= room
    assert len(fetched) <= 4 * len(shards)  # two epochs, each with a validation


def test_a_second_node_pulls_only_what_it_needs(tiny_cache, tiny_config, bucket, tmp_path, monkeypatch):
    cache = moved(tiny_cache, bucket)
    trained(cache, replace(tiny_config, epochs=1), tmp_path / "run")
    OPEN.clear()
    monkeypatch.setenv("ISTHMUS_LOCAL", str(tmp_path / "second"))
    reader = FeatureReader(cache.inputs(tiny_config))
    assert not (tmp_path / "second").exists()
    reader.images(np.arange(3), np.zeros(3, np.int64))
    wanted = [read_manifest(c.folder).shards[0].sha256 for c in cache.columns if c.name in ("one.pooled", "two.pooled")]
    assert {path.stem for path in (tmp_path / "second").glob("*.tar")} == set(wanted)


def here_alone(monkeypatch):
    """Extract in this process, without Ray."""

    def run(tasks, _config):
        for task in tasks:
            extract_shard(task)

    monkeypatch.setattr(filling, "_run", run)
    monkeypatch.setattr(stages, "ray_session", lambda _config: nullcontext())
    monkeypatch.setattr(commands, "ray_session", lambda _config: nullcontext())


@pytest.fixture
def without_ray(monkeypatch):
    here_alone(monkeypatch)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A table of ten pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    samples = list(read_scenes(folder / "drawn", ScenesConfig(train=6, val=2, test=2)))
    with (folder / "table.jsonl").open("w") as table:
        for number, sample in enumerate(samples):
            (folder / f"{number}.jpg").write_bytes(sample.read())
            row = {"id": sample.image_id, "image": f"{number}.jpg", "caption": sample.captions, "split": sample.split}
            table.write(json.dumps(row) + "\n")
    shutil.rmtree(folder / "drawn")
    return folder


def settings(root, cache):
    return RunConfig(
        data=DataConfig(dataset="table", root=str(root), table=TableConfig(id="id")),
        featurize=FeaturizeConfig(rows_per_shard=4, precision="float32"),
        cache=str(cache),
    )


def contents(dataset_folder):
    """Content of all files of the columns, by path; and of the quarantine."""
    found = {}
    for folder in [dataset_folder, *column_folders(dataset_folder)]:
        for file in files(folder):
            if file.name not in ("samples.parquet", LOCK):
                found[f"{folder.name}/{file.name}"] = read(folder / file.name)
    return found


@pytest.fixture(scope="module")
def on_disk(pictures, tmp_path_factory):
    """The pictures featurized from a disk into a disk."""
    with pytest.MonkeyPatch.context() as patched:
        here_alone(patched)
        return stages.featurize(settings(pictures, tmp_path_factory.mktemp("cache")))[0]


@pytest.fixture
def both(pictures, bucket, on_disk, without_ray):
    """The same from a store into a store; the two data sets."""
    for path in pictures.iterdir():
        publish(bucket / "pictures" / path.name, path.read_bytes())
    there, _ = stages.featurize(settings(bucket / "pictures", bucket / "cache"))
    return on_disk, there


def test_featurize_into_a_store(both, bucket, node, tmp_path, capsys):
    here, there = both
    assert there.id == here.id
    assert str(there.folder) == f"{bucket}cache/{here.folder.name}"
    assert contents(there.folder) == contents(here.folder)
    capsys.readouterr()
    stages.featurize(settings(bucket / "pictures", bucket / "cache"))
    assert "2 columns found, 0 rows to extract" in capsys.readouterr().out
    assert not list(verify(there.folder))
    commands.ls(str(bucket / "cache"))
    listed = capsys.readouterr().out
    assert re.search(r"efficientnet-lite0\.pooled@\w{8}\s+10 rows\s+1280 float16 .* no run yet", listed)
    # a version that shares rows: whole shards are copied in the store, and nothing is described that is known
    lines = read(bucket / "pictures" / "table.jsonl").splitlines()
    publish(bucket / "pictures" / "table.jsonl", b"\n".join(lines[:-1]))
    second, columns = stages.featurize(settings(bucket / "pictures", bucket / "cache"))
    assert ", 0 rows to extract" in capsys.readouterr().out
    assert not list(verify(second.folder))
    for column in columns:
        old = next(folder for folder in column_folders(there.folder) if folder.name.startswith(column.name))
        assert read(column.folder / "000000.tar") == read(old / "000000.tar")
    commands.explain(str(there.folder), str(second.folder))
    assert "images only in the first: 1" in capsys.readouterr().out


def test_upkeep_of_a_cache_in_a_store(both, bucket, capsys, monkeypatch, tmp_path):
    here, there = both
    expected = contents(here.folder)
    image = next(folder for folder in column_folders(there.folder) if folder.name.startswith("efficientnet"))
    publish(image / "000001.tar", read(image / "000000.tar"))
    remove_file(image / "000002.tar")
    assert commands.check(str(bucket / "cache"), 0) == 2
    told = capsys.readouterr().out
    assert re.search(r"s3://.*000001\.tar: its bytes have the sha256", told)
    assert re.search(r"s3://.*000002\.tar: is missing", told)
    assert commands.repair(str(bucket / "cache"), RayConfig()) == 0
    assert contents(there.folder) == expected
    commands.gc(str(bucket / "cache"), 7, delete=False)
    assert "nothing to free" in capsys.readouterr().out
    run = stages._new_run(replace(settings(bucket, bucket / "cache"), runs=str(tmp_path / "runs")), there, {})
    assert stages._pinned(run)[0] == there
    commands.gc(str(bucket / "cache"), 0, delete=False)
    assert f"{there.folder}  " not in capsys.readouterr().out
    shutil.rmtree(run)
    commands.gc(str(bucket / "cache"), 0, delete=False)
    assert f"{there.folder}  " in capsys.readouterr().out
    monkeypatch.setattr("featurize.upkeep.platform.node", lambda: "another machine")
    commands.gc(str(bucket / "cache"), 0, delete=False)
    assert f"{there.folder}  " not in capsys.readouterr().out  # that run may well be there
    remove_file(found(there.folder, "uses/*.json")[0])
    commands.gc(str(bucket / "cache"), 0, delete=True)
    assert re.search(r"freed \d\.\d MiB in 1 folders", capsys.readouterr().out)
    assert found(bucket / "cache", "*@*") == []


def test_a_cache_whose_store_is_not_there(s3, node):
    for command in (commands.ls, lambda cache: commands.check(cache, 0)):
        with pytest.raises(CacheError, match="there is no bucket 'no-such-bucket'"):
            command("s3://no-such-bucket/cache")
    with pytest.raises(CacheError, match="there is no bucket 'no-such-bucket'"):
        stages.featurize(settings("/nowhere", "s3://no-such-bucket/cache"))


def test_scenes_are_drawn_beside_the_copies(bucket, node, without_ray):
    config = replace(settings("", bucket / "cache"), data=DataConfig(scenes=ScenesConfig(train=2, val=2, test=2)))
    dataset = stages._index(config)
    assert all(sample.image.startswith(str(node / "scenes")) for sample in dataset.samples)


def test_a_job_that_lost_its_lease_ends_well(both, bucket, monkeypatch, capsys):
    """Another job finishes the column while this one still extracts."""
    _, there = both
    config = settings(bucket / "pictures", bucket / "cache")
    (folder, *_) = column_folders(there.folder)
    manifest = read_manifest(folder)
    promised = read(folder / "000000.tar")
    manifest.reopen(folder, sound=())

    def run(tasks, _config):
        manifest.write(folder)
        for task in tasks:
            extract_shard(task)

    monkeypatch.setattr(filling, "_run", run)
    stages.featurize(config)
    assert read_manifest(folder) == manifest
    assert read(folder / "000000.tar") == promised
    assert not found(folder, "0*.json")


def command(root, cache, s3, folder):
    places = ["--dataset", "table", "--root", str(root), "--cache", str(cache), "--runs", str(folder)]
    overrides = ["--data.table.id", "id", "--featurize.rows_per_shard", "1", "--featurize.precision", "float32"]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "featurize", "infonce", *places, *overrides],
        cwd=ROOT,
        env={**os.environ, **s3, "ISTHMUS_LOCAL": str(folder / "node")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process):
    end = time.monotonic() + 200
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_killed_with_the_lease_and_two_at_once(pictures, bucket, s3, tmp_path):
    """What it finished stays, and of two jobs that wait for its lease one takes it over."""
    for path in pictures.iterdir():
        publish(bucket / "pictures" / path.name, path.read_bytes())
    root, cache = bucket / "pictures", bucket / "cache"
    first = command(root, cache, s3, tmp_path)
    records = wait_for(lambda: found(cache, "*@*/*@*/0*.json"), first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert found(cache, f"*@*/*@*/{LOCK}")
    jobs = [command(root, cache, s3, tmp_path) for _ in range(2)]
    told = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
    assert all("waiting for another job that makes" in out for out in told)
    rows = sorted(int(re.search(r"(\d+) rows to extract", out)[1]) for out in told)
    assert rows[0] == 0
    everything = 10 * 6 + 50 * 2  # three image networks in two views; sentences and lemmas of five captions each
    assert 0 < rows[1] <= everything - len(records)
    (folder,) = {path.parent.parent for path in found(cache, "*@*/*@*/manifest.json")}
    assert not list(verify(folder))
    assert not found(cache, f"*@*/*@*/{LOCK}")
    dataset = open_dataset(folder)
    for column in column_folders(folder):
        open_column(dataset, column.name.partition("@")[0], read_manifest(column).id)
