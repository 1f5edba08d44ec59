import hashlib
import json
import tarfile
from dataclasses import replace

import pytest

from featurize.config import DataConfig, ScenesConfig, TableConfig
from featurize.datasets.load import load, protocol_of
from featurize.datasets.sample import DataError

KARPATHY = {
    "images": [
        {"filename": f"{split}.jpg", "sentences": [{"raw": f"json {split}"}], "split": split}
        for split in ("train", "val")
    ]
}


def put(path, data=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data)
    return path


def write_official(root):
    put(root / "Flickr8k.token.txt", "train.jpg#0\tofficial train\nval.jpg#0\tofficial val\n")
    put(root / "Flickr_8k.trainImages.txt", "train.jpg\n")
    put(root / "Flickr_8k.devImages.txt", "val.jpg\n")
    put(root / "images" / "val.jpg")


def write_folder(root, count):
    for number in range(count):
        put(root / f"{number}.jpg")
        put(root / f"{number}.txt", "a caption")


def loaded(dataset, root, **config):
    return load(DataConfig(dataset, str(root), **config), root / "nowhere")


def captions(samples):
    return [sample.captions[0] for sample in samples]


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_presets_read_the_json_of_their_name(tmp_path, dataset):
    put(tmp_path / "images" / "train.jpg")
    put(tmp_path / "dataset_other.json", "not read")
    path = put(tmp_path / f"dataset_{dataset}.json", json.dumps(KARPATHY))
    write_official(tmp_path)
    assert captions(loaded(dataset, tmp_path)) == ["json train", "json val"]
    assert captions(load(DataConfig(dataset, str(path)), tmp_path)) == ["json train", "json val"]


def test_flickr8k_falls_back_to_the_official_files(tmp_path):
    write_official(tmp_path)
    assert captions(loaded("flickr8k", tmp_path)) == ["official train", "official val"]
    with pytest.raises(DataError, match=r"found no captions of coco; expected a folder with dataset_coco\.json"):
        loaded("coco", tmp_path)


def test_sources_by_name(tmp_path):
    put(tmp_path / "k" / "dataset_mine.json", json.dumps(KARPATHY))
    put(tmp_path / "k" / "train.jpg")
    assert captions(loaded("karpathy", tmp_path / "k")) == ["json train", "json val"]

    write_official(tmp_path / "t")
    put(tmp_path / "t" / "dataset_flickr8k.json", "not read")
    assert captions(loaded("flickr8k-tokens", tmp_path / "t")) == ["official train", "official val"]

    for number, split in enumerate(("train", "val")):
        content = {
            "images": [{"id": number, "file_name": "1.jpg"}],
            "annotations": [{"image_id": number, "caption": split}],
        }
        put(tmp_path / "c" / f"captions_{split}2014.json", json.dumps(content))
        put(tmp_path / "c" / f"{split}2014" / "1.jpg")
        put(tmp_path / "f" / split / "1.jpg")
        put(tmp_path / "f" / split / "1.txt", split)
    assert captions(loaded("coco-captions", tmp_path / "c")) == ["train", "val"]
    assert captions(loaded("folder", tmp_path / "f")) == ["train", "val"]

    put(tmp_path / "s" / "t.csv", "image,text,split\n1.jpg,one,train\n2.jpg,two,val\n")
    assert captions(loaded("table", tmp_path / "s", table=TableConfig(caption="text"))) == ["one", "two"]


def test_tar_source(tmp_path):
    with pytest.raises(DataError, match=r"expected webdataset tars"):
        loaded("tar", tmp_path)


def test_scenes_render_where_they_are_told(tmp_path):
    scenes = ScenesConfig(train=1, val=1, test=0)
    samples = load(DataConfig(scenes=scenes), tmp_path / "given")
    assert [sample.image_id for sample in samples] == ["train-000000", "val-000000"]
    assert all(sample.image.startswith(f"{tmp_path}/given/") for sample in samples)
    (sample, _) = load(DataConfig(root=str(tmp_path / "root"), scenes=scenes), tmp_path / "given")
    assert sample.image.startswith(f"{tmp_path}/root/")
    with pytest.raises(DataError, match=r"scenes: no images; expected --data\.scenes\.train, .* above 0"):
        load(DataConfig(scenes=ScenesConfig(0, 0, 0)), tmp_path)


