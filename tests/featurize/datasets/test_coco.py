import json

import pytest

from featurize.datasets.coco import read_coco
from featurize.datasets.sample import DataError, Sample

IMAGES = [{"id": 9, "file_name": "9.jpg"}, {"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}]
ANNOTATIONS = [
    {"id": 1, "image_id": 7, "caption": " A man .\n"},
    {"id": 2, "image_id": 9, "caption": "First"},
    {"id": 3, "image_id": 7, "caption": ""},
]


def write(path, images=IMAGES, annotations=ANNOTATIONS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize("inside", ["", "annotations"])
def test_files_of_a_folder(tmp_path, inside):
    write(tmp_path / inside / "captions_train2014.json")
    write(tmp_path / inside / "captions_val2014.json", [{"id": 5, "file_name": "5.jpg"}], [])
    touch(tmp_path / "train2014" / "7.jpg")
    touch(tmp_path / "val2014" / "5.jpg")
    assert list(read_coco(tmp_path)) == [
        Sample("9", f"{tmp_path}/train2014/9.jpg", ("First",), "train"),
        Sample("7", f"{tmp_path}/train2014/7.jpg", ("A man .", ""), "train"),
        Sample("8", f"{tmp_path}/train2014/8.jpg", (), "train"),
        Sample("5", f"{tmp_path}/val2014/5.jpg", (), "val"),
    ]


@pytest.mark.parametrize("place", ["mine", "images/mine", "images", "."])
def test_one_file_without_a_split_and_customary_places(tmp_path, place):
    write(tmp_path / "captions_mine.json")
    touch(tmp_path / place / "9.jpg")
    samples = list(read_coco(tmp_path / "captions_mine.json"))
    assert [sample.split for sample in samples] == ["", "", ""]
    assert samples[0].read() == b""


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"expected captions_\*\.json here or in annotations/, found none"):
        list(read_coco(tmp_path))


def test_no_image_in_any_place(tmp_path):
    write(tmp_path / "captions_val2017.json")
    with pytest.raises(DataError, match=r"no image found; looked for 'val2017/9\.jpg', 'images/val2017/9\.jpg'"):
        list(read_coco(tmp_path))


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([{"id": 9}], [], r"images\[0\]: no 'file_name'; found 'id'"),
        ([{"id": None, "file_name": "9.jpg"}], [], r"images\[0\]: 'id' is None, expected int or str"),
        (IMAGES, [{"image_id": 9}], r"annotations\[0\]: no 'caption'; found 'image_id'"),
        (IMAGES, [*ANNOTATIONS, {"image_id": 1, "caption": "x"}], r"annotations\[3\]: image_id 1 is not among"),
    ],
)
def test_another_form_is_named(tmp_path, images, annotations, message):
    write(tmp_path / "captions_val2014.json", images, annotations)
    touch(tmp_path / "9.jpg")
    with pytest.raises(DataError, match=r"captions_val2014\.json, " + message):
        list(read_coco(tmp_path))
