"""Copies of remote shards: whole or not there, checked, shared, evicted but not under a reader; or streamed."""

import os
import shutil
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from featurize import copies
from featurize.columns import open_column
from featurize.copies import Node, NoRoomError, open_copy
from featurize.index import open_dataset
from featurize.manifest import CacheError, Manifest, ShardRecord
from featurize.places import link, publish, read, remove_file
from featurize.remote import OPEN, RemoteShards
from featurize.shards import Column, Shard, ShardError, index_of, row_key, write_shard
from featurize.streams import stream

WIDTH, ROWS = 64, 8


@pytest.fixture
def column(bucket):
    """A remote column of five shards, and its values (40, 64)."""
    folder = bucket / "set@1" / "one.pooled@2"
    values = np.random.default_rng(0).normal(size=(5 * ROWS, WIDTH)).astype(np.float16)
    records = []
    for number in range(5):
        rows = values[number * ROWS : (number + 1) * ROWS]
        file = write_shard(folder / f"{number:06d}.tar", [row_key(f"{number}/{row}") for row in range(ROWS)], rows)
        records.append(ShardRecord(file.rows, file.size, file.sha256))
    manifest = Manifest("one.pooled", "image", {}, "one", "float16", (WIDTH,), False, ROWS, tuple(records))
    return folder, manifest, values


@pytest.fixture
def ragged(bucket):
    """A remote column of two ragged shards, and its rows."""
    folder = bucket / "set@1" / "words.tokens@2"
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(length, 4)).astype(np.float16) for length in [3, 0, 7, 1, 2, 9]]
    records = []
    for number in range(2):
        inside = rows[3 * number : 3 * number + 3]
        file = write_shard(
            folder / f"{number:06d}.tar", [row_key(f"{number}", k) for k in range(3)], inside, ragged=True
        )
        records.append(ShardRecord(file.rows, file.size, file.sha256))
    return folder, Manifest("words.tokens", "text", {}, "words", "float16", (4,), True, 3, tuple(records)), rows


def opened(folder, manifest):
    rows = [shard.rows for shard in manifest.shards]
    return Column(manifest.name, folder, rows, ragged=manifest.ragged, shards=RemoteShards(folder, manifest))


def here(node):
    return sorted(path.name for path in node.glob("*.tar"))


def parts(node):
    return list(node.glob(".*.part"))


def damage(path, data):
    publish(path, data)


def test_only_shards_whose_rows_are_asked_for_are_fetched(column, node):
    folder, manifest, values = column
    pulled = opened(folder, manifest)
    assert (pulled.rows, pulled.shape, pulled.dtype) == (40, (WIDTH,), np.float16)
    assert not node.exists()
    rows = np.array([9, 8, 33, 9])
    np.testing.assert_array_equal(pulled.gather(rows), values[rows])
    assert here(node) == sorted(f"{manifest.shards[number].sha256}.tar" for number in (1, 4))
    np.testing.assert_array_equal(pulled.row(39), values[39])
    np.testing.assert_array_equal(pulled.gather(np.arange(40)[::-1]), values[::-1])
    assert len(here(node)) == 5
    assert not parts(node)


def test_a_copy_is_fetched_once(column, node, monkeypatch):
    folder, manifest, values = column
    opened(folder, manifest).gather(np.arange(40))
    OPEN.clear()
    monkeypatch.setattr(copies, "pieces", lambda *_: pytest.fail("was fetched again"))
    np.testing.assert_array_equal(opened(folder, manifest).gather(np.arange(40)), values)


def test_ragged_rows_need_no_index_from_the_store(ragged, node):
    folder, manifest, rows = ragged
    pulled = opened(folder, manifest)
    assert pulled.longest == 9
    assert not node.exists()  # the indexes tell
    for number in range(2):
        remove_file(folder / f"{number:06d}.idx.npy")
    padded, mask = pulled.gather_padded(np.array([5, 1, 2]))
    for place, row in enumerate([5, 1, 2]):
        np.testing.assert_array_equal(padded[place][mask[place]], rows[row])
    assert [pulled.shards[1].key(row) for row in range(3)] == ["1~0", "1~1", "1~2"]


