"""The tar is the array, and still a tar."""

import itertools
import os
import re
import resource
import tarfile
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import webdataset

from featurize.shards import Column, Shard, ShardError, row_key, to_int8, write_shard

# webdataset leaves its last file to the garbage collector
webdataset_leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def make_column(folder, counts, shape=(3, 5), dtype=np.float16):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(sum(counts), *shape)).astype(dtype)
    start = 0
    for number, count in enumerate(counts):
        keys = [row_key(f"image {start + row}") for row in range(count)]
        write_shard(folder / f"{number:06d}.tar", keys, values[start : start + count])
        start += count
    return Column("test", folder, counts), values


def make_ragged(folder, counts, width=4):
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=(length, width)).astype(np.float16) for length in [3, 0, 7, 1, 2, 9][: sum(counts)]]
    start = 0
    for number, count in enumerate(counts):
        keys = [row_key("id", start + row) for row in range(count)]
        write_shard(folder / f"{number:06d}.tar", keys, rows[start : start + count], ragged=True)
        start += count
    return Column("tokens", folder, counts, ragged=True), rows


def test_gather_equals_what_was_written_in_any_order_with_repeats(tmp_path):
    column, values = make_column(tmp_path, [4, 1, 6])
    rows = np.array([10, 0, 4, 4, 3, 5, 9])
    np.testing.assert_array_equal(column.gather(rows), values[rows])
    assert (column.rows, column.shape, column.dtype) == (11, (3, 5), np.float16)


@pytest.mark.parametrize("shape", [(1,), (48,), (192,), (2048,), (7, 7, 3), (320,)])
def test_strides_hold_for_every_row_size(tmp_path, shape):
    column, values = make_column(tmp_path, [3], shape)
    np.testing.assert_array_equal(column.gather(np.arange(3)), values)


def test_ragged_rows_are_padded_and_masked(tmp_path):
    column, rows = make_ragged(tmp_path, [2, 4])
    wanted = np.array([5, 1, 2])
    padded, mask = column.gather_padded(wanted)
    assert padded.shape == (3, 9, 4)
    assert mask.sum(1).tolist() == [9, 0, 7]
    for place, row in enumerate(wanted):
        np.testing.assert_array_equal(padded[place][mask[place]], rows[row])
        assert not padded[place][~mask[place]].any()


@webdataset_leaves_files_open
def test_ragged_rows_of_whole_numbers(tmp_path):
    rows = [np.array(row, np.int32) for row in ([], [5, 2**31 - 1], [7], [], [1] * 200)]
    write_shard(tmp_path / "000000.tar", [row_key("id", k) for k in range(5)], rows, ragged=True)
    column = Column("lemmas", tmp_path, [5], ragged=True)
    assert (column.dtype, column.shape) == (np.int32, ())
    assert [column.shards[0].key(row) for row in range(5)] == [f"id~{row}" for row in range(5)]
    padded, mask = column.gather_padded(np.array([4, 3, 1, 0]))
    assert padded.shape == (4, 200)
    assert [row[kept].tolist() for row, kept in zip(padded, mask, strict=True)] == [[1] * 200, [], [5, 2**31 - 1], []]
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode())
    assert [sample["npy"].tolist() for sample in samples] == [row.tolist() for row in rows]


def test_int8_keeps_every_number_within_half_a_step(tmp_path):
    rng = np.random.default_rng(3)
    values = (rng.normal(size=(7, 3, 5)) * 10.0 ** rng.integers(-3, 3, size=(7, 3, 1))).astype(np.float16)
    values[2, 1] = 0
    values[4] = np.nan
    write_shard(tmp_path / "000000.tar", [row_key(f"{row}") for row in range(7)], map(to_int8, values))
    column = Column("test", tmp_path, [7])
    assert (column.shape, column.dtype, column.shards[0].stored) == ((3, 5), np.float16, "int8")
    found = column.gather(np.array([5, 2, 4]))
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(column.row(5), found[0])
    np.testing.assert_array_equal(found[1][1], 0)
    for row in (0, 1, 2, 3, 5, 6):
        exact, kept = values[row].astype(np.float64), column.row(row).astype(np.float64)
        step = np.abs(exact).max(-1, keepdims=True) / 127
        assert (np.abs(exact - kept) <= step / 2 + 1e-3 * np.abs(exact)).all()
        assert (kept.argmax(-1) == exact.argmax(-1)).all()  # the largest number is hit exactly, but for float16


