import json

import pytest

from featurize.datasets.karpathy import read_karpathy
from featurize.datasets.sample import DataError, Sample


def image(filename, captions, split, **more):
    sentences = [{"raw": caption, "tokens": caption.split(), "sentid": 0} for caption in captions]
    return {"filename": filename, "sentences": sentences, "split": split, "imgid": 0, **more}


def write(folder, images, name="dataset_flickr8k.json"):
    (folder / name).write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return folder / name


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_samples_in_the_files_order(tmp_path):
    touch(tmp_path / "images" / "2_b.x.jpg")
    path = write(
        tmp_path,
        [
            image("2_b.x.jpg", [" A dog  runs . ", ""], "train"),
            image("1_a.jpg", ["One ."], "val"),
            image("3_c.jpg", [], "test"),
        ],
    )
    expected = [
        Sample("2_b.x", f"{tmp_path}/images/2_b.x.jpg", ("A dog  runs .", ""), "train"),
        Sample("1_a", f"{tmp_path}/images/1_a.jpg", ("One .",), "val"),
        Sample("3_c", f"{tmp_path}/images/3_c.jpg", (), "test"),
    ]
    assert list(read_karpathy(path)) == expected
    assert list(read_karpathy(tmp_path)) == expected


def test_coco_ids_folders_and_restval(tmp_path):
    touch(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")
    write(
        tmp_path,
        [
            image("COCO_train2014_000000000009.jpg", ["a"], "train", filepath="train2014", cocoid=9),
            image("COCO_val2014_000000000042.jpg", ["b"], "restval", filepath="val2014", cocoid=42),
        ],
        "dataset_coco.json",
    )
    assert list(read_karpathy(tmp_path)) == [
        Sample("9", f"{tmp_path}/train2014/COCO_train2014_000000000009.jpg", ("a",), "train"),
        Sample("42", f"{tmp_path}/val2014/COCO_val2014_000000000042.jpg", ("b",), "train"),
    ]


@pytest.mark.parametrize(
    "place",
    ["images", ".", "val2014", "images/val2014", "Flicker8k_Dataset", "flickr30k-images"],
)
def test_customary_places_of_images(tmp_path, place):
    touch(tmp_path / place / "a.jpg")
    write(tmp_path, [image("a.jpg", ["a"], "train", filepath="val2014")])
    (sample,) = read_karpathy(tmp_path)
    assert sample.read() == b""


def test_odd_names_and_foreign_text(tmp_path):
    name = "a {filepath} ü#1.jpg"
    touch(tmp_path / "images" / name)
    path = tmp_path / "dataset_x.json"
    path.write_bytes(
        b'\xef\xbb\xbf{"images": [{"filename": "'
        + name.encode()
        + b'", "split": "train",\r\n "sentences": [{"raw": "caf\xe9"}]}]}'
    )
    assert list(read_karpathy(path)) == [
        Sample("a {filepath} ü#1", f"{tmp_path}/images/{name}", ("caf\udce9",), "train")
    ]


def test_a_folder_needs_exactly_one_json(tmp_path):
    with pytest.raises(DataError, match=r"expected exactly one dataset_\*\.json, found none; give the file itself"):
        list(read_karpathy(tmp_path))
    write(tmp_path, [], "dataset_a.json")
    write(tmp_path, [], "dataset_b.json")
    with pytest.raises(DataError, match=r"found dataset_a\.json, dataset_b\.json"):
        list(read_karpathy(tmp_path))


def test_no_image_in_any_place(tmp_path):
    write(tmp_path, [image("a.jpg", ["a"], "train")])
    with pytest.raises(DataError, match=r"no image found; looked for 'images/a\.jpg', 'a\.jpg'"):
        list(read_karpathy(tmp_path))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, r"'images' is \{\}, expected list"),
        ([{"sentences": [], "split": "train"}], r"images\[0\]: no 'filename'; found 'sentences', 'split'"),
        ([image("a.jpg", [], "train"), 3], r"images\[1\]: expected an object with 'filename', found 3"),
        ([image("a.jpg", [], 7)], r"images\[0\]: 'split' is 7, expected str"),
        ([image("a.jpg", [], "train", filepath=3)], r"images\[0\]: 'filepath' is 3, expected str"),
        ([{"filename": "a.jpg", "split": "train"}], r"images\[0\]: no 'sentences'"),
        (
            [{"filename": "a.jpg", "split": "train", "sentences": [{"tokens": []}]}],
            r"images\[0\], a sentence: no 'raw'; found 'tokens'",
        ),
    ],
)
def test_another_form_is_named(tmp_path, images, message):
    touch(tmp_path / "images" / "a.jpg")
    write(tmp_path, images)
    with pytest.raises(DataError, match=r"dataset_flickr8k\.json.*" + message):
        list(read_karpathy(tmp_path))
