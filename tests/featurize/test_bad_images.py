"""Shards with bad images in them: each costs its row, whatever it does, and every other row is as it would be."""

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurize import extract
from featurize.config import FeaturizeConfig
from featurize.datasets.sample import Sample
from featurize.describe import describe_texts, text_encoder
from featurize.extract import extract_shard
from featurize.fill import fill, tasks_for
from featurize.images.decoder import Decoder
from featurize.index import index
from featurize.manifest import CacheError
from featurize.plan import plan
from featurize.shards import Column
from featurize.texts.lexicon import LexiconEncoder
from featurize.verify import verify

CONFIG = FeaturizeConfig(rows_per_shard=64, precision="float32", views=("plain", "crop"), max_quarantined=0.9)

CHILD = """
import ctypes, time
from PIL import Image, ImageFile
from featurize.images import decoder_child


class Bad(ImageFile.ImageFile):
    format = "BAD"

    def _open(self):
        ctypes.string_at(0) if self.fp.read(9) == b"BAD crash" else time.sleep(600)


Image.register_open("BAD", Bad, lambda start: start.startswith(b"BAD"))
decoder_child.main()
"""


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def samples(tmp_path):
    """Good and bad images by what they are."""
    (tmp_path / "in").mkdir()

    def path(name):
        return tmp_path / "in" / f"{name}.jpg"

    noise(40, 30).save(path("good"))
    noise(50, 30).save(path("really a png"), "PNG")
    noise(1, 1).save(path("one pixel"))
    noise(3000, 1).save(path("a line"), "PNG")
    noise(60, 40).convert("CMYK").save(path("cmyk"))
    path("cut").write_bytes(path("good").read_bytes()[:900])
    path("text").write_bytes(b"<!doctype html>")
    path("crash").write_bytes(b"BAD crash")
    path("hang").write_bytes(b"BAD hang")
    noise(30, 40).save(path("last"))
    names = sorted(file.stem for file in (tmp_path / "in").iterdir())
    return [Sample(name, str(path(name)), (f"a caption of {name}",), "train") for name in names]


BAD = {
    "crash": "DecodeError: the decoder died (signal 11)",
    "cut": "DecodeError: truncated or corrupt image: OSError: image file is truncated (1 bytes not processed)",
    "hang": "DecodeError: the decoder did not answer within 1 s",
    "text": "DecodeError: no image format that PIL knows: 15 bytes that start b'<!doctyp'",
}


@pytest.fixture
def decoders(tmp_path, monkeypatch):
    """Children that know the format whose images hang and crash; collects the time limits that were asked for."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    made = {}

    def make(timeout):
        return made.setdefault(timeout, Decoder(timeout, (sys.executable, str(script))))

    monkeypatch.setattr(extract, "_own_process", make)
    return made


def prepared(samples, cache, config=CONFIG):
    dataset = index(samples, "set", cache, max_quarantined=0)
    columns = plan(dataset, config, ("pooled",), ())
    return dataset, columns, tasks_for(dataset, config, columns)[0]


def carefully(task):
    """As after a worker that died over this shard."""
    (task.targets[0].folder / f".{task.number:06d}.begun.tmp").touch()
    return extract_shard(task)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_bad_image_costs_its_row_in_every_view(samples, tmp_path, decoders, monkeypatch, device):
    dataset, _, tasks = prepared(samples, tmp_path / "cache", replace(CONFIG, decode_timeout=1.0))
    good = [sample for sample in samples if sample.image_id not in BAD]
    _, _, good_tasks = prepared(good, tmp_path / "good", replace(CONFIG, decode_timeout=60.0))
    monkeypatch.setattr(extract, "device", lambda: device)  # on a GPU threads prepare the images
    for task, good_task in zip(tasks, good_tasks, strict=True):
        (record,) = carefully(task).values()
        found = {samples[row].image_id: reason for row, reason in zip(record.quarantined, record.reasons, strict=True)}
        assert list(found) == sorted(BAD)
        assert {**found, "cut": found["cut"].split(" (")[0]} == {**BAD, "cut": BAD["cut"].split(" (")[0]}
        carefully(good_task)
        rows, expected = (
            Column("pooled", one.targets[0].folder, [len(one.samples)]).gather(np.arange(len(one.samples)))
            for one in (task, good_task)
        )
        kept = [row for row, sample in enumerate(dataset.samples) if sample.image_id not in BAD]
        assert np.isnan(np.delete(rows, kept, axis=0)).all()
        np.testing.assert_allclose(rows[kept], expected, atol=2e-3, rtol=2e-3)
    assert set(decoders) == {1.0, 60.0}


def test_a_file_that_vanishes_after_indexing_costs_its_row(samples, tmp_path):
    good = [sample for sample in samples if sample.image_id not in BAD]
    _, _, tasks = prepared(good, tmp_path / "cache")
    os.unlink(good[1].image)  # noqa: PTH108
    (record,) = extract_shard(tasks[0]).values()
    assert record.quarantined == (1,)
    assert record.reasons[0].startswith("FileNotFoundError: ")


def test_the_first_attempt_decodes_in_its_own_process_and_leaves_no_mark(samples, tmp_path, monkeypatch):
    good = [sample for sample in samples if sample.image_id not in BAD]
    _, _, (task, *_) = prepared(good, tmp_path / "cache")
    monkeypatch.setattr(extract, "_own_process", lambda _timeout: pytest.fail("a process of its own"))
    extract_shard(task)
    assert not list(task.targets[0].folder.glob(".*"))


@pytest.mark.parametrize("kind", ["crash", "hang"])
def test_an_image_that_ends_the_process_leaves_a_mark(samples, tmp_path, kind):
    """A real process, in which the decoder knows the bad format; the clock of `ends_after` ends one that hangs."""
    bad = next(sample for sample in samples if sample.image_id == kind)
    _, _, (task, *_) = prepared([samples[0], bad], tmp_path / "cache", replace(CONFIG, decode_timeout=2.0))
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    attempt = f"""
import pickle
import signal
from featurize.extract import extract_shard
with open({str(tmp_path / "task")!r}, "rb") as file:
    extract_shard(pickle.load(file))
