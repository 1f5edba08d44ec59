"""The `cache` commands on a real cache, as they are typed."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from featurize.index import open_dataset
from featurize.manifest import read_manifest
from featurize.upkeep import note_use
from featurize.verify import Problem
from pipeline.__main__ import main

ROOT = Path(__file__).parents[2]

SETTINGS = [
    *("--data.scenes.train", "6", "--data.scenes.val", "2", "--data.scenes.test", "2"),
    *("--featurize.images", "efficientnet-lite0", "--featurize.views", "plain", "--featurize.rows_per_shard", "4"),
]


def type_in(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def original(tmp_path_factory, ray_local):
    folder = tmp_path_factory.mktemp("original") / "cache"
    assert type_in("featurize", "less", "--cache", folder, *SETTINGS) == 0
    return folder


@pytest.fixture
def cache(original, tmp_path):
    shutil.copytree(original, tmp_path / "cache")
    return tmp_path / "cache"


def dataset_folder(cache):
    (found,) = cache.glob("scenes@*")
    return found


def column(cache, name):
    (found,) = dataset_folder(cache).glob(f"{name}@*")
    return found


def test_ls_shows_what_is_there_and_who_used_it(cache, tmp_path, capsys):
    folder = column(cache, "minilm.sentence")
    run = tmp_path / "runs" / "first"
    note_use(open_dataset(folder.parent), run, [("minilm.sentence", folder.name.rpartition("@")[2] + "0" * 56)])
    (folder.parent / "later.pooled@00000000").mkdir()
    assert type_in("cache", "ls", cache) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{folder.parent.name}  10 images, 50 captions, 1 runs  {folder.parent.name[7:]}")
    words = {line.split()[0]: line for line in lines}
    assert "50 rows" in words[folder.name]
    assert "384 float16" in words[folder.name]
    assert words[folder.name].endswith(" (gone)")
    assert " first 20" in words[folder.name]
    assert words[column(cache, "lexicon-en.lemmas").name].endswith("no run yet")
    assert "unfinished" in words["later.pooled@00000000"]


def test_runs_of_other_machines_are_named(cache, tmp_path, capsys, monkeypatch):
    folder = column(cache, "minilm.sentence")
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "node7")
        name, _, column_id = folder.name.partition("@")
        note_use(open_dataset(folder.parent), tmp_path / "run", [(name, column_id + "0" * 56)])
    assert type_in("cache", "ls", cache) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if folder.name in line]
    assert line.endswith(" (on node7)")
    assert type_in("cache", "gc", cache, "--days", "0", "--delete") == 0
    assert capsys.readouterr().out.endswith(
        f"{folder.parent}: runs on node7 cannot be seen from here and what they read is kept; when one is gone, remove "
        "the file in `uses` that names it\n"
    )
    assert [path.name for path in folder.parent.glob("*@*")] == [folder.name]


def test_ls_shows_what_is_damaged(cache, capsys):
    (column(cache, "minilm.sentence") / "manifest.json").write_text("{")
    assert type_in("cache", "ls", cache) == 0
    out = capsys.readouterr().out
    assert " damaged " in next(line for line in out.splitlines() if "minilm.sentence@" in line)
    assert "50 rows" in next(line for line in out.splitlines() if "lexicon-en.lemmas@" in line)
    (dataset_folder(cache) / "samples.parquet").unlink()
    assert type_in("cache", "ls", cache) == 0
    assert "  damaged: `python -m pipeline cache verify` tells more\n" in capsys.readouterr().out
    assert type_in("cache", "verify", cache) == 1
    assert "samples.parquet: not a readable index" in capsys.readouterr().out


def test_verify_and_repair(cache, capsys):
    assert type_in("cache", "verify", cache) == 0
    assert "every shard is as its manifest says" in capsys.readouterr().out
    tar = column(cache, "minilm.sentence") / "000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"!")
    assert type_in("cache", "verify", cache) == 1
    out = capsys.readouterr().out
    assert f"{tar}: changed since it was written" in out
    assert "problems: 1; `python -m pipeline cache repair` mends shards" in out
    assert type_in("cache", "repair", cache) == 0
    out = capsys.readouterr().out
    assert "0 columns found, 20 rows to extract" in out
    assert f"made again what was broken in {tar.parent.name}" in out
    assert tar.read_bytes() == whole
    assert type_in("cache", "repair", cache) == 0
    assert capsys.readouterr().out == "every shard is as its manifest says\n"


def test_problems_are_told_as_they_are_found(cache, capsys, monkeypatch):
    """Reading a large cache takes hours."""
    told = []

    def found(folder):
        for name in ("first", "second"):
            yield Problem(folder / "column", f"{folder}: {name}", 0)
            told.append(capsys.readouterr().out)

    monkeypatch.setattr("pipeline.upkeep.verify", found)
    assert type_in("cache", "verify", cache) == 1
    assert told == [f"{dataset_folder(cache)}: {name}\n" for name in ("first", "second")]
    assert capsys.readouterr().out == "problems: 2; `python -m pipeline cache repair` mends shards\n"


def test_what_cannot_be_made_here_is_named_and_the_rest_is_mended(cache, capsys, monkeypatch):
    image, text = column(cache, "efficientnet-lite0.pooled"), column(cache, "minilm.sentence")
    manifest = read_manifest(image)
    for folder in (image, text):
        (folder / "000001.tar").unlink()
    monkeypatch.setattr("featurize.datasets.sample.Sample.read", lambda _: Path("/gone").read_bytes())
    assert type_in("cache", "repair", cache) == 1
    out = capsys.readouterr().out
    assert f"cannot be made again here: {image}: " in out
    assert (
        "cannot be read ([Errno 2] No such file or directory: '/gone'), expected the image that was indexed as" in out
    )
    assert f"made again what was broken in {text.name}\n" in out
    assert out.endswith(f"left: {image / '000001.tar'}: is missing\nproblems left: 1\n")
    assert read_manifest(image) == manifest


def test_a_repair_that_was_killed_is_gone_on_with(cache, capsys, monkeypatch):
    folder = column(cache, "minilm.sentence")
    whole = read_manifest(folder)
    (folder / "000001.tar").unlink()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("featurize.upkeep.fill", stopped)
        assert type_in("cache", "repair", cache) == 130
    assert type_in("cache", "verify", cache) == 1
    assert "cache repair` mends shards" in capsys.readouterr().out
    assert type_in("cache", "repair", cache) == 0
    assert "0 columns found, 20 rows to extract" in capsys.readouterr().out
    assert read_manifest(folder).shards == whole.shards


def test_what_repair_cannot_mend_is_left(cache, capsys):
    (column(cache, "minilm.sentence") / "manifest.json").write_text("{")
    assert type_in("cache", "repair", cache) == 1
    out = capsys.readouterr().out
    assert "left: " in out
    assert "manifest.json: damaged" in out
    assert out.endswith("problems left: 1\n")


def test_verify_describes_rows_again(cache, capsys):
    assert type_in("cache", "verify", cache, "--reextract", 2) == 0
    out = capsys.readouterr().out
    for name, rows in (("efficientnet-lite0.pooled", 2), ("minilm.sentence", 10), ("lexicon-en.lemmas", 10)):
        (line,) = [line for line in out.splitlines() if line.startswith(str(column(cache, name)))]
        assert f": {rows} rows again, largest difference " in line
        assert float(line.rpartition(" ")[2]) > 0.9999


def test_a_column_that_cannot_be_described_again_hides_no_other(cache, capsys, monkeypatch):
    """A shard is missing, an encoder is not here, a picture is gone: a line each, and the rest is described."""
    names = ("efficientnet-lite0.pooled", "minilm.sentence", "lexicon-en.lemmas")
    folders = [column(cache, name) for name in names]

    def verified():
        code = type_in("cache", "verify", cache, "--reextract", 1)
        lines = capsys.readouterr().out.splitlines()
        again = [folder for folder in folders if any(str(folder) in line and "rows again" in line for line in lines)]
        wrong = {folder: [text for text in lines if str(folder) in text] for folder in folders if folder not in again}
        assert code == (1 if wrong else 0)
        return wrong

    assert verified() == {}
    (folders[0] / "000000.tar").rename(cache / "away")
    assert verified() == {folders[0]: [f"{folders[0] / '000000.tar'}: is missing"]}
    (cache / "away").rename(folders[0] / "000000.tar")
    manifest = read_manifest(folders[1])
    replace(manifest, reference="transformers:/gone").write(folders[1])
    ((folder, (text,)),) = verified().items()
    assert folder == folders[1]
    assert text.startswith(f"{folders[1]}: ")
    assert "/gone" in text
    manifest.write(folders[1])
    monkeypatch.setattr("featurize.datasets.sample.Sample.read", lambda _: Path("/gone").read_bytes())
    ((folder, (text,)),) = verified().items()
    assert folder == folders[0]
    assert "expected the image that was indexed as" in text


def test_other_libraries_are_named_beside_the_drift(cache, capsys):
    folder = column(cache, "minilm.sentence")
    manifest = read_manifest(folder)
    replace(manifest, environment={**manifest.environment, "torch": "0.1"}).write(folder)
    assert type_in("cache", "verify", cache, "--reextract", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith(str(folder)))
    assert lines[place + 1] == f"  torch: 0.1, {manifest.environment['torch']} here"
    assert sum(" here" in line for line in lines) == 1


def test_drift_is_a_problem(cache, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.upkeep.DRIFT", 1.1)
    assert type_in("cache", "verify", cache, "--reextract", 1) == 1
    assert capsys.readouterr().out.count("this machine describes rows otherwise (cosine ") == 3


def test_a_damaged_cache_is_not_described_again(cache, capsys):
    (dataset_folder(cache) / "samples.parquet").write_bytes(b"gone")
    assert type_in("cache", "verify", cache, "--reextract", 1) == 1
    assert "rows again" not in capsys.readouterr().out


def test_explain(cache, capsys):
    one, other = column(cache, "minilm.sentence"), column(cache, "efficientnet-lite0.pooled")
    assert type_in("cache", "explain", one, one) == 0
    assert capsys.readouterr().out == "the same ingredients: nothing differs\n"
    assert type_in("cache", "explain", one, other) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "column: minilm.sentence, efficientnet-lite0.pooled" in lines
    assert any(line.startswith("weights: ") for line in lines)
    assert type_in("cache", "explain", one, cache) == 2
    assert "expected the folders of two columns" in capsys.readouterr().err


def test_what_is_exported_goes_to_a_disk(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert type_in("cache", "export", column(cache, "minilm.sentence"), "s3://bucket/out", "--format", "npy") == 2
    assert "OUT: found the URI s3://bucket/out, expected a path" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_gc_shows_first_and_deletes_on_demand(cache, capsys):
    assert type_in("cache", "gc", cache) == 0
    assert capsys.readouterr().out == "nothing to free: runs read every column, or it is young\n"
    assert type_in("cache", "gc", cache, "--days", "0") == 0
    out = capsys.readouterr().out
    assert f"{dataset_folder(cache)}  " in out
    assert "MiB in 1 folders would be freed by --delete" in out
    assert column(cache, "minilm.sentence").exists()
    assert type_in("cache", "gc", cache, "--days", "0", "--delete") == 0
    assert "freed " in capsys.readouterr().out
    assert not list(cache.glob("scenes@*"))


@pytest.mark.parametrize(("command", "code"), [("ls", 141), ("ls --help", 0), ("explode", 2)])
def test_a_reader_that_has_enough_ends_a_command_quietly(cache, command, code):
    """As behind `| head -1`; a mistake keeps its own exit code."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "pipeline", "cache", *command.split()]
    arguments += [str(cache)] * (command == "ls")
    done = subprocess.run(arguments, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == code
    assert "Error" not in done.stderr
    assert bool(done.stderr) == (code == 2)


def test_gc_says_why_it_frees_nothing_beside_a_job(cache, capsys):
    with FileLock(column(cache, "minilm.sentence") / ".lock"):
        assert type_in("cache", "gc", cache, "--days", "0", "--delete") == 0
    out = capsys.readouterr().out
    assert f"{dataset_folder(cache)}: a job makes a column of it, and nothing of it is freed meanwhile\n" in out
    assert column(cache, "minilm.sentence").exists()


def test_what_may_be_quarantined_is_said_in_short(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("pipeline.stages.featurize", lambda config: asked.append(config.featurize))
    assert type_in("featurize", "less") == 0
    assert type_in("featurize", "less", "--max-quarantined", "0.2", "--retry-quarantined") == 0
    assert (
        type_in("featurize", "less", "--featurize.max_quarantined", "1", "--featurize.retry_quarantined", "true") == 0
    )
    assert [(one.max_quarantined, one.retry_quarantined) for one in asked] == [(0.05, False), (0.2, True), (1.0, True)]
    for share in ("5", "-0.1"):
        assert type_in("featurize", "less", "--max-quarantined", share) == 2
        assert f"max_quarantined: found {float(share)}, expected a share from 0 to 1" in capsys.readouterr().err
