"""An index that depends on content alone."""

import json
import os
import re
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurize.datasets.sample import Sample
from featurize.index import index, open_dataset
from featurize.manifest import CacheError
from featurize.verify import verify


def test_an_index_is_read_back(make_dataset):
    dataset = make_dataset()
    assert open_dataset(dataset.folder) == dataset
    assert dataset.folder.name == f"set@{dataset.id[:8]}"
    assert dataset.caption_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_spans_are_read_back(tmp_path):
    (tmp_path / "pack").write_bytes(b"xxoneyytwo")
    samples = [
        Sample("a", str(tmp_path / "pack"), ("one",), "train", (2, 3)),
        Sample("b", str(tmp_path / "pack"), ("two",), "train", (7, 3)),
    ]
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    opened = open_dataset(dataset.folder)
    assert [sample.read() for sample in opened.samples] == [b"one", b"two"]


def test_a_span_beyond_the_file_is_quarantined(tmp_path):
    (tmp_path / "pack").write_bytes(b"short")
    sample = Sample("a", str(tmp_path / "pack"), ("one",), "train", (2, 30))
    dataset = index([sample], "set", tmp_path / "cache", max_quarantined=1)
    assert "expected 30 bytes at offset 2, found 3" in dataset.quarantine[0].reason


def test_identity_follows_content_not_place(make_samples, tmp_path):
    here = index(make_samples(tmp_path / "a"), "set", tmp_path / "cache", max_quarantined=0)
    moved = index(make_samples(tmp_path / "b"), "set", tmp_path / "cache", max_quarantined=0)
    assert here.id == moved.id
    other = index(make_samples(tmp_path / "c", content=b"other %d"), "set", tmp_path / "cache", max_quarantined=0)
    assert other.id != here.id
    text = [Sample(s.image_id, s.image, ("changed",), s.split) for s in make_samples(tmp_path / "a")]
    assert index(text, "set", tmp_path / "cache", max_quarantined=0).id != here.id


def test_unchanged_files_are_not_hashed_again(make_samples, tmp_path, monkeypatch):
    samples = make_samples(tmp_path / "in")
    for sample in samples:
        os.utime(sample.image, (1_700_000_000, 1_700_000_000))
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    monkeypatch.setattr(Sample, "read", lambda _self: pytest.fail("was read again"))
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id == first.id


def test_a_changed_file_is_hashed_again(make_samples, tmp_path):
    samples = make_samples(tmp_path / "in")
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    path = tmp_path / "in" / "3.jpg"
    path.write_bytes(b"picture X")  # the same length
    os.utime(path, ns=(1, 1))
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id != first.id


def without_hashes(path):
    pq.write_table(pq.read_table(path).drop_columns(["sha256"]), path)


def with_foreign_bytes(path):
    text = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pq.read_table(path).slice(0, 1).set_column(4, "image", text), path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PAR1 and no more"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:-100] + b"\xff" * 92 + path.read_bytes()[-8:]),
        without_hashes,
        with_foreign_bytes,
    ],
    ids=["empty", "short", "cut", "overwritten", "without hashes", "not UTF-8"],
)
def test_a_damaged_index_is_written_anew_and_holds_up_no_other_version(make_samples, tmp_path, damage):
    samples = make_samples(tmp_path / "in")
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    damage(dataset.folder / "samples.parquet")
    with pytest.raises(CacheError, match=r"run `featurize` again|lacks sha256"):
        open_dataset(dataset.folder)
    other = index(samples[:5], "set", tmp_path / "cache", max_quarantined=0)
    assert open_dataset(other.folder) == other != dataset
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0) == dataset
    assert open_dataset(dataset.folder) == dataset


@pytest.mark.parametrize("seconds", [-1, 3600], ids=["just written", "from the future"])
def test_a_time_that_proves_nothing_is_not_believed(make_samples, tmp_path, seconds):
    samples = make_samples(tmp_path / "in")
    moment = time.time() + seconds
    os.utime(samples[3].image, (moment, moment))
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    (tmp_path / "in" / "3.jpg").write_bytes(b"picture X")  # as a clock that was set back would have it
    os.utime(samples[3].image, (moment, moment))
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id != first.id


def test_what_cannot_be_used_is_quarantined(make_samples, tmp_path):
    samples = make_samples(tmp_path / "in", 4)
    (tmp_path / "in" / "0.jpg").unlink()
    (tmp_path / "in" / "1.jpg").write_bytes(b"")
    samples[2] = Sample("id2", samples[2].image, ("  ", "kept", b"caf\xe9".decode(errors="surrogateescape")), "train")
    samples[3] = Sample("id3", samples[3].image, ("",), "train")
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0.9)
    assert [(s.image_id, s.captions) for s in dataset.samples] == [("id2", ("kept",))]
    rows = [json.loads(line) for line in (dataset.folder / "quarantine.jsonl").read_text().splitlines()]
    found = [(row["image_id"], row["stage"], row["reason"].split("'")[0]) for row in rows]
    assert found == [
        ("id0", "read", "FileNotFoundError: [Errno 2] No such file or directory: "),
        ("id1", "read", f"the file is empty: {samples[1].image}"),
        ("id2", "caption", "caption 0 is empty"),
        ("id2", "caption", "caption 2 is not UTF-8"),
        ("id3", "caption", "caption 0 is empty"),
        ("id3", "caption", "no usable caption; the image is left out"),
    ]
    assert len(rows[2]["sha256"]) == 64
    assert open_dataset(dataset.folder).quarantine == dataset.quarantine