"""
    script = CHILD.replace("decoder_child.main()", attempt)
    root = Path(extract.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -(signal.SIGSEGV if kind == "crash" else signal.SIGALRM), done.stderr
    assert [path.name for path in task.targets[0].folder.glob(".*")] == [".000000.begun.tmp"]


def test_one_decoder_serves_all_shards():
    assert extract._own_process(7.0) is extract._own_process(7.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan"), 1e9])
def test_a_time_limit_is_a_number_of_seconds(seconds):
    with pytest.raises(ValueError, match=r"^decode_timeout: found .*, expected seconds above 0, a day at most$"):
        FeaturizeConfig(decode_timeout=seconds)


def test_the_time_limit_is_no_part_of_the_identity(samples, tmp_path):
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    one, other = (plan(dataset, replace(CONFIG, decode_timeout=limit), ("pooled",), ()) for limit in (1.0, 2.0))
    assert [column.id for column in one] == [column.id for column in other]


def test_the_end_sums_up_and_counts_what_indexing_lost_too(samples, tmp_path, ray_local, capsys):
    usable = [s for s in samples if s.image_id in {"good", "last", "cut", "text"}]
    (tmp_path / "in" / "empty.jpg").touch()
    odd = [
        Sample("empty", str(tmp_path / "in" / "empty.jpg"), ("a",), "train"),
        Sample("gone", str(tmp_path / "in" / "gone.jpg"), ("a",), "train"),
    ]
    dataset = index([*usable, *odd], "set", tmp_path / "cache", max_quarantined=0.6)
    columns = plan(dataset, CONFIG, ("pooled",), ())
    fill(dataset, replace(CONFIG, max_quarantined=0.7), columns)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6:-1] == [
        "quarantined: 4 of 6 images (--featurize.max_quarantined allows 70%), 0 captions",
        "     1  decode: no image format that PIL knows",
        "     1  decode: truncated or corrupt image",
        "     1  read: FileNotFoundError",
        "     1  read: the file is empty",
    ]
    assert lines[-1].startswith(f"each is listed with its reason in {dataset.folder}/quarantine.jsonl: ")
    with pytest.raises(CacheError, match=r"4 of 6 images cannot be used, more than the 60% .*max_quarantined"):
        fill(dataset, replace(CONFIG, max_quarantined=0.6), columns)
    assert list(verify(dataset.folder)) == []


def test_captions_of_ten_thousand_words(samples, tmp_path):
    endless = " ".join(f"word{number % 500}" for number in range(10_000))
    letters = "a" * 100_000
    encoder = text_encoder("minilm", "float32")
    said = describe_texts(encoder, ["a dog", endless, letters], 2)
    assert [row.shape for row in said["sentence"]] == [(384,)] * 3
    assert np.isfinite(np.stack(said["sentence"])).all()
    assert max(len(row) for row in said["tokens"]) <= 512
    np.testing.assert_allclose(said["sentence"][0], describe_texts(encoder, ["a dog"], 1)["sentence"][0], atol=1e-5)
    assert [len(row) for row in LexiconEncoder("en").prepare([endless])] == [512]
    dataset = index([replace(samples[3], captions=(endless,))], "set", tmp_path / "cache", max_quarantined=0)
    columns = plan(dataset, replace(CONFIG, texts=("minilm", "lexicon")), (), ("sentence", "lemmas"))
    for task in tasks_for(dataset, replace(CONFIG, texts=("minilm", "lexicon")), columns)[0]:
        (record,) = extract_shard(task).values()
        assert record.rows == 1
