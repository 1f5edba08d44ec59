"""Protocols: both directions of ragged splits against plain sorting, COCO's folds, errors that name the row."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from evaluate.protocols import evaluate_coco, evaluate_full, rank_against
from evaluate.ranks import EvaluationError


def split_of(images, seed, *, noise):
    """A split with one caption for each image and three for each seventh, captions in no order."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(images), 1 + 2 * (np.arange(images) % 7 == 0)))
    pictures = rng.normal(size=(images, 6)).astype(np.float32)
    texts = (pictures[owner] + noise * rng.normal(size=(len(owner), 6))).astype(np.float32)
    return pictures, texts, owner


def recalls_by_sorting(pictures, texts, owner):
    """R@1, R@5, R@10 of both directions by sorting scipy's distances."""
    distances = cdist(pictures.astype(np.float64), texts.astype(np.float64), "sqeuclidean")
    to_text = owner[distances.argsort(axis=1)] == np.arange(len(pictures))[:, None]
    to_image = distances.T.argsort(axis=1) == owner[:, None]
    return [100 * hits[:, :k].any(axis=1).mean() for hits in (to_text, to_image) for k in (1, 5, 10)]


def recalls(report):
    return [value for m in (report.i2t, report.t2i) for value in (m.r1, m.r5, m.r10)]


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("tile", [17, 1024])
def test_full_equals_sorting(tile):
    split = split_of(80, 0, noise=0.8)
    report = evaluate_full(*tensors(*split), split="val", tile=tile)
    expected = recalls_by_sorting(*split)
    assert (report.split, report.protocol, report.folds_1k) == ("val", "full", None)
    assert 10 < expected[0] < 90  # neither perfect nor lost
    assert recalls(report) == pytest.approx(expected)
    assert report.rsum == pytest.approx(sum(expected))


def test_items_may_be_found_under_other_vectors_than_they_ask_with():
    pictures, texts, owner = split_of(40, 4, noise=0.8)
    found_pictures, found_texts = pictures[::-1].copy() * 0.9 + 0.1 * pictures, texts + 0.2
    queries, galleries = tensors(pictures, texts), tensors(found_pictures, found_texts)
    to_text, to_image = rank_against(tuple(queries), tuple(galleries), torch.from_numpy(owner), 7)
    assert to_text.best().tolist() == nearest_own(pictures, found_texts, np.arange(40)[:, None] == owner)
    assert to_image.best().tolist() == nearest_own(texts, found_pictures, owner[:, None] == np.arange(40))


def nearest_own(queries, items, own):
    """Place of each query's nearest relevant item by sorting scipy's distances, from 1."""
    order = cdist(queries.astype(np.float64), items.astype(np.float64), "sqeuclidean").argsort(axis=1)
    return (1 + np.take_along_axis(own, order, axis=1).argmax(axis=1)).tolist()


def test_two_images_with_ragged_captions_by_hand():
    # Captions 0, 2, 3 belong to image 1 (at 10), caption 1 to image 0 (at 0).
    images = torch.tensor([[0.0], [10.0]])
    captions = torch.tensor([[9.0], [4.0], [1.0], [6.0]])
    report = evaluate_full(images, captions, torch.tensor([1, 0, 1, 1]), split="val")
    # Image 0 meets captions 2, 1, 3, 0: its own is second. Image 1 meets 0, 3, 1, 2: hits at 1, 2 and 4.
    assert report.i2t.r1 == 50
    assert report.i2t.meanr == 1.5
    assert report.i2t.map_r == pytest.approx(100 * (0 + 2 / 3) / 2)
    assert report.i2t.r_precision == pytest.approx(100 * (0 + 2 / 3) / 2)
    # Captions 0, 1 and 3 are nearest to their images, caption 2 is not.
    assert report.t2i.r1 == 75
    assert report.t2i.meanr == 1.25


def test_coco_is_the_5k_and_the_mean_of_five_folds():
    split = split_of(5000, 1, noise=0.3)
    pictures, texts, owner = split
    report = evaluate_coco(*tensors(*split), split="test", tile=512)
    assert (report.protocol, report.folds_1k.protocol, report.folds_1k.split) == ("coco_5k", "coco_1k", "test")
    whole = evaluate_full(*tensors(*split), split="test")
    assert (report.i2t, report.t2i) == (whole.i2t, whole.t2i)
    folds = []
    for fold in range(5):
        rows = [row for row, image in enumerate(owner) if image // 1000 == fold]
        folds.append(recalls_by_sorting(pictures[fold * 1000 : (fold + 1) * 1000], texts[rows], owner[rows] % 1000))
    assert recalls(report.folds_1k) == pytest.approx(np.mean(folds, axis=0))
    assert report.folds_1k.rsum > report.rsum


def test_coco_needs_5000_images():
    split = tensors(*split_of(1000, 2, noise=0.3))
    with pytest.raises(EvaluationError, match=r"needs the 5000 images .*, found 1000; measure with the protocol full"):
        evaluate_coco(*split, split="test")


@pytest.mark.parametrize(("which", "name"), [(0, "images"), (1, "captions")])
def test_a_row_with_nan_is_named(which, name):
    split = tensors(*split_of(9, 3, noise=0.3))
    split[which][4, 2] = torch.nan
    with pytest.raises(EvaluationError, match=rf"{name} row 4 holds NaN or infinity"):
        evaluate_full(*split, split="val")


def test_captions_need_an_image_each():
    images, captions, owner = tensors(*split_of(9, 3, noise=0.3))
    with pytest.raises(EvaluationError, match=rf"one image row for each of {len(owner)} captions"):
        evaluate_full(images, captions, owner[:-1], split="val")
    with pytest.raises(EvaluationError, match=r"image row 9 has no caption"):
        evaluate_full(torch.cat([images, images[:1]]), captions, owner, split="val")
