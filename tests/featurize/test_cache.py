"""An index that depends on content alone, and a cache that refuses what it should not hold."""

import json
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featurize.cache import (
    CacheError,
    ShardRecord,
    column_folder,
    identity,
    index,
    make_manifest,
    open_column,
    open_dataset,
    read_manifest,
    read_record,
    verify,
    write_quarantine,
)
from featurize.datasets.sample import Sample
from featurize.shards import row_key, write_shard


def make_samples(folder, count=6, content=b"picture %d"):
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        path.write_bytes(content % number)
        samples.append(Sample(f"id{number}", str(path), (f"caption {number}", "another"), "train"))
    return samples


def make_dataset(tmp_path, **options):
    return index(make_samples(tmp_path / "in"), "set", tmp_path / "cache", max_quarantined=0.5, **options)


def make_column(dataset, name="one.pooled", shards=(4, 2), quarantined=(), values=None, **more):
    ingredients = {"dataset": dataset.id, "encoder": "one", **more}
    folder = column_folder(dataset, name, identity(ingredients))
    folder.mkdir()
    rows = np.arange(18, dtype=np.float16).reshape(6, 3) if values is None else values
    records, start = [], 0
    for number, count in enumerate(shards):
        keys = [row_key(sample.image_id) for sample in dataset.samples[start : start + count]]
        file = write_shard(folder / f"{number:06d}.tar", keys, rows[start : start + count])
        bad = tuple(row - start for row in quarantined if start <= row < start + count)
        records.append(ShardRecord(file.rows, file.size, file.sha256, bad, tuple("DecodeError: cut" for _ in bad)))
        start += count
    shape = {"dtype": "float16", "shape": (3,), "ragged": False}
    manifest = make_manifest(name, "image", ingredients, shape, records)
    manifest.write(folder)
    return manifest, folder


def test_an_index_is_read_back(tmp_path):
    dataset = make_dataset(tmp_path)
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


def test_identity_follows_content_not_place(tmp_path):
    here = index(make_samples(tmp_path / "a"), "set", tmp_path / "cache", max_quarantined=0)
    moved = index(make_samples(tmp_path / "b"), "set", tmp_path / "cache", max_quarantined=0)
    assert here.id == moved.id
    other = index(make_samples(tmp_path / "c", content=b"other %d"), "set", tmp_path / "cache", max_quarantined=0)
    assert other.id != here.id
    text = [Sample(s.image_id, s.image, ("changed",), s.split) for s in make_samples(tmp_path / "a")]
    assert index(text, "set", tmp_path / "cache", max_quarantined=0).id != here.id


def test_unchanged_files_are_not_hashed_again(tmp_path, monkeypatch):
    samples = make_samples(tmp_path / "in")
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    monkeypatch.setattr(Sample, "read", lambda _self: pytest.fail("was read again"))
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id == first.id


def test_a_changed_file_is_hashed_again(tmp_path):
    samples = make_samples(tmp_path / "in")
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    path = tmp_path / "in" / "3.jpg"
    path.write_bytes(b"picture X")  # the same length
    os.utime(path, ns=(1, 1))
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id != first.id


def test_what_cannot_be_used_is_quarantined(tmp_path):
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


def test_an_id_that_is_not_utf8_is_quarantined(tmp_path):
    samples = make_samples(tmp_path / "in", 2)
    samples[1] = Sample("caf\udce9", samples[1].image, ("a",), "train")
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0.5)
    assert [problem.reason for problem in dataset.quarantine] == ["the image id is not UTF-8"]
    assert open_dataset(dataset.folder) == dataset


@pytest.mark.parametrize(("field", "said"), [("image", "path"), ("split", "split")])
def test_other_names_that_are_not_utf8_are_quarantined(tmp_path, field, said):
    samples = make_samples(tmp_path / "in", 2)
    odd = os.fsdecode(bytes(tmp_path / "in") + b"/caf\xe9.jpg")
    Path(odd).write_bytes(b"picture")
    samples[1] = replace(samples[1], **{field: odd})
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0.5)
    (problem,) = dataset.quarantine
    assert (problem.stage, problem.reason, len(problem.sha256)) == ("read", f"the {said} is not UTF-8", 64)
    assert open_dataset(dataset.folder) == dataset


def test_what_is_no_file_is_quarantined(tmp_path):
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


def test_no_id_becomes_a_path(tmp_path):
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


