"""SCAN's folders: rows in the order of a split's images."""

import numpy as np
import pytest

from featurize.datasets.sample import DataError
from featurize.encoder import Output


@pytest.fixture
def scan(tmp_path, values, samples):
    """Five images of train, a row each; two of val, a row a caption; tokenised captions."""
    folder = tmp_path / "precomp"
    folder.mkdir()
    features = values(7, 3, 16)
    np.save(folder / "train_ims.npy", features[:5])
    np.save(folder / "dev_ims.npy", np.repeat(features[5:], 5, 0))
    for name, own in (("train", samples[:5]), ("dev", samples[5:])):
        captions = [caption.lower().replace(".", " .").replace(",", " ,") for s in own for caption in s.captions]
        (folder / f"{name}_caps.txt").write_text("".join(f"{caption}\n" for caption in captions))
    return folder, features


def test_rows_follow_the_split(scan, opened, imported):
    folder, features = scan
    assert opened(folder).card.outputs == (Output("regions", (3, 16)), Output("pooled", (16,)))
    regions, failed = imported(folder, "regions")
    assert failed == {}
    np.testing.assert_array_equal(regions, features)


def test_the_split_s_order_counts_not_the_data_set_s(scan, imported, samples):
    folder, features = scan
    mixed = [samples[5], *samples[:2], samples[6], *samples[2:5]]
    np.testing.assert_array_equal(imported(folder, "regions", of=mixed)[0], features[[5, 0, 1, 6, 2, 3, 4]])


def test_vectors_are_pooled(scan, opened):
    folder, features = scan
    np.save(folder / "train_ims.npy", features[:5, 0])
    np.save(folder / "dev_ims.npy", features[5:, 0])
    assert opened(folder).card.outputs == (Output("pooled", (16,)),)


def test_a_split_without_a_file_is_missing(scan, imported):
    folder, _ = scan
    for file in folder.glob("dev_*"):
        file.unlink()
    regions, failed = imported(folder, "regions")
    assert failed == {5: "no row in precomp", 6: "no row in precomp"}
    assert np.isnan(regions[6]).all()


def test_ids_of_the_split_s_images_outweigh_the_order(scan, imported):
    folder, features = scan
    (folder / "train_caps.txt").unlink()
    (folder / "train_ids.txt").write_text("".join(f"picture-{number}.jpg\n" for number in (4, 3, 2, 1, 0)))
    np.testing.assert_array_equal(imported(folder, "regions")[0], features[[4, 3, 2, 1, 0, 5, 6]])


def test_ids_of_another_numbering_do_not(scan, imported):
    folder, features = scan
    (folder / "train_ids.txt").write_text("".join(f"{number}\n" for number in (4, 3, 2, 1, 0)))
    np.testing.assert_array_equal(imported(folder, "regions")[0], features)


def test_ids_a_caption_row(scan, imported):
    folder, features = scan
    (folder / "dev_caps.txt").unlink()
    (folder / "dev_ids.txt").write_text("".join(f"picture-{number}\n" for number in (6, 5) for _ in range(5)))
    np.testing.assert_array_equal(imported(folder, "regions")[0][5:], features[[6, 5]])


def test_testall_is_test_where_its_size_fits(scan, imported, samples):
    from dataclasses import replace

    folder, features = scan
    as_test = [replace(sample, split="test") for sample in samples[:5]]
    for name, rows in (("test", slice(0, 2)), ("testall", slice(0, 5))):
        np.save(folder / f"{name}_ims.npy", features[rows])
    np.testing.assert_array_equal(imported(folder, "regions", of=as_test)[0], features[:5])


def test_captions_in_another_order_are_refused(scan, imported):
    folder, _ = scan
    lines = (folder / "train_caps.txt").read_text().splitlines(keepends=True)
    (folder / "train_caps.txt").write_text("".join(lines[:10] + lines[15:20] + lines[10:15] + lines[20:]))
    with pytest.raises(
        DataError,
        match=r"row 2 has the caption 'caption 0 , of image 3 .', but image 2 of split 'train', 'picture-2', has",
    ):
        imported(folder, "regions")


def test_repeated_rows_that_differ_are_refused(scan, imported):
    folder, features = scan
    rows = np.repeat(features[5:], 5, 0)
    rows[7] += 1
    np.save(folder / "dev_ims.npy", rows)
    with pytest.raises(
        DataError, match=r"row 5 of dev_ims.npy and row 7 of dev_ims.npy are of one image, but their 'regions'"
    ):
        imported(folder, "regions")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("train_ims.npy", 4, "4 rows beside 25 captions in train_caps.txt"),
        ("test_ims.npy", 3, "found files of the splits 'test', expected some of the data set's: 'train', 'val'"),
    ],
)
def test_sizes_that_do_not_fit(scan, imported, values, name, rows, message):
    folder, _ = scan
    if "test" in name:
        for file in folder.iterdir():
            file.unlink()
    np.save(folder / name, values(rows, 3, 16))
    with pytest.raises(DataError, match=message):
        imported(folder, "regions")


def test_a_split_of_another_size_is_refused(scan, imported, samples):
    with pytest.raises(
        DataError, match=r"found 5 in train_ims.npy, expected one file with the 4 images of split 'train'"
    ):
        imported(scan[0], "regions", of=samples[1:])


def test_ids_that_do_not_fit_the_rows(scan, opened):
    (scan[0] / "train_ids.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"5 rows beside 2 ids in train_ids.txt"):
        opened(scan[0])


def test_files_of_two_widths(scan, opened, values):
    np.save(scan[0] / "test_ims.npy", values(3, 3, 8))
    with pytest.raises(
        DataError, match=r"rows of different shapes: dev_ims.npy \(10, 3, 16\), test_ims.npy \(3, 3, 8\)"
    ):
        opened(scan[0])


def test_captions_are_not_in_it(scan, opened):
    with pytest.raises(DataError, match=r"_ims.npy files hold features of images, expected features of captions"):
        opened(scan[0], "text")
