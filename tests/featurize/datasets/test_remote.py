"""The sources of files, read from a store: the same samples, read, hashed and remembered."""

import io
import json
import tarfile
from dataclasses import replace

import pytest

from featurize.config import DataConfig
from featurize.datasets.load import load
from featurize.datasets.sample import DataError, Sample
from featurize.index import index
from featurize.manifest import CacheError
from featurize.places import publish

FILES = {
    "train/a.jpg": b"picture a",
    "train/a.txt": b"\xef\xbb\xbfone\r\ntw\xffo\n",
    "train/deep/b.jpg": b"picture b",
    "val/c.jpg": b"picture c",
    "val/c.txt": b"three\n\n",
    "val/.hidden.jpg": b"not read",
    ".hidden/d.jpg": b"not read",
    "val/d.png": b"picture d",
    "val/d.txt": b"four\n",
}


def tar_bytes(*numbers):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for number in numbers:
            for suffix, data in (("jpg", b"picture %d" % number), ("txt", b"caption %d" % number)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


KARPATHY = {
    "images": [
        {"filename": f"{split}.jpg", "sentences": [{"raw": f"said of {split}"}], "split": split}
        for split in ("train", "val")
    ]
}
COCO = {
    "images": [{"id": 7, "file_name": "x.jpg"}],
    "annotations": [{"image_id": 7, "caption": "a cat"}],
}
IMAGES = {f"images/{split}.jpg": split.encode() for split in ("train", "val")}
SOURCES = {
    "folder": FILES,
    "tar": {"set-train-0.tar": tar_bytes(0, 1, 2), "set-val-0.tar": tar_bytes(3)},
    "karpathy": {"dataset_x.json": json.dumps(KARPATHY).encode(), **IMAGES},
    "flickr8k": {
        "Flickr8k.token.txt": b"train.jpg#0\tone\nval.jpg#0\ttwo\n",
        "Flickr_8k.trainImages.txt": b"train.jpg\n",
        "Flickr_8k.devImages.txt": b"val.jpg\n",
        **IMAGES,
    },
    "coco-captions": {
        "annotations/captions_train2014.json": json.dumps(COCO).encode(),
        "annotations/captions_val2014.json": json.dumps(COCO).replace("7", "8").encode(),
        "train2014/x.jpg": b"x",
        "val2014/x.jpg": b"y",
    },
    "table": {
        "t.csv": b"image,caption,split\nimages/train.jpg,one,train\nimages/val.jpg,two,val\n",
        **IMAGES,
    },
}


def put(root, files):
    for name, data in files.items():
        path = root / name
        if hasattr(path, "fs"):
            publish(path, data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def loaded(dataset, root, nowhere):
    return load(DataConfig(dataset, str(root)), nowhere)


@pytest.mark.parametrize("dataset", SOURCES)
def test_sources_say_the_same_in_a_store(dataset, bucket, tmp_path):
    """As from a folder here, whose samples each source's own tests check."""
    here, there = tmp_path / "data", bucket / "data"
    for root in (here, there):
        put(root, SOURCES[dataset])
    expected = loaded(dataset, here, tmp_path)
    found = loaded(dataset, there, tmp_path)
    assert len(expected) >= 2
    assert found == [replace(sample, image=sample.image.replace(str(here), str(there))) for sample in expected]
    assert [sample.read() for sample in found] == [sample.read() for sample in expected]


def test_a_bucket_itself_is_a_root(bucket, tmp_path):
    put(bucket, SOURCES["flickr8k"])
    assert [sample.read() for sample in loaded("flickr8k", bucket, tmp_path)] == [b"train", b"val"]
    put(bucket, {"images/train.txt": b"one", "images/val.txt": b"two"})
    samples = load(DataConfig("folder", str(bucket), train="", evaluate=""), tmp_path)
    assert [(sample.image_id, sample.captions) for sample in samples] == [
        ("images/train", ("one",)),
        ("images/val", ("two",)),
    ]
    assert [sample.read() for sample in samples] == [b"train", b"val"]


def test_a_table_of_uris(bucket, tmp_path):
    put(bucket, IMAGES)
    (tmp_path / "t.jsonl").write_text(
        "".join(
            json.dumps({"image": str(bucket / f"images/{split}.jpg"), "caption": split, "split": split}) + "\n"
            for split in ("train", "val")
        )
    )
    assert [sample.read() for sample in loaded("table", tmp_path, tmp_path)] == [b"train", b"val"]


def test_a_root_that_is_not_there(bucket, tmp_path):
    with pytest.raises(DataError, match=rf"--data.root {bucket}nothing does not exist; folder expects a folder of"):
        loaded("folder", bucket / "nothing", tmp_path)
    with pytest.raises(DataError, match="there is no bucket 'no-such-bucket'"):
        loaded("folder", "s3://no-such-bucket/data", tmp_path)
    with pytest.raises(DataError, match="scenes are drawn on a disk; give a folder of this machine"):
        loaded("scenes", bucket, tmp_path)
    with pytest.raises(DataError, match="no file system for s4://"):
        loaded("folder", "s4://x", tmp_path)


def test_an_image_whose_store_does_not_answer_is_no_os_error_of_its_own_kind(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    sample = Sample("id", "s3://bucket/a.jpg", ("a caption",), "train")
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match=r"s3://bucket/a\.jpg: the store does not answer"):
        sample.read()
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("count", [3, 12], ids=["each is asked for", "the folder is listed"])
def test_hashes_of_remote_images_are_remembered(bucket, tmp_path, monkeypatch, count):
    put(bucket, {f"{number}.jpg": b"picture %d" % number for number in range(count)})
    samples = [Sample(f"id{n}", str(bucket / f"{n}.jpg"), ("a caption",), "train") for n in range(count)]
    first = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    read, asked = Sample.read, []

    def counting(sample):
        asked.append(sample.image_id)
        return read(sample)

    monkeypatch.setattr(Sample, "read", counting)
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id == first.id
    assert asked == []
    publish(bucket / "1.jpg", b"picture X")  # as long as before
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id != first.id
    assert asked == ["id1"]


def test_remote_images_that_are_missing_are_quarantined(bucket, tmp_path):
    put(bucket, {"0.jpg": b"picture"})
    samples = [Sample(f"id{n}", str(bucket / f"{n}.jpg"), ("a caption",), "train") for n in range(2)]
    dataset = index(samples, "set", bucket / "cache", max_quarantined=0.5)
    assert [problem.image_id for problem in dataset.quarantine] == ["id1"]
    with pytest.raises(CacheError, match="1 of 2 images cannot be used"):
        index(samples, "set", bucket / "cache", max_quarantined=0.1)


def test_hashes_of_an_index_without_versions_are_made_again(tmp_path, make_samples, monkeypatch):
    import pyarrow.parquet as pq

    samples = make_samples(tmp_path / "in")
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    path = dataset.folder / "samples.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["version"]), path)
    assert index(samples, "set", tmp_path / "cache", max_quarantined=0).id == dataset.id
