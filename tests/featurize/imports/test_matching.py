"""Whose a row is: by id, file name or COCO's number, and never by guess."""

from pathlib import Path

import pytest

from featurize.datasets.sample import DataError, Sample
from featurize.imports.matching import locate
from featurize.imports.source import ById, InOrder, Part

NONE_LOST = frozenset()


def images(*ids):
    return [Sample(name, "", ("one", "two"), "train") for name in ids]


def find(ids, *wanted, path="f.h5", **options):
    return locate(ById(ids, **options), images(*wanted), NONE_LOST, "image", path)


def find_captions(ids, *wanted, lost=NONE_LOST, **options):
    return locate(ById(ids, **options), images(*wanted), lost, "text", "f.h5")


@pytest.mark.parametrize(
    ("ids", "wanted", "places"),
    [
        (["b", "a", "c"], ["a", "b"], [(1,), (0,)]),
        (["x/b.jpg", "x/a.JPEG"], ["a", "b"], [(1,), (0,)]),
        (["b", "a"], ["y/a.png", "y/b.png"], [(1,), (0,)]),
        (["42", "7"], ["COCO_val2014_000000000042", "COCO_train2014_000000000007.jpg"], [(0,), (1,)]),
        (["val2014/COCO_val2014_000000000042.jpg", "000000000007.jpg"], ["7", "42"], [(1,), (0,)]),
        (["a.b", "a.c"], ["a.c", "a.b"], [(1,), (0,)]),
        (["a"], ["a", "gone"], [(0,), ()]),
    ],
)
def test_images_are_found(ids, wanted, places):
    assert find(ids, *wanted) == places


def test_one_way_holds_for_all():
    """An id that is there as it is makes names in other folders no match."""
    assert find(["a", "x/b"], "a", "b") == [(0,), ()]


def test_copies_are_all_named():
    assert find(["a", "b", "a"], "a", "b", repeated=True) == [(0, 2), (1,)]


def test_nothing_in_common_shows_both_sides():
    with pytest.raises(
        DataError,
        match=r"f.h5: none of its 4 ids is an image .* has 'p', 'q', 'r', ...; the data set has 'a', 'b'. Give",
    ):
        find(["p", "q", "r", "s"], "a", "b")


def test_two_rows_of_one_id():
    with pytest.raises(DataError, match=r"f.h5: the id 'b' has two rows, 1 and 3; expected one row an id"):
        find(["a", "b", "c", "b"], "a", "b")


@pytest.mark.parametrize(
    ("ids", "wanted", "message"),
    [
        (["x/a.jpg", "y/a.jpg"], ["a"], "found by their file name only, and in f.h5 'a' is 'x/a.jpg' and 'y/a.jpg'"),
        (["a"], ["x/a.jpg", "y/a.jpg"], "in the data set 'a' is 'x/a.jpg' and 'y/a.jpg'"),
        (
            ["COCO_train2014_000000000007", "COCO_val2014_000000000007"],
            ["7"],
            "by their COCO number only, and in f.h5 '7' is 'COCO_train",
        ),
    ],
)
def test_two_things_of_one_name_are_refused(ids, wanted, message):
    with pytest.raises(DataError, match=message):
        find(ids, *wanted)


def test_a_name_that_nobody_asks_for_may_be_double():
    assert find(["x/a.jpg", "y/b.jpg", "z/b.jpg"], "a") == [(0,)]


def test_numbers_inside_other_names_are_not_coco_s():
    with pytest.raises(DataError, match="none of its 1 ids"):
        find(["img_7"], "7")


def test_captions_by_image_and_number():
    ids = ["a.jpg#1", "a.jpg#0", "b.jpg#0", "b.jpg#1"]
    assert find_captions(ids, "a", "b") == [(1,), (0,), (2,), (3,)]


def test_a_row_without_a_number_is_the_first_caption():
    one = [Sample(name, "", ("one",), "train") for name in ("a", "b")]
    assert locate(ById(["b", "a"]), one, NONE_LOST, "text", "f.h5") == [(1,), (0,)]


def test_every_caption_must_be_there():
    with pytest.raises(DataError, match=r"2 of 4 captions have no row: 'a#1', 'b#1'; the file has 'a#0', 'b#0'"):
        find_captions(["a#0", "b#0"], "a", "b")


def test_captions_that_moved_are_not_told_by_number():
    with pytest.raises(DataError, match="captions of 'a' were left out of the data set, which moved the numbers"):
        find_captions(["a#0", "a#1"], "a", lost=frozenset({"a"}))


def test_captions_by_their_text():
    assert find_captions(["a", "a", "b", "b"], "a", "b", captions=["two ", "one", "one", "two"]) == [
        (1,),
        (0,),
        (2,),
        (3,),
    ]


def test_what_was_left_out_is_said_where_counts_differ():
    part = InOrder((Part(Path("f.npy"), "", 0, 3),))
    with pytest.raises(DataError, match=r"found 3 rows .* set's 2 images, .* 1 images lost captions or were left out"):
        locate(part, images("a", "b"), frozenset({"c"}), "image", "f.npy")
