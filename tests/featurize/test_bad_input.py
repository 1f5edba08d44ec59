"""Every kind of bad input in one data set, from the source to the quarantine: what each costs, and what is said."""

import contextlib
import hashlib
import io
import json
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from featurize.columns import open_column
from featurize.config import DataConfig, FeaturizeConfig, TableConfig
from featurize.datasets.load import load
from featurize.fill import fill
from featurize.index import index
from featurize.manifest import CacheError
from featurize.plan import plan
from featurize.verify import verify

CONFIG = FeaturizeConfig(rows_per_shard=8, precision="float32", max_quarantined=0.8)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(side):
    """A whole PNG of side x side black or white pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


JPEG = encoded(PICTURE, "JPEG")
SIXTEEN = Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
PALETTE = PICTURE.quantize(16)

USABLE = {
    "plain": encoded(PICTURE, "PNG"),
    "wrong extension": encoded(PICTURE, "PNG"),
    "cmyk": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "16 bits": encoded(SIXTEEN, "PNG"),
    "palette and alpha": encoded(PALETTE, "PNG", transparency=3),
    "animated": encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.transpose(Image.Transpose.ROTATE_180)]),
    "turned": encoded(PICTURE.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned(6)),
    "one pixel": encoded(PICTURE.resize((1, 1)), "PNG"),
    "..": JPEG,
    "../../up": JPEG,
    "/etc/passwd": JPEG,
    "a.b/c.d": JPEG,
    "ten thousand words": JPEG,
    "some bad captions": JPEG,
}

DAMAGED = {
    "truncated": (JPEG[:-300], "decode", r"DecodeError: truncated or corrupt image: .*image file is truncated"),
    "corrupt": (JPEG[:2] + b"\xff\xe0" + bytes(range(256)) * 8, "decode", "DecodeError: "),
    "a page": (b"<!doctype html>", "decode", r"DecodeError: no image format that PIL knows: 15 bytes that start"),
    "bomb": (bomb(30_000), "decode", r"DecodeError: more than 89,478,485 pixels; shrink the image first"),
    "no bytes": (b"", "read", "the file is empty: "),
    "only bad captions": (JPEG, "caption", "no usable caption; the image is left out"),
}

CAPTIONS = {
    "ten thousand words": [" ".join(f"word{number % 300}" for number in range(10_000)).encode()],
    "some bad captions": [b" ", b"caf\xe9", b"kept"],
    "only bad captions": [b"", b"\xff\xfe"],
}


def row(image_id, image, captions):
    """A line of JSON, of which captions are bytes of any kind."""
    listed = b", ".join(b'"' + caption + b'"' for caption in captions)
    plain = json.dumps({"id": image_id, "image": image, "split": "train"}).encode()
    return plain[:-1] + b', "caption": [' + listed + b"]}\n"


@pytest.fixture(scope="module")
def described(tmp_path_factory, ray_local):
    """The cache of a table of all this, its columns, what was printed, and the files by id."""
    folder = tmp_path_factory.mktemp("bad")
    files, lines = {}, []
    for number, (name, data) in enumerate([*USABLE.items(), *((name, bad[0]) for name, bad in DAMAGED.items())]):
        files[name] = folder / f"{number}.jpg"
        files[name].write_bytes(data)
        lines.append(row(name, f"{number}.jpg", CAPTIONS.get(name, [b"a caption"])))
    (folder / "unreadable.jpg").symlink_to("/proc/self/mem")  # a file that opens, and fails when it is read
    (folder / "folder.jpg").mkdir()
    lines += [row(name, f"{name}.jpg", [b"a caption"]) for name in ("unreadable", "folder", "gone")]
    lines.append(row("plain", files["cmyk"].name, [b"another picture of the same name"]))
    lines.append(b'{"id": "v", "image": "0.jpg", "split": "val", "caption": ["a caption"]}\n')
    (folder / "table.jsonl").write_bytes(b"".join(lines))
    samples = load(DataConfig("table", str(folder / "table.jsonl"), table=TableConfig(id="id")), folder)
    dataset = index(samples, "bad", folder / "cache", max_quarantined=CONFIG.max_quarantined)
    columns = plan(dataset, CONFIG, ("pooled",), ("sentence",))
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        fill(dataset, CONFIG, columns)
    return dataset, columns, told.getvalue(), files


def quarantine(dataset):
    return [json.loads(line) for line in (dataset.folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", USABLE)
def test_odd_pictures_and_names_are_described(described, name):
    dataset, (pooled, _), _, _ = described
    number = [sample.image_id for sample in dataset.samples].index(name)
    column = open_column(dataset, pooled.name, pooled.id)
    assert np.isfinite(column.row(number)).all()
    assert not [one for one in quarantine(dataset) if one["image_id"] == name and one["stage"] in ("read", "decode")]
    if name in ("turned", "wrong extension"):
        np.testing.assert_array_equal(column.row(number), column.row(0))


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_quarantined_with_stage_reason_and_hash(described, name):
    dataset, columns, _, _ = described
    data, stage, reason = DAMAGED[name]
    found = [one for one in quarantine(dataset) if one["image_id"] == name][-1]
    assert (found["stage"], found["sha256"]) == (stage, hashlib.sha256(data).hexdigest() if data else "")
    assert re.match(reason, found["reason"])
    assert found["columns"] == ([columns[0].name] if stage == "decode" else [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unreadable", "OSError: [Errno 5] Input/output error"),
        ("folder", "OSError: {}/folder.jpg: not a file but a folder"),
        ("gone", "FileNotFoundError: [Errno 2] No such file or directory: '{}/gone.jpg'"),
    ],
)
def test_what_cannot_be_read_has_no_hash(described, name, reason):
    dataset, _, _, files = described
    (found,) = [one for one in quarantine(dataset) if one["image_id"] == name]
    expected = reason.format(files["plain"].parent)
    assert (found["stage"], found["reason"], found["sha256"]) == ("read", expected, "")


def test_captions_are_quarantined_one_by_one(described):
    dataset, _, _, _ = described
    found = [
        (one["image_id"], one["reason"], one["sha256"]) for one in quarantine(dataset) if one["stage"] == "caption"
    ]
    digest = hashlib.sha256(JPEG).hexdigest()
    assert found == [
        ("some bad captions", "caption 0 is empty", digest),
        ("some bad captions", "caption 1 is not UTF-8", digest),
        ("only bad captions", "caption 0 is empty", digest),
        ("only bad captions", "caption 1 is not UTF-8", digest),
        ("only bad captions", "no usable caption; the image is left out", digest),
    ]
    assert "kept" in dataset.captions
    assert max(map(len, dataset.captions)) > 60_000


def test_a_second_picture_of_an_id_is_quarantined_and_the_first_kept(described):
    dataset, _, _, _ = described
    (found,) = [one for one in quarantine(dataset) if one["image_id"] == "plain"]
    assert (found["stage"], found["sha256"]) == ("source", hashlib.sha256(USABLE["cmyk"]).hexdigest())
    assert re.match(
        r"duplicate image id: line \d+ of table\.jsonl has image '2\.jpg', split 'train'; line 1 has image '0\.jpg'",
        found["reason"],
    )
    assert dataset.digests[0] == hashlib.sha256(USABLE["plain"]).hexdigest()


def test_the_end_sums_up(described):
    _, _, told, _ = described
    images = len(USABLE) + len(DAMAGED) + 5
    lost = len(DAMAGED) + 4
    assert f"quarantined: {lost} of {images} images (--featurize.max_quarantined allows 80%), 4 captions\n" in told
    for line in ("2  caption: a caption is not UTF-8", "1  decode: more than 89,478,485 pixels"):
        assert f"     {line}\n" in told or "more kinds" in told
    assert "each is listed with its reason in " in told


def test_the_cache_is_sound_and_nothing_left_it(described):
    dataset, columns, _, files = described
    assert list(verify(dataset.folder)) == []
    for column in columns:
        for path in column.folder.glob("*.tar"):
            with tarfile.open(path) as tar:
                assert all(re.fullmatch(r"[\w%~-]+\.npy", name, re.ASCII) for name in tar.getnames())
    assert not (files["plain"].parents[2] / "up").exists()


def member(name, data=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, target
    return info, io.BytesIO(data)


def test_odd_tars_are_quarantined_sample_by_sample(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    members = [
        member("good.jpg", JPEG),
        member("good.txt", b"good"),
        member("/absolute/../x.jpg", JPEG),
        member("/absolute/../x.txt", b"a path"),
        member("link.jpg", kind=tarfile.SYMTYPE, target=str(tmp_path / "secret.jpg")),
        member("link.txt", b"a link"),
        member("hard.jpg", kind=tarfile.LNKTYPE, target="good.jpg"),
        member("hard.txt", b"a hard link"),
        member("bare.txt", b"no picture"),
        member("apart.jpg", JPEG),
        member("good.txt", b"again"),
        member("apart.txt", b"too late"),
        member("odd.jpg", JPEG),
        member("odd.json", b"[1]"),
    ]
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for info, data in members:
            tar.addfile(info, data)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for info, data in (member("good.jpg", b"other"), member("v.jpg", JPEG), member("v.txt", b"v")):
            tar.addfile(info, data)
    samples = load(DataConfig("tar", str(tmp_path)), tmp_path)
    dataset = index(samples, "tars", tmp_path / "cache", max_quarantined=0.8)
    assert [(sample.image_id, sample.split) for sample in dataset.samples] == [
        ("good", "train"),
        ("/absolute/../x", "train"),
        ("v", "val"),
    ]
    digest = hashlib.sha256(JPEG).hexdigest()
    places = [f"'{tmp_path}/{name}.tar' at byte 512" for name in ("train", "val")]
    found = quarantine(dataset)
    assert [(one["image_id"], one["stage"], one["reason"].split(";")[0].split(" (")[0]) for one in found] == [
        ("link", "source", "a link is not followed"),
        ("hard", "source", "a link is not followed"),
        ("bare", "source", "no image among its members"),
        ("apart", "caption", "no usable caption"),
        ("good", "source", "members of one key do not stand side by side, as webdataset demands"),
        ("apart", "source", "members of one key do not stand side by side, as webdataset demands"),
        ("odd", "source", "json: expected a JSON object, found list"),
        ("good", "source", f"duplicate image id: {places[0]} has it, {places[1]} has it too"),
    ]
    assert [one["sha256"] for one in found] == [
        "",
        "",
        "",
        digest,
        "",
        "",
        digest,
        hashlib.sha256(b"other").hexdigest(),
    ]
    with pytest.raises(CacheError, match=r"8 of 11 images cannot be used, more than the 50% .*max_quarantined allows"):
        index(samples, "tars", tmp_path / "cache", max_quarantined=0.5)
