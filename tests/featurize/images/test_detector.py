"""Which boxes are kept and in what order, and what a box reads of a map."""

import pytest
import torch

from featurize.images.detector import COCO_CLASSES, Boxes, align


def boxes(*rows):
    """Rows of (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].int())


def test_the_best_come_first_and_no_more_than_asked_for():
    found = boxes((0, 0, 0.5, 1, 0.3, 2), (0, 0, 0.7, 1, 0.9, 1), (0, 0, 0.6, 1, 0.5, 3))
    kept = found.best(2, 0.2)
    assert kept.labels.tolist() == [1, 3]
    torch.testing.assert_close(kept.scores, torch.tensor([0.9, 0.5]))
    torch.testing.assert_close(kept.places[:, 2], torch.tensor([0.7, 0.6]))
    assert found.best(5, 0.4).labels.tolist() == [1, 3]


def test_a_box_of_exactly_the_score_stays():
    assert boxes((0, 0, 1, 1, 0.5, 7), (0, 0, 1, 1, 0.49, 8)).best(9, 0.5).labels.tolist() == [7]


def test_ties_are_broken_by_class_and_corners_whatever_the_order():
    rows = [
        (0.1, 0.0, 0.5, 0.5, 0.5, 1),
        (0.1, 0.2, 0.5, 0.5, 0.5, 1),
        (0.1, 0.2, 0.6, 0.5, 0.5, 1),
        (0.1, 0.2, 0.6, 0.7, 0.5, 1),
        (0.3, 0.0, 0.5, 0.5, 0.5, 1),
        (0.0, 0.0, 0.5, 0.5, 0.5, 2),
    ]
    expected = torch.tensor(rows)
    for seed in range(5):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        kept = boxes(*(rows[place] for place in order)).best(6, 0.0)
        assert torch.equal(kept.places, expected[:, :4])
        assert kept.labels.tolist() == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "found",
    [
        Boxes(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int32)),
        boxes((0, 0, 0.5, 0.5, 0.1, 4)),
        boxes((0.3, 0, 0.3, 0.5, 0.9, 4), (0, 0.6, 0.3, 0.5, 0.9, 4)),  # without an area
    ],
)
def test_nothing_found_is_the_whole_picture(found):
    kept = found.best(3, 0.2)
    assert kept.places.tolist() == [[0, 0, 1, 1]]
    assert (kept.scores.tolist(), kept.labels.tolist(), kept.labels.dtype) == ([0], [0], torch.int32)


def test_a_box_reads_the_mean_of_what_it_covers():
    # Cell (row, column) holds its centre's x and y in [0, 1]: the mean over a box is the box's own centre.
    side = 10
    centres = (torch.arange(side) + 0.5) / side
    plane = torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])
    maps = torch.stack([plane, 2 * plane])
    places = [torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.4, 0.3, 0.46, 0.37]])]
    first, second = align(maps, places)
    torch.testing.assert_close(first[0], torch.tensor([0.3, 0.55]), atol=1e-5, rtol=0)
    torch.testing.assert_close(first[1], torch.tensor([0.5, 0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(second, 2 * torch.tensor([[0.43, 0.335]]), atol=1e-5, rtol=0)


def test_an_oblong_map_is_read_in_its_own_proportions():
    plane = ((torch.arange(8) + 0.5) / 8).expand(1, 1, 4, 8)
    torch.testing.assert_close(align(plane, [torch.tensor([[0.25, 0.25, 0.5, 0.75]])])[0], torch.tensor([[0.375]]))


def test_the_names_are_cocos():
    # Ids of the published label map (mscoco_label_map.pbtxt).
    assert len(COCO_CLASSES) == 91
    assert [COCO_CLASSES[number] for number in (1, 3, 18, 90)] == ["person", "car", "dog", "toothbrush"]