def test_a_relative_root_becomes_absolute(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("data", "~/data"):
        samples = load(DataConfig("folder", root, holdout=0.5), tmp_path)
        assert samples[0].image == f"{tmp_path}/data/0.jpg"


def test_unknown_name(tmp_path):
    with pytest.raises(
        DataError,
        match=(
            r"unknown data set 'Flikr8k' \(did you mean 'flickr8k'\?\); --data\.dataset takes flickr8k, flickr30k, "
            r"coco, scenes, karpathy, flickr8k-tokens, coco-captions, table, folder, tar$"
        ),
    ):
        load(DataConfig("Flikr8k"), tmp_path)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("flickr8k", r"a folder with dataset_flickr8k\.json or Flickr8k\.token\.txt, and images/"),
        ("flickr30k", r"a folder with dataset_flickr30k\.json, and images/ or flickr30k-images/"),
        ("coco", r"a folder with dataset_coco\.json, train2014/ and val2014/"),
        ("karpathy", r"one of Karpathy's dataset_\*\.json files or its folder"),
        ("flickr8k-tokens", r"a folder with Flickr8k\.token\.txt"),
        ("coco-captions", r"a folder with captions_train2014\.json"),
        ("table", r"a \.csv, \.tsv, \.jsonl or \.parquet file with rows, or a folder with one"),
        ("folder", r"a folder of images, each beside a \.txt of the same name"),
        ("tar", r"a webdataset \.tar, or a folder of them"),
    ],
)
def test_no_root_and_a_root_that_is_not_there(tmp_path, dataset, expected):
    with pytest.raises(DataError, match=f"^{dataset} needs --data.root: {expected}"):
        load(DataConfig(dataset), tmp_path)
    with pytest.raises(DataError, match=f"gone does not exist; {dataset} expects {expected}"):
        load(DataConfig(dataset, str(tmp_path / "gone")), tmp_path)


def test_no_images(tmp_path):
    with pytest.raises(DataError, match=r"^folder at .*: no images; expected a folder of images"):
        loaded("folder", tmp_path)


def test_missing_splits(tmp_path):
    for name in ("train/1", "train/2", "test/1", "3"):
        put(tmp_path / f"{name}.jpg")
    with pytest.raises(
        DataError,
        match=(
            r"^folder at .*: no images in split 'val' \(--data\.evaluate\); found 1 without a split, 1 in 'test', "
            r"2 in 'train'\. Choose one of these with --data\.evaluate, or divide the images without a split with "
            r"--data\.holdout 0\.1$"
        ),
    ):
        loaded("folder", tmp_path)
    assert len(loaded("folder", tmp_path, evaluate="test")) == 4
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"no images in split 'fit' \(--data\.train\); .* with --data\.train$"):
        loaded("folder", tmp_path, train="fit", evaluate="test")


def test_holdout_divides_by_the_hash_of_the_id(tmp_path):
    write_folder(tmp_path, 400)
    put(tmp_path / "test" / "x.jpg")
    samples = loaded("folder", tmp_path, holdout=0.25, train="fit", evaluate="check")
    splits = {sample.image_id: sample.split for sample in samples}
    assert splits.pop("test/x") == "test"
    for image_id, split in splits.items():
        held_out = int(hashlib.sha256(image_id.encode()).hexdigest()[:16], 16) < 0.25 * 2**64
        assert split == ("check" if held_out else "fit")
    assert 70 < list(splits.values()).count("check") < 130

    for number in range(0, 400, 2):
        (tmp_path / f"{number}.jpg").unlink()
    fewer = loaded("folder", tmp_path, holdout=0.25, train="fit", evaluate="check")
    assert {sample.image_id: sample.split for sample in fewer}.items() <= {**splits, "test/x": "test"}.items()


def test_holdout_takes_ids_that_are_not_utf8(tmp_path):
    rows = [json.dumps({"image": f"{number} \ud800.jpg", "caption": "x"}) for number in range(40)]
    put(tmp_path / "t.jsonl", "\n".join(rows))
    assert {sample.split for sample in loaded("table", tmp_path, holdout=0.5)} == {"train", "val"}


@pytest.mark.parametrize("holdout", [-0.1, 1.0, 20.0])
def test_holdout_is_a_share(tmp_path, holdout):
    write_folder(tmp_path, 3)
    with pytest.raises(DataError, match=r"--data\.holdout -?[\d.]+: expected a share between 0 and 1"):
        loaded("folder", tmp_path, holdout=holdout)


def test_holdout_of_a_source_with_splits(tmp_path):
    put(tmp_path / "train" / "1.jpg")
    put(tmp_path / "val" / "1.jpg")
    with pytest.raises(
        DataError,
        match=(
            r"--data\.holdout divides images without a split, but folder at .* has 1 in 'train', 1 in 'val'; omit it"
        ),
    ):
        loaded("folder", tmp_path, holdout=0.1)


def test_duplicate_ids(tmp_path):
    images = [{**KARPATHY["images"][0], "filename": name} for name in ("a.jpg", "a.png")]
    put(tmp_path / "dataset_x.json", json.dumps({"images": images}))
    put(tmp_path / "a.jpg")
    first, second = loaded("karpathy", tmp_path, train="train", evaluate="train")
    assert (first.image_id, first.problem, second.image_id) == ("a", "", "a")
    assert second.problem == (f"duplicate image id: '{tmp_path}/a.jpg' has it, '{tmp_path}/a.png' has it too")


def test_duplicate_ids_in_tars(tmp_path):
    put(tmp_path / "0.jpg")
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            tar.add(tmp_path / "0.jpg", "0.jpg")
    assert [sample.problem for sample in loaded("tar", tmp_path, train="", evaluate="")] == [
        "",
        f"duplicate image id: '{tmp_path}/a.tar' at byte 512 has it, '{tmp_path}/b.tar' at byte 512 has it too",
    ]


def test_protocol():
    assert protocol_of(DataConfig("coco")) == "coco"
    assert protocol_of(replace(DataConfig(), dataset="karpathy")) == "full"
    assert protocol_of(DataConfig("flickr8k")) == "full"