def test_the_quarantine_names_an_image_and_a_reason_once_and_in_order(tmp_path):
    samples = make_samples(tmp_path / "in")
    samples[2] = replace(samples[2], captions=("", "kept"))
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    columns = [make_column(dataset, name, quarantined=(4, 1))[0] for name in ("one.pooled", "one.grid")]
    gone = replace(columns[0].shards[0], reasons=("FileNotFoundError: gone",))
    columns.append(replace(columns[0], name="two.pooled", shards=(gone, columns[0].shards[1])))
    undecoded = write_quarantine(dataset, columns)
    text = (dataset.folder / "quarantine.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["image_id"], row["stage"], row["reason"], row["columns"]) for row in rows] == [
        ("id2", "caption", "caption 0 is empty", []),
        ("id1", "decode", "DecodeError: cut", ["one.grid", "one.pooled"]),
        ("id1", "read", "FileNotFoundError: gone", ["two.pooled"]),
        ("id4", "decode", "DecodeError: cut", ["one.grid", "one.pooled", "two.pooled"]),
    ]
    assert [row["sha256"] for row in rows] == [dataset.digests[row] for row in (2, 1, 1, 4)]
    assert [(problem.image_id, problem.stage) for problem in undecoded] == [("id1", "decode"), ("id4", "decode")]
    assert open_dataset(dataset.folder) == dataset
    write_quarantine(dataset, reversed(columns))
    assert (dataset.folder / "quarantine.jsonl").read_text() == text


def test_too_much_quarantine_ends_the_job(tmp_path):
    samples = make_samples(tmp_path / "in", 4)
    (tmp_path / "in" / "0.jpg").unlink()
    with pytest.raises(
        CacheError, match=r"1 of 4 images cannot be used, more than the 10%.*\n  id0: read: FileNotFound"
    ):
        index(samples, "set", tmp_path / "cache", max_quarantined=0.1)


def test_no_index_is_said_to_be_none(tmp_path):
    with pytest.raises(CacheError, match="not a readable index"):
        open_dataset(tmp_path)


def test_a_column_opens_by_identity(tmp_path):
    dataset = make_dataset(tmp_path)
    manifest, folder = make_column(dataset, quarantined=(4,))
    assert read_manifest(folder) == manifest
    assert manifest.missing.tolist() == [4]
    column = open_column(dataset, "one.pooled", manifest.id)
    assert column.gather(np.array([5]))[0].tolist() == [15, 16, 17]


def test_a_missing_column_names_what_is_there(tmp_path):
    dataset = make_dataset(tmp_path)
    make_column(dataset, weights="old")
    wanted = identity({"dataset": dataset.id, "encoder": "one", "weights": "new"})
    with pytest.raises(CacheError, match=r"not in the cache \(there is one\.pooled@[0-9a-f]{8}, of another identity\)"):
        open_column(dataset, "one.pooled", wanted)


def test_an_edited_manifest_is_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    manifest, folder = make_column(dataset)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"encoder": "one"', '"encoder": "two"'))
    with pytest.raises(CacheError, match=r"states identity .* its ingredients give"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_half_written_manifest_is_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    manifest, folder = make_column(dataset)
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CacheError, match="damaged"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_column_of_another_length_is_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    manifest, _ = make_column(dataset, shards=(4,))
    with pytest.raises(CacheError, match="4 rows, but the data set has 6"):
        open_column(dataset, "one.pooled", manifest.id)


def test_rows_out_of_place_are_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    manifest, folder = make_column(dataset, shards=(3, 3))
    shutil.copy(folder / "000000.tar", folder / "000001.tar")
    with pytest.raises(CacheError, match=r"row 0 belongs to 'id0', expected 'id3'"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_cut_shard_is_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    manifest, folder = make_column(dataset)
    os.truncate(folder / "000000.tar", 1500)
    with pytest.raises(CacheError, match="fewer than the 4 rows"):
        open_column(dataset, "one.pooled", manifest.id)


def test_a_record_that_is_half_written_does_not_count(tmp_path):
    path = tmp_path / "000000.json"
    assert read_record(path) is None
    path.write_text('{"rows": 3, "si')
    assert read_record(path) is None


def test_a_sound_cache_has_no_problems(tmp_path):
    dataset = make_dataset(tmp_path)
    values = np.arange(18, dtype=np.float16).reshape(6, 3)
    values[4] = np.nan
    make_column(dataset, quarantined=(4,), values=values)
    assert list(verify(dataset.folder)) == []


def test_verify_finds_what_changed(tmp_path):
    dataset = make_dataset(tmp_path)
    _, folder = make_column(dataset)
    with (folder / "000001.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"!")
    (problem,) = verify(dataset.folder)
    assert problem.startswith(f"{folder / '000001.tar'}: missing or changed since it was written")


def test_verify_finds_unfinished_columns_and_values_that_are_not_finite(tmp_path):
    dataset = make_dataset(tmp_path)
    values = np.zeros((6, 3), np.float16)
    values[1, 2] = np.inf
    _, folder = make_column(dataset, values=values)
    (dataset.folder / "two.pooled@00000000").mkdir()
    problems = list(verify(dataset.folder))
    assert problems == [
        f"{folder}: row 1 holds values that are not finite",
        f"{dataset.folder / 'two.pooled@00000000'}: unfinished (no manifest.json); run `featurize` again to finish it",
    ]
    (dataset.folder / "samples.parquet").write_bytes(b"gone")
    assert "not a readable index" in next(verify(dataset.folder))
