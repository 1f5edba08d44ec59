"""Files here and in stores: published whole, listed, removed, and stores that do not answer."""

import errno
import sys
from pathlib import Path

import pytest
from upath import UPath

from featurize import places
from featurize.manifest import CacheError
from featurize.places import answering, file_at, files, folders, found, link, place, publish, read, replacing, version


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    """A folder here, in an object store, and in a store that is none."""
    if request.param == "local":
        yield tmp_path
    elif request.param == "s3":
        yield request.getfixturevalue("bucket") / "some" / "prefix"
    else:
        made = place(f"memory://{tmp_path.name}", ValueError)
        yield made
        made.fs.store.clear()


def test_a_path_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place("some/cache", CacheError) == tmp_path / "some" / "cache"
    for text in (f"{tmp_path}/a", f"file://{tmp_path}/a", f"local://{tmp_path}/a"):
        found = place(text, CacheError)
        assert type(found) is type(tmp_path)
        assert found == tmp_path / "a"


def test_a_uri_keeps_its_text(s3):
    found = place("s3://bucket/a b/cache/", CacheError)
    assert isinstance(found, UPath)
    assert str(found) == "s3://bucket/a b/cache"
    assert place(str(found), CacheError) == found


def test_unknown_stores_are_refused(monkeypatch):
    with pytest.raises(CacheError, match=r"s4://x/y: no file system for s4:// here .*install the fsspec package"):
        place("s4://x/y", CacheError)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(CacheError, match=r"no file system for s3:// here .*pip install 'isthmus\[s3\]'"):
        place("s3://bucket/elsewhere", CacheError).fs  # noqa: B018


def test_files_are_published_and_listed(folder):
    publish_into = folder / "set@1"
    places.make_folder(publish_into / "column@2")
    publish(publish_into / "b.json", b"one")
    publish(publish_into / "b.json", b"three")
    with replacing(publish_into / "column@2" / "000000.tar") as file:
        file.write(b"shard")
    assert read(publish_into / "b.json") == b"three"
    assert [(file.name, file.size, file.shared) for file in files(publish_into)] == [("b.json", 5, False)]
    assert files(publish_into)[0].modified > 1_600_000_000
    assert [one.name for one in folders(publish_into)] == ["column@2"]
    assert [one.name for one in found(folder, "*@*/*.json")] == ["b.json"]
    assert [one.name for one in found(publish_into / "column@2", "*")] == ["000000.tar"]
    assert found(folder / "nothing", "*.json") == []


def test_what_fails_leaves_nothing(folder):
    places.make_folder(folder)
    publish(folder / "kept", b"kept")

    def half():
        with replacing(folder / "new") as file:
            file.write(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        half()
    assert [file.name for file in files(folder)] == ["kept"]


def test_a_name_is_moved_into_place_where_objects_are_seen_half_written(tmp_path, monkeypatch):
    folder = place(f"memory://{tmp_path.name}", ValueError)
    places.make_folder(folder)
    written = []
    monkeypatch.setattr(folder.fs, "pipe_file", lambda path, data, **_: written.append((path, data)))
    monkeypatch.setattr(folder.fs, "mv", lambda one, other: written.append((one, other)))
    publish(folder / "a.json", b"x")
    (temporary, data), moved = written
    assert data == b"x"
    assert temporary.rpartition("/")[2].startswith(".a.json.")
    assert moved == (temporary, (folder / "a.json").path)


def test_second_names(folder):
    places.make_folder(folder)
    publish(folder / "a", b"content")
    link(folder / "a", folder / "b")
    assert read(folder / "b") == b"content"
    if isinstance(folder, Path):
        assert all(file.shared for file in files(folder))
    with pytest.raises(OSError, match="different file systems"):
        link(Path("/a"), place("memory://a", ValueError))


def test_removal(folder):
    places.make_folder(folder / "in")
    publish(folder / "in" / "a", b"content")
    publish(folder / "b", b"content")
    places.remove_file(folder / "b")
    places.remove_file(folder / "b")
    assert [file.name for file in files(folder)] == []
    places.remove_folder(folder / "in")
    assert found(folder, "*/a") == []
    with pytest.raises(FileNotFoundError):
        read(folder / "b")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"ETag": '"abc"', "mtime": 5}, "abc"),
        ({"ETag": 'W/"abc"'}, "abc"),
        ({"etag": "0x8D", "last_modified": None}, "0x8D"),
        ({"md5Hash": "q==", "generation": 7}, "q=="),
        ({"mtime": 90.5}, "90.500000"),
        ({"mtime": 99.0}, ""),
        ({"mtime": 101.0}, ""),
        ({"size": 3}, ""),
    ],
)
def test_versions(info, expected):
    assert version(info, now=100.0) == expected


def test_a_bucket_that_does_not_exist(s3):
    with pytest.raises(CacheError, match=r"s3://no-such-bucket/cache: there is no bucket 'no-such-bucket'"):
        places.require_answer(place("s3://no-such-bucket/cache", CacheError), CacheError)


def test_an_empty_prefix_answers(bucket, tmp_path):
    places.require_answer(bucket / "nothing" / "here", CacheError)
    places.require_answer(tmp_path / "nothing", CacheError)


def test_missing_credentials(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    cache = place("s3://bucket/cache", CacheError)
    type(cache.fs).clear_instance_cache()
    with pytest.raises(CacheError, match=r"s3://bucket/cache: the store does not answer .*[Cc]redentials.*; check the"):
        places.require_answer(place("s3://bucket/cache", CacheError), CacheError)
    type(cache.fs).clear_instance_cache()


def test_nobody_at_the_endpoint(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    cache = place("s3://bucket/cache", CacheError)
    type(cache.fs).clear_instance_cache()
    with pytest.raises(CacheError, match=r"the store does not answer .*127\.0\.0\.1:9.*; check the network"):
        places.require_answer(place("s3://bucket/cache", CacheError), CacheError)
    type(cache.fs).clear_instance_cache()


def test_errors_of_files_are_left_alone(tmp_path):
    with pytest.raises(ZeroDivisionError), answering(tmp_path, CacheError):
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), answering("s3://a/b", CacheError):
        raise FileNotFoundError


def test_chains_are_left_to_fsspec(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    store, path = file_at(f"simplecache::file://{tmp_path}/a")
    assert store.cat_file(path) == b"x"


def test_a_second_name_that_is_there_already_leaves_nothing_behind(tmp_path):
    """As after a kill between the link and what comes after it."""
    (tmp_path / "one").write_bytes(b"bytes")
    for _ in range(2):
        link(tmp_path / "one", tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_fault_of_the_store(bucket, number):
    with pytest.raises(OSError, match="no room") as full, answering(bucket, CacheError):
        raise OSError(number, "no room")
    assert full.value.errno == number