def test_an_index_is_made_of_the_tar_alone(tmp_path):
    for name, rows in {
        "ids": [np.array(row, np.int32) for row in ([], [5, 2**31 - 1], [7] * 300)],
        "tokens": [np.zeros((length, 3), np.float16) for length in (2, 0, 170, 171)],
    }.items():
        path = tmp_path / f"{name}.tar"
        write_shard(path, [row_key("id", k) for k in range(len(rows))], rows, ragged=True)
        np.testing.assert_array_equal(index_of(np.fromfile(path, np.uint8)), np.load(path.with_suffix(".idx.npy")))
    data = np.fromfile(path, np.uint8)
    with pytest.raises(ShardError, match=r"no end mark at byte \d+; the tar was cut"):
        index_of(data[: data.nonzero()[0][-1] // 512 * 512 + 512])
    with pytest.raises(ShardError, match="member at byte 0 is no npy array"):
        index_of(np.frombuffer(b"not a tar" * 200, np.uint8))
    mixed = tmp_path / "mixed.tar"
    one, other = (tmp_path / f"{kind}.tar" for kind in ("f2", "f4"))
    write_shard(one, ["a"], [np.zeros((1, 3), np.float16)])
    write_shard(other, ["b"], [np.zeros((1, 3), np.float32)])
    mixed.write_bytes(one.read_bytes()[:1024] + other.read_bytes())
    with pytest.raises(ShardError, match="member at byte 1024 is not like the first"):
        index_of(np.fromfile(mixed, np.uint8))


def test_int8_columns(bucket, node):
    from featurize.shards import to_int8

    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float16)
    folder = bucket / "column@1"
    file = write_shard(folder / "000000.tar", ["a", "b", "c"], map(to_int8, values))
    record = ShardRecord(file.rows, file.size, file.sha256)
    manifest = Manifest("c", "image", {}, "one", "int8", (5,), False, 3, (record,))
    pulled = opened(folder, manifest)
    streamed = stream(folder / "000000.tar", record, ragged=False)
    np.testing.assert_array_equal(pulled.gather(np.arange(3)), streamed.gather(np.arange(3)))
    np.testing.assert_allclose(pulled.gather(np.arange(3)), values, atol=2e-2)


@pytest.mark.parametrize("gib", ["1", "0"], ids=["copied", "streamed"])
def test_damage_is_refused_by_its_checksum(column, node, monkeypatch, gib):
    folder, manifest, _ = column
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", gib)
    path = folder / "000002.tar"
    data = bytearray(read(path))
    data[700] ^= 1
    damage(path, bytes(data))
    told = (
        rf"000002\.tar: its bytes have the sha256 [0-9a-f]{{12}}, its manifest says {manifest.shards[2].sha256[:12]}: "
        "it was changed or damaged; `python -m pipeline cache repair`"
    )
    with pytest.raises(CacheError, match=told):
        opened(folder, manifest).row(20)
    damage(path, bytes(data[:3000]))
    with pytest.raises(CacheError, match=rf"000002\.tar: has 3000 bytes, its manifest says {len(data)}"):
        opened(folder, manifest).row(20)
    remove_file(path)
    with pytest.raises(CacheError, match=r"000002\.tar: is missing; `python -m pipeline cache repair`"):
        opened(folder, manifest).row(20)
    assert here(node) == []
    assert not parts(node)


def test_a_download_that_breaks_off_leaves_nothing(column, node, monkeypatch):
    folder, manifest, values = column
    monkeypatch.setattr(copies, "_PIECE", 4096)
    monkeypatch.setattr(copies.time, "sleep", lambda _seconds: None)
    whole, calls = copies._range, []

    def breaking(source, start, end):
        calls.append(start)
        if start:
            raise ConnectionResetError("the line went dead")
        return whole(source, start, end)

    monkeypatch.setattr(copies, "_range", breaking)
    with pytest.raises(CacheError, match=r"the store does not answer .*the line went dead"):
        opened(folder, manifest).row(0)
    assert calls == [0, 4096] * 3  # tried again, from the beginning
    assert here(node) == []
    assert not parts(node)
    failures = iter([True, False])

    def once(source, start, end):
        if start and next(failures, False):
            raise ConnectionResetError("the line went dead")
        return whole(source, start, end)

    monkeypatch.setattr(copies, "_range", once)
    np.testing.assert_array_equal(opened(folder, manifest).row(0), values[0])


def test_what_a_killed_download_left_is_no_copy_and_goes(column, node):
    folder, manifest, values = column
    (node / "locks").mkdir(parents=True)
    left = node / f".{manifest.shards[0].sha256}.dead.part"
    left.write_bytes(read(folder / "000000.tar")[:2000])
    np.testing.assert_array_equal(opened(folder, manifest).row(0), values[0])
    assert not left.exists()


def test_a_copy_that_was_cut_is_fetched_again(column, node):
    folder, manifest, values = column
    opened(folder, manifest).row(0)
    OPEN.clear()
    (copy,) = node.glob("*.tar")
    os.truncate(copy, 1000)
    np.testing.assert_array_equal(opened(folder, manifest).row(0), values[0])


def limit(monkeypatch, manifest, shards):
    """A disk with room for so many shards and a half."""
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", repr(manifest.shards[0].size * (shards + 0.5) / 2**30))


def test_the_copies_used_longest_ago_go(column, node, monkeypatch):
    folder, manifest, values = column
    limit(monkeypatch, manifest, 3)
    pulled = opened(folder, manifest)
    for row in (0, 8, 16, 0):
        pulled.row(row)
    OPEN.clear()
    for place, number in enumerate((1, 0, 2)):
        os.utime(node / f"{manifest.shards[number].sha256}.tar", (place, place))
    pulled.row(24)
    assert here(node) == sorted(f"{manifest.shards[number].sha256}.tar" for number in (0, 2, 3))
    for row in range(40):  # whatever is evicted comes again
        np.testing.assert_array_equal(pulled.row(row), values[row])
        assert len(here(node)) <= 3


def test_a_copy_in_use_stays(column, node, monkeypatch):
    folder, manifest, values = column
    limit(monkeypatch, manifest, 1)
    settings = Node.here()
    used = open_copy(settings, folder / "000000.tar", manifest.shards[0], ragged=False)
    with pytest.raises(NoRoomError, match="do not fit beside"):
        open_copy(settings, folder / "000001.tar", manifest.shards[1], ragged=False)
    assert here(node) == [f"{manifest.shards[0].sha256}.tar"]
    pulled = opened(folder, manifest)  # reads it all the same: into memory
    np.testing.assert_array_equal(pulled.gather(np.arange(40)), values)
    assert here(node) == [f"{manifest.shards[0].sha256}.tar"]
    np.testing.assert_array_equal(used.gather(np.arange(8)), values[:8])
    OPEN.clear()
    del used
    open_copy(settings, folder / "000001.tar", manifest.shards[1], ragged=False)
    assert here(node) == [f"{manifest.shards[1].sha256}.tar"]


HOLD = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print('held', flush=True); input()"


def test_a_copy_in_use_by_another_process_stays(column, node, monkeypatch):
    folder, manifest, _ = column
    limit(monkeypatch, manifest, 1)
    opened(folder, manifest).row(0)
    OPEN.clear()
    (copy,) = node.glob("*.tar")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(copy)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(NoRoomError):
            open_copy(Node.here(), folder / "000001.tar", manifest.shards[1], ragged=False)
        process.communicate("\n")
    open_copy(Node.here(), folder / "000001.tar", manifest.shards[1], ragged=False)
    assert here(node) == [f"{manifest.shards[1].sha256}.tar"]


@pytest.mark.parametrize(("blocks", "kept"), [(1000, 100), (10**9, 10 * 2**20)], ids=["small", "large"])
def test_without_a_limit_a_tenth_of_the_disk_stays_free_or_10_gib(column, node, monkeypatch, caplog, blocks, kept):
    folder, manifest, values = column
    monkeypatch.delenv("ISTHMUS_LOCAL_GIB")
    real = os.statvfs
    free = [kept + 20]  # KiB

    def status(path):
        return os.statvfs_result((1024, 1024, blocks, *free * 2, *real(path)[5:10]))

    monkeypatch.setattr(copies.os, "statvfs", status)
    pulled = opened(folder, manifest)
    pulled.row(0)  # 20 KiB to spare, a shard has less
    assert len(here(node)) == 1
    assert not caplog.messages
    free[:] = [kept + 5]
    for row in (8, 16):
        np.testing.assert_array_equal(pulled.row(row), values[row])
    assert here(node) == []  # what was there had to go, and it did not help
    size = manifest.shards[1].size
    assert size > 5 * 1024
    (told,) = caplog.messages
    assert told == (
        f"{node}: {size} bytes do not fit beside the 0 that are in use, with {(kept + 5) * 1024} bytes free on the "
        "disk: shards without a copy are fetched each time they are needed; ISTHMUS_LOCAL is their folder, "
        "ISTHMUS_LOCAL_GIB its limit"
    )


def test_no_disk_at_all(column, ragged, node, monkeypatch):
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", "0")
    folder, manifest, values = column
    pulled = opened(folder, manifest)
    rows = np.random.default_rng(1).permutation(40)
    np.testing.assert_array_equal(pulled.gather(rows), values[rows])
    np.testing.assert_array_equal(pulled.row(17), values[17])
    assert pulled.shards[2].key(3) == "2%2F3"
    folder, manifest, expected = ragged
    pulled = opened(folder, manifest)
    padded, mask = pulled.gather_padded(np.array([5, 1, 2]))
    for place, row in enumerate([5, 1, 2]):
        np.testing.assert_array_equal(padded[place][mask[place]], expected[row])
    assert pulled.shards[1].key(2) == "1~2"
    assert not node.exists()


@pytest.mark.parametrize("damage", [b"'shape': (64,{", b"'shape': (64;)"])
def test_a_damaged_header_in_a_stream_is_damage(column, damage):
    """And no store that does not answer: the network is not blamed."""
    folder, manifest, _ = column
    whole = (folder / "000000.tar").read_bytes()
    assert whole.count(b"'shape': (64,)") == ROWS
    (folder / "000000.tar").write_bytes(whole.replace(b"'shape': (64,)", damage, 1))
    with pytest.raises(CacheError, match=r"000000\.tar: .* sha256"):
        stream(folder / "000000.tar", manifest.shards[0], ragged=False)


def test_streamed_shards_keep_to_their_memory(column, node, monkeypatch):
    folder, manifest, values = column
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", "0")
    monkeypatch.setenv("ISTHMUS_MEMORY_GIB", repr(2.5 * values[:ROWS].nbytes / 2**30))
    pulled = opened(folder, manifest)
    for row in range(40):
        np.testing.assert_array_equal(pulled.row(row), values[row])
        assert len(OPEN._shards) <= 2
    assert set(OPEN._shards) == {shard.sha256 for shard in manifest.shards[3:]}


def test_open_shards_are_few_enough_for_the_processs_files(column, node, monkeypatch):
    folder, manifest, _ = column
    monkeypatch.setattr("featurize.remote._FEWEST", 2)
    monkeypatch.setattr("resource.getrlimit", lambda _what: (8, 8))
    opened(folder, manifest).gather(np.arange(40))
    assert len(OPEN._shards) == 2


def test_threads_share_a_copy(column, node):
    folder, manifest, values = column
    pulled = opened(folder, manifest)
    found = {}

    def gather(number):
        found[number] = pulled.gather(np.arange(40))

    threads = [threading.Thread(target=gather, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gathered in found.values():
        np.testing.assert_array_equal(gathered, values)
    assert len(here(node)) == 5


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_variables_hold_numbers(monkeypatch, text):
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", text)
    with pytest.raises(CacheError, match=rf"ISTHMUS_LOCAL_GIB: found '{text}', expected a number of GiB, 0 or more"):
        Node.here()


def test_copies_lie_in_the_systems_temporary_folder(monkeypatch, tmp_path):
    for name in ("ISTHMUS_LOCAL", "ISTHMUS_LOCAL_GIB", "ISTHMUS_MEMORY_GIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Node.here() == Node(tmp_path / f"isthmus-{os.getuid()}", None, 2**30)


def test_the_folder_is_for_this_user_alone(tmp_path):
    node = Node(tmp_path / "above" / "copies", None, 2**30)
    before = os.umask(0)
    try:
        node.make()
    finally:
        os.umask(before)
    assert [stat.S_IMODE((node.folder / name).stat().st_mode) for name in (".", "locks")] == [0o700, 0o700]
    node.folder.chmod(0o770)
    with pytest.raises(CacheError, match="others may write to it, and copies of shards are believed; `chmod 700` it"):
        node.make()


def test_the_folder_is_nobody_elses(column, node, monkeypatch):
    folder, manifest, _ = column
    monkeypatch.setattr(copies.os, "getuid", lambda: 12345)
    with pytest.raises(CacheError, match="belongs to another user; set ISTHMUS_LOCAL to a folder of your own"):
        opened(folder, manifest).row(0)
    shutil.rmtree(node)
    node.write_text("a file")
    with pytest.raises(CacheError, match=r"no folder for copies of shards .*set ISTHMUS_LOCAL to another"):
        opened(folder, manifest).row(0)


def test_another_columns_shard_is_refused(make_dataset, make_column, bucket):
    dataset = make_dataset()
    manifest, local = make_column(dataset, shards=(3, 3))
    remote = bucket / "cache" / dataset.folder.name
    for path in dataset.folder.rglob("*.*"):
        if path.is_file():
            publish(remote / path.relative_to(dataset.folder).as_posix(), path.read_bytes())
    moved = open_dataset(remote)
    assert moved.samples == dataset.samples
    column = open_column(moved, "one.pooled", manifest.id)
    assert column.gather(np.array([5, 0])).tolist() == [[15, 16, 17], [0, 1, 2]]
    OPEN.clear()
    there = remote / local.name
    link(there / "000001.tar", there / "000000.tar")
    text = (local / "manifest.json").read_text()
    one, other = (shard.sha256 for shard in manifest.shards)
    publish(there / "manifest.json", text.replace(one, other).encode())
    with pytest.raises(CacheError, match=r"s3://.*000000\.tar: row 0 belongs to 'id3', expected 'id0'"):
        open_column(moved, "one.pooled", manifest.id).row(0)


def test_a_shard_of_another_shape_is_refused(column, node):
    folder, manifest, _ = column
    wrong = Manifest("one.pooled", "image", {}, "one", "float32", (WIDTH,), False, ROWS, manifest.shards)
    with pytest.raises(ShardError, match=r"holds float16\(64,\), its manifest says float32\(64,\)"):
        opened(folder, wrong).row(0)


def test_a_copy_says_what_it_is_a_copy_of(column, node):
    folder, manifest, _ = column
    record = ShardRecord(99, manifest.shards[0].size, manifest.shards[0].sha256)
    with pytest.raises(ShardError, match=r"s3://.*000000\.tar: \d+ bytes hold fewer than the 99 rows"):
        open_copy(Node.here(), folder / "000000.tar", record, ragged=False)
    with pytest.raises(CacheError, match=r"s3://.*000000\.tar: holds 8 rows, its manifest says 99"):
        stream(folder / "000000.tar", record, ragged=False)
    assert isinstance(stream(folder / "000000.tar", manifest.shards[0], ragged=False), Shard)