def test_int8_of_one_vector(tmp_path):
    """By hand: the largest of 0.5, -1, 0.251 is 1, so the step is 1 / 127."""
    write_shard(tmp_path / "000000.tar", ["x"], [to_int8(np.array([0.5, -1, 0.251]))])
    record = Column("test", tmp_path, [1]).shards[0].array[0]
    assert record["scale"] == np.float32(1 / 127)
    assert record["values"].tolist() == [64, -127, 32]
    assert Column("test", tmp_path, [1]).row(0).tolist() == pytest.approx([64 / 127, -1, 32 / 127], abs=5e-4)


@webdataset_leaves_files_open
def test_ragged_rows_in_int8(tmp_path):
    rng = np.random.default_rng(4)
    rows = [rng.normal(size=(length, 5)).astype(np.float16) for length in (3, 0, 200, 1)]
    write_shard(tmp_path / "000000.tar", [row_key("id", k) for k in range(4)], map(to_int8, rows), ragged=True)
    column = Column("tokens", tmp_path, [4], ragged=True)
    assert (column.shape, column.dtype) == ((5,), np.float16)
    assert [column.shards[0].key(row) for row in range(4)] == [f"id~{row}" for row in range(4)]
    padded, mask = column.gather_padded(np.array([2, 1, 0]))
    assert mask.sum(1).tolist() == [200, 0, 3]
    for place, row in enumerate((2, 1, 0)):
        np.testing.assert_allclose(padded[place][mask[place]], rows[row], atol=4 / 127 / 2)
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode())
    for sample, row in zip(samples, rows, strict=True):
        np.testing.assert_array_equal(sample["npy"], to_int8(row))


@webdataset_leaves_files_open
def test_plain_webdataset_reads_a_shard(tmp_path):
    _, values = make_column(tmp_path, [5])
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"image%20{row}" for row in range(5)]
    np.testing.assert_array_equal(np.stack([sample["npy"] for sample in samples]), values)


@webdataset_leaves_files_open
def test_plain_webdataset_reads_a_ragged_shard(tmp_path):
    _, rows = make_ragged(tmp_path, [3])
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode())
    for sample, row in zip(samples, rows, strict=True):
        np.testing.assert_array_equal(sample["npy"], row)


def test_equal_rows_give_equal_bytes(tmp_path):
    rows = np.ones((2, 3), np.float16)
    one = write_shard(tmp_path / "a.tar", ["x", "y"], rows)
    two = write_shard(tmp_path / "b.tar", ["x", "y"], rows)
    assert one == two
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize(
    ("image_id", "key"),
    [
        ("abc_1-2", "abc_1-2"),
        ("a/b.c", "a%2Fb%2Ec"),
        ("..", "%2E%2E"),
        ("100%~", "100%25%7E"),
        ("é", "%C3%A9"),
    ],
)
def test_keys_are_never_paths(image_id, key):
    assert row_key(image_id) == key
    assert row_key(image_id, 3) == f"{key}~3"


def test_long_ids_stay_apart_and_fit_a_tar_header(tmp_path):
    keys = [row_key("x" * 300 + end, 12345) for end in "ab"]
    assert keys[0] != keys[1]
    write_shard(tmp_path / "a.tar", keys, np.zeros((2, 2), np.float16))
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == [f"{key}.npy" for key in keys]


def test_a_shard_knows_its_keys(tmp_path):
    column, _ = make_column(tmp_path, [3])
    assert [column.shards[0].key(row) for row in range(3)] == ["image%200", "image%201", "image%202"]
    (tmp_path / "r").mkdir()
    ragged, _ = make_ragged(tmp_path / "r", [3])
    assert [ragged.shards[0].key(row) for row in range(3)] == ["id~0", "id~1", "id~2"]


def test_rows_of_another_shape_are_refused_and_nothing_is_published(tmp_path):
    with pytest.raises(ShardError, match=r"row 1 \(b\) is float16\(4,\), but row 0 is float16\(3,\)"):
        write_shard(tmp_path / "a.tar", ["a", "b"], [np.zeros(3, np.float16), np.zeros(4, np.float16)])
    assert not (tmp_path / "a.tar").exists()


