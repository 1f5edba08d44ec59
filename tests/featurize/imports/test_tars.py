"""Webdataset tars of features."""

import io
import json
import tarfile

import numpy as np
import pytest

from featurize.datasets.sample import DataError
from featurize.encoder import Output


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_keys_or_ids_in_json_tell_rows(tmp_path, values, opened, imported):
    array = values(7, 8)
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "0.tar", {f"x/picture-{n}.pooled.npy": npy(array[n]) for n in (5, 4, 3)})
    named = {
        n: {f"{n}.json": json.dumps({"id": f"x/picture-{n}"}).encode(), f"{n}.pooled.npy": npy(array[n])}
        for n in (0, 1)
    }
    write_tar(
        folder / "1.tar", {**named[1], **named[0], "x/picture-2.jpg": b"", "x/picture-2.pooled.npy": npy(array[2])}
    )
    assert opened(folder).card.outputs == (Output("pooled", (8,)),)
    found, failed = imported(folder, "pooled")
    assert failed == {6: "no row in tars"}
    np.testing.assert_array_equal(found[:6], array[:6])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b""}, "found no members KEY.OUTPUT.npy, expected OUTPUT out of pooled"),
        (
            {"a.pooled.npy": npy(np.ones(2)), "b.grid.npy": npy(np.ones((2, 2)))},
            "sample 'a' has no 'grid', which other",
        ),
        (
            {"a.grid.npy": npy(np.ones((2, 2))), "b.grid.npy": npy(np.ones((2, 3)))},
            "members of different width or type",
        ),
        ({"a.grid.npy": npy(np.ones((2, 2, 2, 2)))}, r"found float64 of shape \(2, 2, 2, 2\), expected numbers"),
        (
            {"a.pooled.npy": npy(np.ones(2)), "b.pooled.npy": npy(np.ones(3))},
            r"a.tar, pooled: found rows that are lists of numbers of any length, expected vectors \(D,\)",
        ),
        ({"a.pooled.npy": npy(np.array(["text"]))}, "found <U4 of shape"),
        ({"a.pooled.npy": b"no array"}, "a.pooled.npy: not an npy array"),
        ({"a.json": b"{"}, "a.json: not valid JSON"),
    ],
)
def test_members_that_do_not_fit(tmp_path, opened, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        opened(path)


def test_links_are_passed_over(tmp_path, values, opened):
    path = write_tar(tmp_path / "a.tar", {"picture-0.pooled.npy": npy(values(8))})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("picture-1.pooled.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert opened(path).source.keys.ids == ["picture-0"]


def test_a_file_of_another_kind(tmp_path, opened):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"a.tar: not a tar"):
        opened(tmp_path / "a.tar")