def test_an_id_that_is_not_utf8_is_quarantined(make_samples, tmp_path):
    samples = make_samples(tmp_path / "in", 2)
    samples[1] = Sample("caf\udce9", samples[1].image, ("a",), "train")
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0.5)
    assert [problem.reason for problem in dataset.quarantine] == ["the image id is not UTF-8"]
    assert open_dataset(dataset.folder) == dataset


@pytest.mark.parametrize(("field", "said"), [("image", "path"), ("split", "split")])
def test_other_names_that_are_not_utf8_are_quarantined(make_samples, tmp_path, field, said):
    samples = make_samples(tmp_path / "in", 2)
    odd = os.fsdecode(bytes(tmp_path / "in") + b"/caf\xe9.jpg")
    Path(odd).write_bytes(b"picture")
    samples[1] = replace(samples[1], **{field: odd})
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0.5)
    (problem,) = dataset.quarantine
    assert (problem.stage, problem.reason, len(problem.sha256)) == ("read", f"the {said} is not UTF-8", 64)
    assert open_dataset(dataset.folder) == dataset


def test_what_is_no_file_is_quarantined(make_samples, tmp_path):
    samples = make_samples(tmp_path / "in", 4)
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "in" / "gone")
    os.mkfifo(tmp_path / "in" / "pipe")
    odd = [tmp_path / "in", tmp_path / "in" / "dangling", tmp_path / "in" / "pipe"]
    samples[1:] = [replace(sample, image=str(path)) for sample, path in zip(samples[1:], odd, strict=True)]
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0.75)
    assert [sample.image_id for sample in dataset.samples] == ["id0"]
    assert [(problem.image_id, problem.stage, problem.reason) for problem in dataset.quarantine] == [
        ("id1", "read", f"OSError: {odd[0]}: not a file but a folder"),
        ("id2", "read", f"FileNotFoundError: [Errno 2] No such file or directory: '{odd[1]}'"),
        ("id3", "read", f"OSError: {odd[2]}: not a file but a pipe, socket or device"),
    ]


HOSTILE = ("..", "../../up", "/etc/passwd", "a/b.c", ".", "a\nb", "a\0b", "%2E", "é", "x" * 3000, "~", " ")


def test_no_id_becomes_a_path(make_column, tmp_path):
    (tmp_path / "in").mkdir()
    samples = []
    for number, name in enumerate(HOSTILE):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"picture %d" % number)
        samples.append(Sample(name, str(tmp_path / "in" / f"{number}.jpg"), ("a caption",), "train"))
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    _, folder = make_column(dataset, shards=(7, 5), values=np.arange(36, dtype=np.float16).reshape(12, 3))
    assert [sample.image_id for sample in open_dataset(dataset.folder).samples] == list(HOSTILE)
    assert list(verify(dataset.folder)) == []
    members = []
    for shard in ("000000.tar", "000001.tar"):
        with tarfile.open(folder / shard) as tar:
            members += tar.getnames()
    assert len(set(members)) == len(HOSTILE)
    assert all(re.fullmatch(r"[\w%~-]+\.npy", member, re.ASCII) for member in members)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written == {"in", "cache"}


def test_too_much_quarantine_ends_the_job(make_samples, tmp_path):
    samples = make_samples(tmp_path / "in", 4)
    (tmp_path / "in" / "0.jpg").unlink()
    with pytest.raises(
        CacheError, match=r"1 of 4 images cannot be used, more than the 10%.*\n  id0: read: FileNotFound"
    ):
        index(samples, "set", tmp_path / "cache", max_quarantined=0.1)
    (listed,) = (tmp_path / "cache").glob("set@*/quarantine.jsonl")
    assert json.loads(listed.read_text())["image_id"] == "id0"
    with pytest.raises(CacheError, match=re.escape(f"all are listed in {listed}. The first reasons:")):
        index(samples, "set", tmp_path / "cache", max_quarantined=0.1)
    with pytest.raises(CacheError, match="1 of 1 images cannot be used"):
        index(samples[:1], "set", tmp_path / "cache", max_quarantined=0.1)


def test_no_index_is_said_to_be_none(tmp_path):
    with pytest.raises(CacheError, match="not a readable index"):
        open_dataset(tmp_path)
