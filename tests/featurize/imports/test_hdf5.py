"""HDF5: bottom-up attention in the layout of its usual conversions."""

import json
import pickle

import h5py
import numpy as np
import pytest

from featurize.datasets.sample import DataError
from featurize.encoder import Output
from featurize.imports.source import blocks

IDS = [f"picture-{number}" for number in (3, 0, 1, 2, 6, 5, 4)]


@pytest.fixture
def fixed(tmp_path, values):
    """Four boxes in each image; ids as JSON beside it."""
    path = tmp_path / "train36.hdf5"
    features, spatial = values(7, 4, 16), np.random.default_rng(0).random((7, 4, 6)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["image_features"] = features
        file["image_bb"] = np.ones((7, 4, 4), np.float32)
        file["spatial_features"] = spatial
    (tmp_path / "train36_imgid2idx.json").write_text(json.dumps({name: row for row, name in enumerate(IDS)}))
    return path, features, spatial


@pytest.fixture
def adaptive(tmp_path, values):
    """One to three boxes an image."""
    path = tmp_path / "train.hdf5"
    counts = np.array([1, 3, 2, 1, 2, 3, 1])
    ends = np.cumsum(counts)
    features = values(int(ends[-1]), 16)
    with h5py.File(path, "w") as file:
        file["image_features"] = features
        file["spatial_features"] = np.zeros((len(features), 6), np.float32)
        file["pos_boxes"] = np.stack([ends - counts, ends], 1)
        file.create_dataset("image_ids", data=IDS)
    return path, features, ends - counts, ends


def test_fixed_boxes(fixed, opened, imported):
    path, features, spatial = fixed
    assert opened(path).card.outputs == (
        Output("regions", (4, 16)),
        Output("spatial", (4, 6)),
        Output("boxes", (4, 4)),
        Output("pooled", (16,)),
    )
    regions, failed = imported(path, "regions")
    assert failed == {}
    np.testing.assert_array_equal(regions, features[[1, 2, 3, 0, 6, 5, 4]])
    boxes, _ = imported(path, "boxes")
    np.testing.assert_allclose(boxes[3], spatial[0, :, :4], atol=1e-3)


def test_adaptive_boxes_are_ragged(adaptive, opened, imported):
    path, features, begins, ends = adaptive
    assert opened(path).card.outputs[0] == Output("regions", (16,), ragged=True)
    regions, _ = imported(path, "regions")
    for number, row in enumerate([1, 2, 3, 0, 6, 5, 4]):
        np.testing.assert_array_equal(regions[number], features[begins[row] : ends[row]])


def test_adaptive_boxes_of_one_number_are_fixed(adaptive, opened):
    path, *_ = adaptive
    with h5py.File(path, "a") as file:
        del file["pos_boxes"]
        file["pos_boxes"] = np.stack([np.arange(7), np.arange(7) + 1], 1)
    assert opened(path).card.outputs[0] == Output("regions", (1, 16))


def test_chunked_rows_are_the_same(fixed, imported):
    path, features, _ = fixed
    with h5py.File(path, "a") as file:
        del file["image_features"]
        file.create_dataset("image_features", data=features, chunks=(2, 4, 16), compression="gzip")
    np.testing.assert_array_equal(imported(path, "regions")[0], features[[1, 2, 3, 0, 6, 5, 4]])


def test_a_folder_of_files_is_one(fixed, tmp_path, imported):
    features = fixed[1]
    folder = tmp_path / "both"
    folder.mkdir()
    for name, rows in (("train36", slice(0, 5)), ("val36", slice(5, 7))):
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            file["image_features"] = features[rows]
        (folder / f"{name}.ids.txt").write_text("\n".join(IDS[rows]) + "\n")
    regions, failed = imported(folder, "regions")
    assert failed == {}
    np.testing.assert_array_equal(regions, features[[1, 2, 3, 0, 6, 5, 4]])


def test_files_without_ids_are_no_folder(fixed, tmp_path, opened):
    folder = tmp_path / "both"
    folder.mkdir()
    for name in "ab":
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["image_features"] = fixed[1]
    with pytest.raises(DataError, match="several files whose rows have no ids"):
        opened(folder)


def test_without_ids_rows_are_told_by_position(fixed, tmp_path, imported):
    (tmp_path / "train36_imgid2idx.json").unlink()
    np.testing.assert_array_equal(imported(fixed[0], "regions")[0], fixed[1])


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_of_ids_is_not_read(fixed, tmp_path, opened):
    (tmp_path / "train36_imgid2idx.json").unlink()
    (tmp_path / "train36_imgid2idx.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        DataError, match=r"its ids are in train36_imgid2idx.pkl, a pickle, .* write them as JSON beside"
    ):
        opened(fixed[0])


def test_the_pickle_of_a_file_is_named_after_it(fixed, tmp_path, opened):
    (tmp_path / "train36_imgid2idx.json").unlink()
    for name in ("train36", "val36"):
        (tmp_path / f"{name}_imgid2idx.pkl").write_bytes(b"")
    val = fixed[0].rename(tmp_path / "val36.hdf5")
    with pytest.raises(
        DataError,
        match=r"ids are in val36_imgid2idx.pkl, .*open\('val36_imgid2idx.pkl', .*open\('val36_imgid2idx.json', 'w'\)",
    ):
        opened(val)


def test_of_several_pickles_of_other_names_none_is_chosen(fixed, tmp_path, opened):
    (tmp_path / "train36_imgid2idx.json").unlink()
    for name in ("train36", "val36"):
        (tmp_path / f"{name}_imgid2idx.pkl").write_bytes(b"")
    with pytest.raises(
        DataError,
        match=r"never read: train36_imgid2idx.pkl, val36_imgid2idx.pkl; none is called all_imgid2idx.pkl. Write",
    ) as raised:
        opened(fixed[0].rename(tmp_path / "all.hdf5"))
    assert "python -c" not in str(raised.value)


def test_a_dataset_an_image_is_refused_in_few_words(tmp_path, opened):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number in range(1000):
            file[f"{number:04}_features"] = np.ones((3, 4), np.float32)
    with pytest.raises(
        DataError, match=r"0003_features \(3, 4\), 0004_features \(3, 4\), ... \(1000 in all\); expected"
    ):
        opened(tmp_path / "a.h5")


def test_rows_of_numbers_are_no_vectors(tmp_path, opened):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["pooled/values"], file["pooled/offsets"] = np.ones(7), np.array([0, 3, 7])
    with pytest.raises(
        DataError, match=r"pooled/values: found rows that are lists of numbers .*; only scores, labels, lemmas are such"
    ):
        opened(tmp_path / "a.h5")


def replace(name, values):
    def change(file):
        del file[name]
        if values is not None:
            file[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace("image_features", None),
            r"found the datasets image_bb \(7, 4, 4\), spatial_features .* expected image_f",
        ),
        (
            replace("image_features", np.ones((7, 16))),
            r"image_features has the shape \(7, 16\), .* there must be pos_boxes",
        ),
        (
            replace("spatial_features", np.ones((7, 3, 6))),
            r"spatial_features has the shape \(7, 3, 6\), expected \(7, 4, 6\)",
        ),
        (replace("image_features", np.ones((6, 4, 16))), "spatial_features has the shape"),
        (
            replace("image_features", np.ones((7, 4, 16), np.int32)),
            "found values of type int32, expected floating point",
        ),
        (lambda file: file.create_dataset("pos_boxes", data=[[0, 9]]), r"pos_boxes must be \(images, 2\), .* among 7"),
        (
            lambda file: file.create_dataset("pos_boxes", data=[[0, 7]]),
            r"has the shape \(7, 4, 16\), expected \(boxes, D\)",
        ),
        (lambda file: file.create_dataset("ids", data=["a", "b"]), "ids: found 2 ids for 7 rows"),
        (lambda file: file.create_dataset("ids", data=np.ones(7)), r"ids: found the id 1.0, expected text or a whole"),
    ],
)
def test_datasets_that_do_not_fit(fixed, opened, change, message):
    with h5py.File(fixed[0], "a") as file:
        change(file)
    with pytest.raises(DataError, match=message):
        opened(fixed[0])


