import io
import os

import pytest
from PIL import Image, features

from featurize.datasets.sample import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    DataError,
    Sample,
    caption_lines,
    image_pattern,
    nearest,
    open_text,
    read_json,
    required,
    split_in,
)
from featurize.images.decode import decode


def sample(image, span=None):
    return Sample("id", str(image), ("a caption",), "train", span)


@pytest.mark.parametrize("name", ["plain.jpg", "a::b.jpg", "sta*r [1]?.jpg", "räum e#1.jpg"])
def test_reads_a_whole_local_file_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"pixels")
    assert sample(tmp_path / name).read() == b"pixels"


def test_reads_a_uri(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    assert sample(f"file://{tmp_path}/a.jpg").read() == b"pixels"


def test_reads_a_span(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    assert sample(tmp_path / "a.tar", (3, 4)).read() == b"3456"
    assert sample(f"file://{tmp_path}/a.tar", (3, 4)).read() == b"3456"


def test_span_beyond_the_end_is_an_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    with pytest.raises(OSError, match=r"a\.tar: expected 4 bytes at offset 8, found 2; the file changed"):
        sample(tmp_path / "a.tar", (8, 4)).read()


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"gone\.jpg"):
        sample(tmp_path / "gone.jpg").read()


@pytest.mark.parametrize(("name", "found"), [("", "folder"), ("pipe", "pipe, socket or device")])
def test_what_is_no_file_is_an_os_error(tmp_path, name, found):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer for ever
    with pytest.raises(OSError, match=f"not a file but a {found}$"):
        sample(tmp_path / name).read()


@pytest.mark.parametrize(
    "error", [ImportError("Install s3fs to access S3"), ValueError("Protocol not known: z"), RuntimeError("403")]
)
def test_whatever_a_file_system_raises_is_an_os_error(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("featurize.datasets.sample.file_at", fail)
    with pytest.raises(
        OSError, match=rf"^s3://a/b\.jpg: the store does not .* \({type(error).__name__}: {error}\); check"
    ):
        sample("s3://a/b.jpg").read()


def test_open_text_drops_the_byte_order_mark_and_keeps_foreign_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntw\xff\n")
    with open_text(path) as file:
        assert file.read() == "one\r\ntw\udcff\n"


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": 1,\n "b"')
    with pytest.raises(DataError, match=r"a\.json: not valid JSON at line 2, column 5"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"a\.json: expected a JSON object at the top level, found list"):
        read_json(path)


def test_required():
    assert required({"a": 1}, "a", int, "here") == 1
    with pytest.raises(DataError, match=r"here: expected an object with 'a', found \[1, 2\]"):
        required([1, 2], "a", int, "here")
    with pytest.raises(DataError, match=r"here: no 'a'; found 'b', 'c'$"):
        required({"b": 1, "c": 2}, "a", int, "here")
    with pytest.raises(DataError, match=r"here: no 'a'; found nothing$"):
        required({}, "a", int, "here")
    with pytest.raises(DataError, match=r"here: 'a' is None, expected int or str$"):
        required({"a": None}, "a", (int, str), "here")
    with pytest.raises(DataError, match=r"here: 'a' is 'x{56}\.\.\., expected int$"):
        required({"a": "x" * 500}, "a", int, "here")


@pytest.mark.parametrize(
    ("lines", "captions"),
    [
        (["one\n", " two \r\n"], ("one", "two")),
        (["one\n", "\n", "three"], ("one", "", "three")),
        (["one\n", "\n", " \n"], ("one",)),
        ([], ()),
        (["\n"], ()),
    ],
)
def test_caption_lines(lines, captions):
    assert caption_lines(lines) == captions


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("captions_train2014", "train"),
        ("flickr-VAL-0001", "val"),
        ("validation", "val"),
        ("my_dev_set", "val"),
        ("test", "test"),
        ("latest-0001", ""),
        ("trainval", ""),
        ("train_and_test", ""),
        ("train-training", "train"),
        ("000123", ""),
    ],
)
def test_split_in(name, split):
    assert split_in(name) == split


def test_image_pattern_takes_the_first_place_that_holds_one_of_the_images(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jpg").touch()
    images = [{"name": f"{number}.jpg"} for number in range(3)]
    assert image_pattern(tmp_path, ("a/{name}", "b/{name}", "{name}"), images) == "b/{name}"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    assert image_pattern(tmp_path, ("a/{name}", "b/{name}", "{name}"), images) == "a/{name}"


def test_image_pattern_looks_for_twenty_images_only(tmp_path):
    (tmp_path / "20.jpg").touch()
    images = [{"name": f"{number}.jpg"} for number in range(30)]
    with pytest.raises(DataError, match=r"no image found; looked for 'a/0\.jpg', '0\.jpg'\. Put the images in"):
        image_pattern(tmp_path, ("a/{name}", "{name}"), images)
    (tmp_path / "19.jpg").touch()
    assert image_pattern(tmp_path, ("a/{name}", "{name}"), images) == "{name}"


def test_image_pattern_without_images(tmp_path):
    assert image_pattern(tmp_path, ("a/{name}", "{name}"), []) == "a/{name}"


def test_nearest():
    assert nearest("flikr8k", ["flickr8k", "coco"]) == " (did you mean 'flickr8k'?)"
    assert nearest("zzz", ["flickr8k", "coco"]) == ""


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_images_of_every_suffix_are_decoded(suffix):
    kind = Image.registered_extensions()[suffix]
    feature = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(kind)
    if feature and not features.check(feature):
        pytest.skip(f"this PIL has no {feature}")
    file = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 100, 50)).save(file, kind)
    image = decode(file.getvalue())
    assert image.size == (48, 32)
    assert image.getpixel((20, 20)) == pytest.approx((200, 100, 50), abs=4)


def test_suffixes_are_small_and_read_or_not():
    assert not IMAGE_SUFFIXES & UNREAD_SUFFIXES
    assert all(suffix == f".{suffix[1:].lower()}" for suffix in IMAGE_SUFFIXES | UNREAD_SUFFIXES)
