"""The index: the same answers as faiss, ties in row order, and folders that are whole or refused."""

import json

import faiss
import numpy as np
import pandas as pd
import pytest

from evaluate.index import Index, IndexFileError


def items_of(count):
    return pd.DataFrame({"item": [f"image/{row}" for row in range(count)], "offset": np.arange(count)})


def index_of(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    return Index(vectors, items_of(len(vectors)))


@pytest.fixture
def cloud():
    """A thousand unit vectors and fifty queries near some of them."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1003, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, (vectors[:50] + 0.1 * rng.normal(size=(50, 24))).astype(np.float32)


@pytest.mark.parametrize("k", [1, 10, 300])
@pytest.mark.parametrize("tile", [7, 256, 4096])
def test_equals_faiss(cloud, k, tile):
    vectors, queries = cloud
    flat = faiss.IndexFlatL2(vectors.shape[1])
    flat.add(vectors)
    expected, expected_rows = flat.search(queries, k)
    distances, rows = index_of(vectors).search(queries, k, tile=tile)
    assert distances.dtype == np.float32
    assert rows.dtype == np.int64
    np.testing.assert_allclose(distances, expected, atol=2e-6)
    exact = np.square(queries[:, None].astype(np.float64) - vectors).sum(axis=2)  # (50, 1003)
    np.testing.assert_array_equal(rows, np.argsort(exact.astype(np.float32), axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(  # faiss rounds what lies closer to the other order, on some processors
        np.take_along_axis(exact, rows, 1), np.take_along_axis(exact, expected_rows, 1), atol=2e-6
    )


def test_distances_by_hand():
    distances, rows = index_of([[0, 3], [0, 1], [2, 0]]).search(np.zeros((1, 2), np.float32), 2)
    assert distances.tolist() == [[1, 4]]
    assert rows.tolist() == [[1, 2]]


@pytest.mark.parametrize("tile", [5, 13, 64, 1000])
def test_equal_items_come_in_row_order_at_any_tile(tile):
    rng = np.random.default_rng(1)
    points = (rng.normal(size=(5, 33)) + 20).astype(np.float32)
    label = rng.integers(5, size=517)
    queries = points[rng.integers(5, size=31)] + np.float32(0.25)
    distances, rows = index_of(points[label]).search(queries, 200, tile=tile)
    exact = np.square(queries[:, None].astype(np.float64) - points).sum(axis=2)  # (31, 5)
    for query in range(31):
        order = np.lexsort((np.arange(517), exact[query, label].astype(np.float32)))[:200]
        np.testing.assert_array_equal(rows[query], order)
        np.testing.assert_allclose(distances[query], exact[query, label[order]], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e15])
def test_a_collapsed_gallery_answers_with_its_first_rows(value):
    index = index_of(np.full((300, 9), value))
    distances, rows = index.search(index.vectors[:3] + np.float32(value), 5, tile=64)
    assert rows.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert np.unique(distances).size == 1


@pytest.mark.parametrize("tile", [64, 2048])
def test_an_item_is_at_distance_zero_of_itself(cloud, tile):
    # So far from the origin a float32 product is wrong by more than the distances themselves.
    vectors = cloud[0] / 2 + 1000
    distances, rows = index_of(vectors).search(vectors[500:540], 1, tile)
    assert rows[:, 0].tolist() == list(range(500, 540))
    assert not distances.any()


def test_distances_that_float32_cannot_tell_from_zero_are_ties(cloud):
    vectors, queries = cloud
    shrinking = vectors * np.linspace(2, 1, len(vectors))[:, None]  # later rows are nearer
    distances, rows = index_of(shrinking * 2.0**-100).search(queries * np.float32(2.0**-100), 3, tile=64)
    assert not distances.any()
    assert rows.tolist() == [[0, 1, 2]] * 50


def test_more_than_there_is(cloud):
    vectors, queries = cloud
    distances, rows = index_of(vectors[:4]).search(queries, 10, tile=3)
    assert distances.shape == rows.shape == (50, 4)
    assert np.sort(rows, axis=1).tolist() == [[0, 1, 2, 3]] * 50


def test_no_queries():
    distances, rows = index_of([[1, 2]]).search(np.empty((0, 2), np.float32), 3)
    assert distances.shape == rows.shape == (0, 1)


@pytest.mark.parametrize(
    ("queries", "k", "tile", "message"),
    [
        (np.zeros((1, 3), np.float32), 1, 1, r"expected float32 of shape \(queries, 2\), .* \(1, 3\)"),
        (np.zeros(2, np.float32), 1, 1, r"found float32 of shape \(2,\)"),
        (np.zeros((1, 2)), 1, 1, r"found float64 of shape \(1, 2\)"),
        (np.float32([[0, 0], [0, np.nan]]), 1, 1, r"query row 1 holds NaN or infinity \(1 of 2 rows"),
        (np.float32([[0, 1e20]]), 1, 1, r"query row 0 holds a vector 1.0e\+20 long"),
        (np.zeros((1, 2), np.float32), 0, 1, r"k and tile of at least 1, found k = 0, tile = 1"),
        (np.zeros((1, 2), np.float32), 1, 0, r"found k = 1, tile = 0"),
    ],
)
def test_search_errors(queries, k, tile, message):
    with pytest.raises(ValueError, match=message):
        index_of([[1, 2]]).search(queries, k, tile)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, 3)), r"found float64 of shape \(2, 3\)"),
        (np.zeros(3, np.float32), r"found float32 of shape \(3,\)"),
        (np.zeros((0, 3), np.float32), r"not empty, found float32 of shape \(0, 3\)"),
    ],
)
def test_vectors_must_be_a_float32_matrix(vectors, message):
    with pytest.raises(ValueError, match=message):
        Index(vectors, items_of(len(vectors)))


def test_items_must_describe_every_vector():
    with pytest.raises(ValueError, match="2 vectors, but 3 items describe them"):
        Index(np.zeros((2, 4), np.float32), items_of(3))


def test_an_item_with_nan_is_named():
    index = index_of([[0], [np.nan]])
    with pytest.raises(ValueError, match="item row 1 holds NaN or infinity"):
        index.search(np.zeros((1, 1), np.float32), 1)


def test_saved_and_opened_again(cloud, tmp_path):
    vectors, queries = cloud
    items = pd.DataFrame(
        {
            "item": [f"é/{row}" for row in range(len(vectors))],
            "uri": "memory://x",
            "offset": np.arange(len(vectors)),
            "captions": [["one", "two"]] * len(vectors),
        }
    ).iloc[::-1]
    Index(vectors, items).save(tmp_path / "new" / "index")
    opened = Index.open(tmp_path / "new" / "index")
    assert isinstance(opened.vectors, np.memmap)
    assert opened.items["item"].tolist() == items["item"].tolist()
    assert opened.items.index.tolist() == list(range(len(vectors)))
    assert list(opened.items.loc[0, "captions"]) == ["one", "two"]
    for found, expected in zip(opened.search(queries, 5), index_of(vectors).search(queries, 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"index"}


def test_saving_replaces_an_older_index(tmp_path):
    index_of([[1, 2]]).save(tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    index_of([[3, 4], [5, 6]]).save(tmp_path / "index")
    assert Index.open(tmp_path / "index").vectors.tolist() == [[3, 4], [5, 6]]
    assert opened.vectors.tolist() == [[1, 2]]  # a reader keeps what it opened
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_saving_never_replaces_what_is_not_an_index(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("mine")
    with pytest.raises(IndexFileError, match="exists and is not an index; choose another place"):
        index_of([[1, 2]]).save(tmp_path / "notes")
    assert (tmp_path / "notes" / "keep.txt").read_text() == "mine"


def test_an_interrupted_save_leaves_the_older_index(tmp_path, monkeypatch):
    index_of([[1, 2]]).save(tmp_path / "index")

    def full(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="no space left"):
        index_of([[3, 4]]).save(tmp_path / "index")
    assert Index.open(tmp_path / "index").vectors.tolist() == [[1, 2]]
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_nan_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="item row 1 holds NaN or infinity"):
        index_of([[0], [np.inf], [1]]).save(tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_no_index_there(tmp_path):
    with pytest.raises(IndexFileError, match=r"there is no index at .*nowhere; build it first"):
        Index.open(tmp_path / "nowhere")


def cut(folder):
    with (folder / "vectors.npy").open("r+b") as file:
        file.truncate(140)


def reformat(folder):
    manifest = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), r"holds no complete index \(index.json is missing\)"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index.json is not JSON"),
        (cut, r"vectors.npy: expected 144 bytes, found 140 bytes; the index is damaged"),
        (lambda folder: (folder / "items.parquet").unlink(), r"items.parquet: expected \d+ bytes, found no file"),
        (reformat, r"index.json: expected format 1, found 99; build the index again"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, damage, message):
    index_of([[1, 2], [3, 4]]).save(tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(IndexFileError, match=message):
        Index.open(tmp_path / "index")
