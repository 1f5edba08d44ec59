"""Ranks under a host that compares parts: equal to those of vectors where both can be had, at every tile size."""

import pytest
import torch

from evaluate.compare import rank_compared
from evaluate.protocols import evaluate_full, evaluate_host, rank_vectors
from evaluate.ranks import EvaluationError
from train.config import ModelConfig, TowerConfig
from train.embeddings import Embeddings
from train.hosts import build_host
from train.losses.distances import squared_distances
from train.towers import Dims

OWNER = torch.tensor([0, 3, 1, 1, 2, 0, 4, 4, 4, 3, 2])


def vectors(rows, seed):
    made = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Embeddings.of(torch.nn.functional.normalize(made, dim=1))


def by_vector(image, text):
    return squared_distances(image.vector, text.vector)


@pytest.mark.parametrize("tile", [1, 2, 3, 100])
def test_the_same_ranks_as_of_vectors(tile):
    images, captions = vectors(5, 0), vectors(len(OWNER), 1)
    found = rank_compared(images, captions, OWNER, tile, distances=by_vector)
    expected = rank_vectors(images.vector, captions.vector, OWNER, 100)
    for one, other in zip(found, expected, strict=True):
        assert one.values.tolist() == other.values.tolist()
        assert one.indptr.tolist() == other.indptr.tolist()
        torch.testing.assert_close(one.tied, other.tied)


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_ties_count_against_the_model(tile):
    images, captions = vectors(1, 0), vectors(1, 1)
    images, captions = images[torch.zeros(5).long()], captions[torch.zeros(len(OWNER)).long()]
    to_text, to_image = rank_compared(images, captions, OWNER, tile, distances=by_vector)
    assert to_text.best().tolist() == [1 + len(OWNER) - int(n) for n in OWNER.bincount()]
    assert to_image.values.tolist() == [5] * len(OWNER)
    torch.testing.assert_close(to_image.tied, torch.ones(len(OWNER), dtype=torch.float64))


def test_distances_that_are_not_numbers_are_refused():
    with pytest.raises(EvaluationError, match="NaN or infinite, which have no rank"):
        rank_compared(
            vectors(5, 0), vectors(len(OWNER), 1), OWNER, 4, distances=lambda i, t: by_vector(i, t) * torch.nan
        )


@pytest.mark.parametrize("tile", [0, -1])
def test_a_tile_that_holds_nothing_is_refused(tile):
    with pytest.raises(EvaluationError, match=f"tile: expected at least 1, found {tile}"):
        rank_compared(vectors(5, 0), vectors(len(OWNER), 1), OWNER, tile, distances=by_vector)


def comparing():
    """A host that compares parts."""
    tower = TowerConfig(vectors=(), parts=("x",))
    return build_host(ModelConfig(host="scan", dim=8, image=tower, text=tower), Dims(0, (6,)), Dims(0, (6,)))


def parts(images, captions):
    """Embeddings of images with three parts and of captions with four, of 8 dimensions each."""
    generator = torch.Generator().manual_seed(0)
    for rows, count in ((images, 3), (captions, 4)):
        unit = torch.nn.functional.normalize(torch.randn(rows, count, 8, generator=generator), dim=2)
        none = torch.empty(rows, 0)
        yield Embeddings(none, none, unit, torch.ones(rows, count, dtype=torch.bool))


def test_a_host_is_measured_by_its_parts():
    model = comparing()
    images, captions = parts(5, len(OWNER))
    report = evaluate_host(model, images, captions, OWNER, split="val", protocol="full", tile=2)
    distances = model.distances(images, captions)
    by_hand = [1 + int((row < row[owner]).sum()) for row, owner in zip(distances.T, OWNER, strict=True)]
    assert report.t2i.r1 == pytest.approx(100 * sum(rank == 1 for rank in by_hand) / len(OWNER))
    assert report.t2i.meanr == pytest.approx(sum(by_hand) / len(OWNER))


def test_memory_does_not_grow_with_images_times_captions(largest):
    model, owner = comparing(), torch.arange(300) % 150
    images, captions = parts(150, 300)
    with largest:
        evaluate_host(model, images, captions, owner, split="val", protocol="full", tile=16)
    # The captions' own numbers; a tile compares 16 · 3 · 16 · 4, all pairs at once would be 150 · 3 · 300 · 4.
    assert largest.elements <= 300 * 4 * 8


def test_no_more_than_128_rows_are_compared_at_once_whatever_the_tile():
    model, owner, sizes = comparing(), torch.arange(300) % 150, []
    images, captions = parts(150, 300)
    distances = model.distances

    def counted(one, other):
        sizes.append((len(one), len(other)))
        return distances(one, other)

    model.distances = counted
    evaluate_host(model, images, captions, owner, split="val", protocol="full", tile=4096)
    assert max(sizes) == (128, 128)
    assert max(count for _, count in sizes) == 128


def test_a_host_is_measured_by_its_vectors():
    model = build_host(ModelConfig(dim=6), Dims(8), Dims(8))
    images, captions = vectors(5, 0), vectors(len(OWNER), 1)
    report = evaluate_host(model, images, captions, OWNER, split="val", protocol="full", tile=3)
    assert report == evaluate_full(images.vector, captions.vector, OWNER, split="val")
