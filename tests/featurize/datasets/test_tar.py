import io
import json
import subprocess
import tarfile

import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from featurize.datasets.sample import DataError, Sample
from featurize.datasets.tar import read_tar

TEXT = b"\xef\xbb\xbfone\r\n two \r\ncaf\xe9\r\n"


def write(path, members):
    """A tar of (name, bytes) or of ready `TarInfo`s."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_of_one_key_are_one_sample(tmp_path):
    path = write(
        tmp_path / "some.tar",
        [
            ("a.jpg", b"pixels of a"),
            ("a.txt", TEXT),
            ("a.cls", b"7"),
            ("../deep/b \u00fc.PNG", b"pixels of b"),
            ("../deep/b \u00fc.json", json.dumps({"caption": " three ", "split": "val", "id": 12}).encode()),
            ("c.json", json.dumps({"captions": ["four", ""], "url": "u", "caption": "not this"}).encode()),
            ("c.webp", b"pixels of c"),
            ("d.jpeg", b"pixels of d"),
            ("e.json", b'\xef\xbb\xbf{"caption": null, "id": "E/e"}'),
            ("e.jpg", b"pixels of e"),
            ("e.txt", b"five"),
        ],
    )
    samples = list(read_tar(path))
    assert [(s.image_id, s.captions, s.split) for s in samples] == [
        ("a", ("one", "two", "caf\udce9"), ""),
        ("12", ("three",), "val"),
        ("c", ("four", ""), ""),
        ("d", (), ""),
        ("E/e", ("five",), ""),
    ]
    assert {s.image for s in samples} == {str(path)}
    assert [s.read() for s in samples] == [f"pixels of {letter}".encode() for letter in "abcde"]


def test_keys_are_webdatasets(tmp_path):
    members = [("x/a.b/c.jpg", b"1"), ("x/a.b/c.txt", b"one"), ("x/d.seg.txt", b"-"), ("x/d.jpg", b"2")]
    path = write(tmp_path / "a.tar", [*members, ("x/d.txt", b"two")])
    with path.open("rb") as stream:
        rows = list(group_by_keys({**member, "__url__": "a.tar"} for member in tar_file_iterator(stream)))
    theirs = [(row["__key__"], row["jpg"], row["txt"]) for row in rows]
    ours = [(s.image_id, s.read(), s.captions[0].encode()) for s in read_tar(path)]
    assert ours == theirs == [("x/a.b/c", b"1", b"one"), ("x/d", b"2", b"two")]


def test_tars_of_a_folder_and_splits_by_name(tmp_path):
    for name in ("flickr-val-0001", "flickr-train-0001", "rest"):
        write(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"x"), (f"{name}.txt", b"one")])
    (tmp_path / "notes.txt").touch()
    assert [(s.image_id, s.split) for s in read_tar(tmp_path)] == [
        ("flickr-train-0001", "train"),
        ("flickr-val-0001", "val"),
        ("rest", ""),
    ]


def problems(path):
    """(id, the problem without its place) of every sample that has one; the place names the sample."""
    found = []
    for sample in read_tar(path):
        if sample.problem:
            text, _, place = sample.problem.rpartition(" (")
            assert place == f"{path}, sample {sample.image_id!r})"
            found.append((sample.image_id, text))
    return found


def test_folders_and_hidden_members_are_passed_over_and_no_link_is_followed(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    folder = tarfile.TarInfo("x.jpg")
    folder.type = tarfile.DIRTYPE
    path = write(
        tmp_path / "a.tar",
        [
            link("l.jpg", str(tmp_path / "secret.jpg"), tarfile.SYMTYPE),
            folder,
            (".DS_Store", b"x"),
            ("noextension", b"x"),
            ("._a.jpg", b"x"),
            ("a.jpg", b"pixels"),
            ("a.txt", b"one"),
            link("h.jpg", "a.jpg", tarfile.LNKTYPE),
        ],
    )
    first, usable, last = read_tar(path)
    assert usable == Sample("a", str(path), ("one",), "", (4608, 6))
    assert (first.read(), last.read()) == (b"", b"")
    advice = "a link is not followed; pack the file itself (tar --dereference --hard-dereference)"
    assert problems(path) == [("l", advice), ("h", advice)]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_no_byte_ranges(tmp_path, form):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"end")
    (tmp_path / "a.txt").write_text("one")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", path, "-C", tmp_path, "a.jpg", "a.txt"], check=True)
    advice = "a device or sparse file is not read; pack the file itself (tar --dereference --hard-dereference)"
    assert problems(path) == [("a", advice)]


def test_names_that_are_paths_stay_names(tmp_path):
    path = write(tmp_path / "a.tar", [("/etc/../x.jpg", b"pixels"), ("/etc/../x.txt", b"one")])
    (sample,) = read_tar(path)
    assert (sample.image_id, sample.image, sample.read()) == ("/etc/../x", str(path), b"pixels")


def test_no_tar(tmp_path):
    with pytest.raises(DataError, match=r"expected webdataset tars \(\*\.tar\), found none"):
        list(read_tar(tmp_path))


def test_members_apart(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"one"), ("b.txt", b"two")])
    advice = "members of one key do not stand side by side, as webdataset demands; sort them (tar --sort=name)"
    assert problems(path) == [("a", advice), ("b", advice)]
    assert [(s.image_id, s.captions, s.read()) for s in read_tar(path) if not s.problem] == [
        ("a", (), b"1"),
        ("b", (), b"2"),
    ]


def test_a_key_that_comes_again_is_not_mixed_with_the_first(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"one"), ("b.jpg", b"2"), ("a.jpg", b"3")])
    assert [(s.image_id, s.read(), bool(s.problem)) for s in read_tar(path)] == [
        ("a", b"1", False),
        ("b", b"2", False),
        ("a", b"3", True),
    ]


def test_text_without_an_image(tmp_path):
    path = write(tmp_path / "a.tar", [("a.cls", b"1"), ("a.txt", b"one"), ("a.json", b"{}")])
    ((image_id, text),) = problems(path)
    assert image_id == "a"
    assert text.startswith("no image among its members (.txt, .json); expected one of .apng, .avif, .bmp, .gif, ")


def test_an_image_of_a_kind_that_is_not_read(tmp_path):
    members = [("x/a.HEIC", b"1"), ("x/a.txt", b"one"), ("b.json", b"{}"), ("b.cr2", b"2"), ("c.jp2", b"3")]
    members += [("d.jpg", b"4"), ("d.nef", b"5"), ("d.txt", b"four"), ("alone.svg", b"6")]
    path = write(tmp_path / "a.tar", members)
    (first, of_a), (second, of_b) = problems(path)
    assert (first, second) == ("x/a", "b")
    assert of_a.startswith("'a.HEIC' is an image of a kind that is not read; expected one of .apng, .avif, ")
    assert of_b.startswith("'b.cr2' is an image of a kind")
    assert [(s.image_id, s.captions, s.read()) for s in read_tar(path) if not s.problem] == [
        ("c", (), b"3"),
        ("d", ("four",), b"4"),
    ]


def test_two_images_in_a_sample(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.png", b"2")])
    assert problems(path) == [("a", "several images (.jpg, .png); expected one")]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (b"{", "json: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        (b"[" * 100_000, "json: not valid JSON (maximum recursion depth exceeded"),
        (b"9" * 5000, "json: not valid JSON (Exceeds the limit"),
        (b"[1]", "json: expected a JSON object, found list"),
        (b'{"captions": "one"}', "json: 'captions' is 'one', expected list"),
        (b'{"captions": ["one", null]}', "json: a caption is None, expected text"),
        (b'{"caption": 3}', "json: a caption is 3, expected text"),
        (b'{"id": [1]}', "json: 'id' is [1], expected str or int"),
        (b'{"split": 1}', "json: 'split' is 1, expected str"),
    ],
)
def test_json_of_another_form_costs_its_sample(tmp_path, meta, message):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", meta), ("b.jpg", b"2"), ("b.txt", b"two")])
    ((image_id, text),) = problems(path)
    assert image_id == "a"
    assert text.startswith(message)
    assert [(s.image_id, s.captions, s.read()) for s in read_tar(path)][1] == ("b", ("two",), b"2")


def whole_tar(tmp_path):
    return write(tmp_path / "a.tar", [(f"{k}.{end}", b"x" * 700) for k in range(3) for end in ("jpg", "txt")])


@pytest.mark.parametrize("size", [700, 1024 + 100, 1536, 2000, 1536 * 6])
def test_a_tar_that_was_cut_short(tmp_path, size):
    path = whole_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"a\.tar: not a whole, uncompressed tar .*; unpack \.gz, or fetch it again"):
        list(read_tar(path))


def test_a_broken_header_is_not_the_end(tmp_path):
    path = whole_tar(tmp_path)
    data = bytearray(path.read_bytes())
    data[1536 * 2 : 1536 * 2 + 100] = b"?" * 100
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"no end mark at byte 3072"):
        list(read_tar(path))


def test_a_compressed_tar(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(DataError, match=r"not a whole, uncompressed tar"):
        list(read_tar(path))
