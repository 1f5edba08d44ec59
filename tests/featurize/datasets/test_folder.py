import os

import pytest

from featurize.datasets.folder import read_folder
from featurize.datasets.sample import Sample


def put(path, captions=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if captions is not None:
        path.with_suffix(".txt").write_bytes(captions)


def test_images_with_captions_of_the_same_name(tmp_path):
    put(tmp_path / "b.v2.JPG", b"\xef\xbb\xbfone\r\n two \r\n\r\nfour\r\n\r\n")
    put(tmp_path / "a 1 \u00fc.png", b"caf\xe9")
    put(tmp_path / "deep" / "er" / "c.webp")
    put(tmp_path / "deep" / "e.jpeg", b"")
    (tmp_path / "README.txt").write_text("no image has this name")
    assert list(read_folder(tmp_path)) == [
        Sample("a 1 \u00fc", f"{tmp_path}/a 1 \u00fc.png", ("caf\udce9",), ""),
        Sample("b.v2", f"{tmp_path}/b.v2.JPG", ("one", "two", "", "four"), ""),
        Sample("deep/e", f"{tmp_path}/deep/e.jpeg", (), ""),
        Sample("deep/er/c", f"{tmp_path}/deep/er/c.webp", (), ""),
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("val", "val"),
        ("valid", "val"),
        ("Validation", "val"),
        ("dev", "val"),
        ("test", "test"),
        ("other", ""),
    ],
)
def test_sub_folders_of_the_root_are_splits(tmp_path, name, split):
    put(tmp_path / name / "train" / "a.jpg", b"one")
    assert list(read_folder(tmp_path)) == [Sample(f"{name}/train/a", f"{tmp_path}/{name}/train/a.jpg", ("one",), split)]


def test_hidden_files_and_linked_folders_are_passed_over(tmp_path):
    put(tmp_path / "root" / "a.jpg", b"one")
    put(tmp_path / "root" / "._a.jpg", b"one")
    put(tmp_path / "root" / ".trash" / "b.jpg", b"two")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    assert [sample.image_id for sample in read_folder(tmp_path / "root")] == ["a"]


def test_a_name_that_is_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"pixels")
    (sample,) = read_folder(tmp_path)
    assert (sample.image_id, sample.read()) == ("\udcff", b"pixels")


def test_two_images_of_one_name(tmp_path):
    put(tmp_path / "train" / "a.png", b"one")
    put(tmp_path / "train" / "a.jpg")
    (tmp_path / "train" / "a.txt").write_text("one")
    put(tmp_path / "train" / "b.jpg")
    (tmp_path / "train" / "b.txt").write_text("two")
    first, second, other = read_folder(tmp_path)
    assert [(s.image_id, s.captions, s.problem) for s in (first, other)] == [
        ("train/a", ("one",), ""),
        ("train/b", ("two",), ""),
    ]
    assert (second.image_id, second.image) == ("train/a", str(tmp_path / "train" / "a.png"))
    assert second.problem == "duplicate image id: 'a.jpg' has it, 'a.png' has it too; rename one"