def test_a_file_of_another_kind(tmp_path, opened):
    path = tmp_path / "a.h5"
    path.write_bytes(b"no hdf5" * 100)
    with pytest.raises(DataError, match="not an HDF5 file"):
        opened(path)


def test_captions_have_no_regions(fixed, opened):
    with pytest.raises(DataError, match="holds features of images' regions, expected features of captions"):
        opened(fixed[0], "text")


def test_a_group_without_offsets(tmp_path, opened):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["tokens/values"] = np.ones((4, 2))
    with pytest.raises(DataError, match="the group 'tokens' holds values, expected values and offsets"):
        opened(tmp_path / "a.h5")


def test_datasets_of_different_length(tmp_path, opened):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["pooled"], file["tokens"] = np.ones((4, 2)), np.ones((5, 2, 2))
    with pytest.raises(DataError, match=r"datasets of different length: \{'pooled': 4, 'tokens': 5\}"):
        opened(tmp_path / "a.h5")


def test_near_rows_are_read_together():
    rows = np.array([0, 1, 2, 9, 10, 40])
    assert list(blocks(rows, rows + 1, 0, 1)) == [(0, 3), (3, 5), (5, 6)]
    assert list(blocks(rows, rows + 1, 6, 1)) == [(0, 5), (5, 6)]
    assert list(blocks(rows, rows + 1, 100, 32 << 20)) == [(0, 2), (2, 3), (3, 5), (5, 6)]  # 64 MiB at most
