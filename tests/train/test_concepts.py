"""Concepts by hand, against a nearest-centre loop, and what is refused."""

import numpy as np
import pytest

from train.concepts import cluster_concepts, image_concepts, lexical_concepts
from train.config import CenterConfig


def unwanted():
    raise AssertionError("read without need")


def around(directions, each, seed=0):
    """Captions near some directions, five for each image, images dealt to directions in turn."""
    rng = np.random.default_rng(seed)
    images = each * len(directions)
    caption_image = rng.permutation(np.repeat(np.arange(images), 5))
    centres = np.asarray(directions, np.float32)[caption_image % len(directions)]
    return centres + 0.05 * rng.normal(size=centres.shape).astype(np.float32), caption_image, images


def same_parts(a, b):
    """Whether two numberings divide the images alike."""
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def test_images_are_their_own_concepts_by_default():
    found, count = image_concepts(CenterConfig(), 4, unwanted, unwanted)
    assert found.tolist() == [0, 1, 2, 3]
    assert (found.dtype, count) == (np.int64, 4)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_the_directions_that_captions_point_in(seed):
    sentences, caption_image, images = around(np.eye(4, 6), 7)
    found = cluster_concepts(sentences, caption_image, images, 4, seed)
    assert same_parts(found, np.arange(images) % 4)
    assert found.dtype == np.int64


def test_an_image_lies_in_the_cluster_of_its_mean_caption_whatever_its_length():
    """Image 0 says x twice and y once, image 1 only y, briefly; the others are clear."""
    sentences = np.array([[1, 0], [1, 0], [0, 1], [0, 0.1], [1, 0.01], [0.01, 1]], np.float16)
    found = cluster_concepts(sentences, np.array([0, 0, 0, 1, 2, 3]), 4, 2)
    assert found[0] == found[2] != found[1] == found[3]


def test_clusters_depend_on_the_seed_alone():
    rng = np.random.default_rng(1)
    sentences, caption_image = rng.normal(size=(300, 5)), np.repeat(np.arange(60), 5)
    first = cluster_concepts(sentences, caption_image, 60, 12, seed=3)
    assert np.array_equal(first, cluster_concepts(sentences, caption_image, 60, 12, seed=3))
    assert not same_parts(first, cluster_concepts(sentences, caption_image, 60, 12, seed=4))


def test_images_that_k_means_has_not_seen_have_clusters_too(monkeypatch):
    """Six of 28 images for k-means, tiles of three: the same clusters, as the directions are clear."""
    monkeypatch.setattr("train.concepts.POINTS_PER_CLUSTER", 3)
    monkeypatch.setattr("train.concepts.TILE", 3)
    sentences, caption_image, images = around([[1, 0, 0], [0, 1, 0]], 14)
    assert same_parts(cluster_concepts(sentences, caption_image, images, 2, seed=1), np.arange(images) % 2)


def test_clusters_without_images_leave_no_gap():
    """Three images, two of them alike: of three clusters one stays empty."""
    found = cluster_concepts(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), np.arange(3), 3, 3)
    assert sorted(set(found.tolist())) == [0, 1]
    assert found[1] == found[2] != found[0]


def test_an_image_without_captions_has_a_concept():
    found = cluster_concepts(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 2]), 3, 2)
    assert found.shape == (3,)
    assert found[0] != found[2]


@pytest.mark.parametrize("clusters", [0, 4])
def test_more_clusters_than_images_or_none_are_refused(clusters):
    with pytest.raises(ValueError, match=rf"found {clusters} clusters for 3 .*center\.concepts to 1 to 3"):
        cluster_concepts(np.eye(3), np.arange(3), 3, clusters)


def test_the_most_telling_word_is_the_concept():
    """idf 1, 3, 2, so of the words used: 1 (3 beats 1), 2 (2 beats 1), 1, 0."""
    labels = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]], np.uint8)
    assert lexical_concepts(labels, np.array([1.0, 3.0, 2.0])).tolist() == [1, 2, 1, 0]


def test_how_often_a_word_is_used_counts():
    """5 · 1 against 1 · 3."""
    assert lexical_concepts(np.array([[5, 1], [1, 1]], np.uint8), np.array([1.0, 3.0])).tolist() == [0, 1]


def test_equals_a_loop_over_tf_idf():
    rng = np.random.default_rng(0)
    labels, idf = rng.integers(0, 6, (40, 15)).astype(np.uint8), rng.uniform(1, 6, 15)
    labels[:, 3] = 0  # a word that nobody uses leaves no gap
    best = [max(range(15), key=lambda v, row=row: row[v] * idf[v]) for row in labels.tolist()]
    numbers = {word: number for number, word in enumerate(sorted(set(best)))}
    assert lexical_concepts(labels, idf).tolist() == [numbers[word] for word in best]


def test_among_equals_the_first_word_and_images_without_words_stay_alone():
    labels = np.array([[0, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]], np.uint8)
    found = lexical_concepts(labels, np.ones(3))
    assert found.tolist() == [0, 1, 0, 2]
    assert found.dtype == np.int64


@pytest.mark.parametrize("kind", ["cluster", "lexical"])
def test_only_what_the_kind_needs_is_read(kind):
    sentences, caption_image, images = around(np.eye(3), 4)
    labels, idf = np.eye(3, dtype=np.uint8)[np.arange(images) % 3], np.ones(3)
    found, count = image_concepts(
        CenterConfig(weight=1.0, concept=kind, concepts=3),
        images,
        unwanted if kind == "lexical" else lambda: (sentences, caption_image),
        unwanted if kind == "cluster" else lambda: (labels, idf),
        seed=1,
    )
    assert count == 3
    assert same_parts(found, np.arange(images) % 3)
