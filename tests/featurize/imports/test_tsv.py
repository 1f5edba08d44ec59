"""Bottom-up attention's own files, written here as its authors' script writes them."""

import base64
import csv

import numpy as np
import pytest

from featurize.datasets.sample import DataError
from featurize.encoder import Output

FIELDS = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]


def write_tsv(path, rows):
    """Rows of (id, width, height, boxes (K, 4), features (K, D)) by csv.DictWriter, as in tools/generate_tsv.py."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, delimiter="\t", fieldnames=FIELDS)
        for name, width, height, boxes, features in rows:
            encoded = (base64.b64encode(np.ascontiguousarray(part)).decode() for part in (boxes, features))
            writer.writerow(dict(zip(FIELDS, (name, width, height, len(boxes), *encoded), strict=True)))
    return path


@pytest.fixture
def rows(values):
    """Three boxes in each of seven images, in another order than the data set's."""
    boxes = np.array([[0, 0, 40, 20], [10, 5, 20, 10], [30, 10, 40, 20]], np.float32)
    features = values(7, 3, 16)
    return [(f"picture-{number}", 40, 20, boxes, features[number]) for number in (4, 0, 6, 5, 1, 2, 3)]


def test_regions_boxes_and_their_mean(tmp_path, rows, opened, imported):
    path = write_tsv(tmp_path / "bua.tsv", rows)
    assert opened(path).card.outputs == (
        Output("regions", (3, 16)),
        Output("boxes", (3, 4)),
        Output("pooled", (16,)),
    )
    by_id = {row[0]: row[4] for row in rows}
    regions, failed = imported(path, "regions")
    assert failed == {}
    for number, found in enumerate(regions):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, by_id[f"picture-{number}"])
    boxes, _ = imported(path, "boxes")
    np.testing.assert_array_equal(boxes[2], [[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5], [0.75, 0.5, 1, 1]])
    pooled, _ = imported(path, "pooled")
    np.testing.assert_allclose(pooled[5], by_id["picture-5"].mean(0), rtol=1e-3)


def test_images_with_different_numbers_of_boxes_are_ragged(tmp_path, rows, opened, imported):
    cut = [(name, w, h, boxes[: 1 + at % 3], parts[: 1 + at % 3]) for at, (name, w, h, boxes, parts) in enumerate(rows)]
    path = write_tsv(tmp_path / "bua.tsv", cut)
    assert opened(path).card.outputs[0] == Output("regions", (16,), ragged=True)
    regions, _ = imported(path, "regions")
    assert [len(found) for found in regions] == [2, 2, 3, 1, 1, 1, 3]
    np.testing.assert_array_equal(regions[6], cut[2][4])


def test_coco_s_files_in_parts_are_one(tmp_path, rows, imported):
    folder = tmp_path / "karpathy"
    folder.mkdir()
    write_tsv(folder / "karpathy_train_resnet101_faster_rcnn_genome.tsv.0", rows[:3])
    write_tsv(folder / "karpathy_train_resnet101_faster_rcnn_genome.tsv.1", rows[3:5])
    write_tsv(folder / "karpathy_val_resnet101_faster_rcnn_genome.tsv", rows[5:])
    regions, failed = imported(folder, "regions")
    assert failed == {}
    np.testing.assert_array_equal(regions[3], rows[6][4])
    np.testing.assert_array_equal(regions[4], rows[0][4])


def test_parts_of_which_one_has_other_numbers_of_boxes_are_ragged_together(tmp_path, rows, opened, imported):
    folder = tmp_path / "parts"
    folder.mkdir()
    write_tsv(folder / "a.tsv", rows[:3])
    write_tsv(folder / "b.tsv", [(name, w, h, boxes[:2], parts[:2]) for name, w, h, boxes, parts in rows[3:]])
    assert opened(folder).card.outputs[0] == Output("regions", (16,), ragged=True)
    regions, _ = imported(folder, "regions")
    assert [len(found) for found in regions] == [3, 2, 2, 2, 3, 2, 3]


def test_parts_of_another_width_are_refused(tmp_path, rows, opened):
    folder = tmp_path / "parts"
    folder.mkdir()
    write_tsv(folder / "a.tsv", rows[:3])
    write_tsv(folder / "b.tsv", [(name, w, h, boxes, parts[:, :8]) for name, w, h, boxes, parts in rows[3:]])
    with pytest.raises(DataError, match=r"expected files of one layout, found regions \(3, 16\).*regions \(3, 8\)"):
        opened(folder)


def damaged(path, line, change):
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = change(lines[line - 1])
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (3, lambda text: text[:30] + "\n", "line 3: found 5 fields, expected 6"),
        (
            7,
            lambda text: text[:-20],
            "line 7: the base64 of 'features' has .* letters, which is not the 192 bytes of 3",
        ),
        (
            2,
            lambda text: text.replace("\t3\t", "\t4\t"),
            "line 2: the base64 of 'boxes' has 64 letters.*the 64 bytes of 4",
        ),
        (
            4,
            lambda text: text.replace("\t40\t", "\twide\t"),
            "line 4: image_w, image_h and num_boxes must be whole numb",
        ),
        (5, lambda text: text.replace("\t40\t", "\t0\t"), "line 5: found an image of 0 x 20 with 3 boxes"),
        (1, lambda text: text.rstrip()[:-4] + "****\n", "line 1: 'features' is not base64"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, rows, opened, line, change, message):
    path = write_tsv(tmp_path / "bua.tsv", rows)
    damaged(path, line, change)
    with pytest.raises(DataError, match=message):
        opened(path)


def test_letters_that_are_no_base64_are_named_when_they_are_read(tmp_path, rows, imported):
    path = write_tsv(tmp_path / "bua.tsv", rows)
    damaged(path, 6, lambda text: text.rstrip()[:-8] + "****" + text.rstrip()[-4:] + "\n")
    with pytest.raises(DataError, match="line 6: 'features' is not base64"):
        imported(path, "regions")


def test_a_file_without_boxes_is_refused(tmp_path, opened):
    none = np.empty((0, 4), np.float32)
    path = write_tsv(tmp_path / "bua.tsv", [("picture-0", 40, 20, none, none)])
    with pytest.raises(DataError, match="no line has boxes"):
        opened(path)


def test_an_image_without_boxes_among_others_has_no_pooled_vector(tmp_path, rows, imported):
    none = np.empty((0, 16), np.float32)
    path = write_tsv(tmp_path / "bua.tsv", [*rows[:6], (rows[6][0], 40, 20, none[:, :4], none)])
    pooled, failed = imported(path, "pooled")
    assert failed == {3: "row 6 ('picture-3') holds NaN"}
    assert np.isnan(pooled[3]).all()


def test_captions_have_no_regions(tmp_path, rows, opened):
    path = write_tsv(tmp_path / "bua.tsv", rows)
    with pytest.raises(DataError, match="holds features of images' regions, expected features of captions"):
        opened(path, "text")