def test_a_cut_shard_is_refused(tmp_path):
    make_column(tmp_path, [5])
    path = tmp_path / "000000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ShardError, match="fewer than the 5 rows"):
        Column("test", tmp_path, [5])


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "000000.tar"
    path.write_bytes(b"not a tar" * 200)
    with pytest.raises(ShardError, match="cannot be opened as a shard"):
        Shard(path, 1)


def test_a_cut_ragged_shard_is_refused(tmp_path):
    make_ragged(tmp_path, [6])
    path = tmp_path / "000000.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ShardError, match=r"one of them is cut or damaged \(row 1 .* end within 1500 bytes\)"):
        Column("tokens", tmp_path, [6], ragged=True)


def test_an_index_that_cannot_be_the_tar_s_is_refused(tmp_path, index_damage):
    make_ragged(tmp_path, [6])
    beside = tmp_path / "000000.idx.npy"
    np.save(beside, index_damage(np.load(beside)))
    with pytest.raises(
        ShardError, match=r"000000\.tar: the index beside it is another's, or one .* cache repair` makes"
    ):
        Column("tokens", tmp_path, [6], ragged=True)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04 no archive"])
def test_an_index_that_is_no_array_is_refused(tmp_path, content):
    make_ragged(tmp_path, [6])
    (tmp_path / "000000.idx.npy").write_bytes(content)
    with pytest.raises(ShardError, match=r"000000\.tar: cannot be opened as a shard"):
        Column("tokens", tmp_path, [6], ragged=True)


def test_a_length_within_the_padding_is_told_by_the_tar_alone(tmp_path):
    rows = [np.arange(length, dtype=np.int32) for length in (3, 0, 7)]
    write_shard(tmp_path / "000000.tar", ["a", "b", "c"], rows, ragged=True)
    assert Shard(tmp_path / "000000.tar", 3, ragged=True).has_its_index()
    beside = tmp_path / "000000.idx.npy"
    index = np.load(beside)
    index[1, 1] += 2
    np.save(beside, index)
    assert not Shard(tmp_path / "000000.tar", 3, ragged=True).has_its_index()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, for names of types that damage spells
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, for numbers that damage makes too large
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_no_bit_of_the_headers_ends_in_another_error(tmp_path, ragged, quantised):
    """Each bit of the first member's name and npy header, and of the index's header and first row."""
    values = np.arange(30, dtype=np.float16).reshape(2, 3, 5)
    rows = [to_int8(row) if quantised else row for row in values]
    path = tmp_path / "000000.tar"
    write_shard(path, ["a", "b"], rows, ragged=ragged)
    places = [(path, [*range(100), *range(512, 704)])]
    if ragged:
        places.append((path.with_suffix(".idx.npy"), range(144)))
    refused = 0
    for file, bytes_ in places:
        whole = file.read_bytes()
        for place, bit in itertools.product(bytes_, range(8)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                shard = Shard(path, 2, ragged=ragged)
            except ShardError:
                refused += 1
            else:
                assert [shard.key(row) for row in (0, 1)][1] == "b"
                assert shard.row(1) is not None
        file.write_bytes(whole)
    assert refused > 500


def test_too_many_open_files_are_no_damage(tmp_path):
    make_column(tmp_path, [1] * 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 8
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        opened = []
        with suppress(OSError):
            while True:
                opened.append(stack.enter_context(Path(os.devnull).open("rb")))
        for file in opened[:3]:
            file.close()
        with pytest.raises(ShardError) as caught:
            Column("test", tmp_path, [1] * 4)
    assert re.search(
        rf"0000\d+\.tar: cannot be opened, for this process has the {few} files open that it may have.*"
        r"`ulimit -n 65536`.*--featurize\.rows_per_shard",
        str(caught.value),
    )


def test_shards_of_two_shapes_are_no_column(tmp_path):
    make_column(tmp_path, [2], (3,))
    write_shard(tmp_path / "000001.tar", ["x"], np.zeros((1, 4), np.float16))
    with pytest.raises(ShardError, match="different shape"):
        Column("test", tmp_path, [2, 1])
