import os

import pytest

from featurize.config import DataConfig
from featurize.datasets.folder import read_folder
from featurize.datasets.load import load
from featurize.datasets.sample import Sample
from featurize.index import index
from featurize.manifest import CacheError


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


def test_images_of_rarer_suffixes(tmp_path):
    names = ("a.jfif", "b.JPE", "c.jp2", "d.avif", "e.apng", "f.ppm", "g.pgm", "h.tga")
    for name in names:
        put(tmp_path / name, b"one")
    assert list(read_folder(tmp_path)) == [Sample(name[0], f"{tmp_path}/{name}", ("one",), "") for name in names]


def test_an_image_of_a_kind_that_is_not_read(tmp_path):
    put(tmp_path / "val" / "a.HEIC", b"one")
    put(tmp_path / "val" / "b.jpg", b"two")
    first, second = read_folder(tmp_path)
    assert first == Sample("val/b", f"{tmp_path}/val/b.jpg", ("two",), "val")
    assert (second.image_id, second.image, second.split) == ("val/a", f"{tmp_path}/val/a.HEIC", "val")
    assert second.problem == (
        "'a.HEIC' is an image of a kind that is not read; expected one of .apng, .avif, .bmp, .gif, .jfif, .jp2, .jpe, "
        ".jpeg, .jpg, .pgm, .png, .ppm, .tga, .tif, .tiff, .webp. Convert it to one of them"
    )


def test_what_stands_beside_an_image_or_without_captions_is_passed_over(tmp_path):
    for name in ("a.jpg", "a.nef", "a.json", "a.npy", "b.json", "b.txt", "c.heic", ".d.heic", ".d.txt", "e"):
        put(tmp_path / name)
    (tmp_path / "a.txt").write_text("one")
    assert list(read_folder(tmp_path)) == [Sample("a", f"{tmp_path}/a.jpg", ("one",), "")]


def test_a_folder_of_images_of_which_none_is_read(tmp_path):
    put(tmp_path / "in" / "a.heic", b"one")
    samples = load(DataConfig("folder", str(tmp_path / "in"), holdout=0.0, train="", evaluate=""), tmp_path)
    with pytest.raises(
        CacheError, match=r"1 of 1 images cannot be used.*\n  a: source: 'a\.heic' is an image of a kind"
    ):
        index(samples, "folder", tmp_path / "cache", max_quarantined=0.5)
