"""Rows that belong together, and what runs ask of the cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import train.batches
from featurize.manifest import CacheError
from featurize.texts.lexicon import lemma_id
from train.batches import FeatureReader, compares_captions, reads_labels, wanted_outputs
from train.config import (
    CenterConfig,
    HingeConfig,
    LocalLossConfig,
    MarginConfig,
    ObjectiveConfig,
    SettingsError,
    TowerConfig,
)
from train.schedule import Draw


def test_pairs_belong_together(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    captions = np.array([7, 3, 100])
    batch = reader.batch(Draw(captions, np.arange(3), np.array([1, 0, 1])))
    images = tiny_cache.dataset.caption_image[captions]
    both = [reader.images(images, np.full(3, view)).vectors for view in (0, 1)]
    torch.testing.assert_close(batch.image.vectors, torch.stack([both[1][0], both[0][1], both[1][2]]))
    assert batch.image.vectors.shape == (3, 28)
    assert batch.text.vectors.shape == (3, 16)
    assert batch.semantic.shape == (3, 0)


def test_an_image_with_several_captions_is_read_once(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    images, captions = reader.split("train")
    mine = [captions[reader.caption_image[captions] == image][:2] for image in images[[4, 2]]]
    batch = reader.batch(Draw(np.concatenate(mine), np.repeat([0, 1], list(map(len, mine))), np.array([0, 1])))
    assert len(batch.image.vectors) == 2
    expected = reader.images(images[[4, 2]], np.array([0, 1]))
    torch.testing.assert_close(batch.image.vectors, expected.vectors)
    assert batch.owner.tolist() == np.repeat([0, 1], list(map(len, mine))).tolist()


def test_every_tensor_of_a_batch_is_changed(tiny_cache, tiny_config):
    """As when it is pinned and sent to a GPU."""
    model = replace(
        tiny_config.model,
        image=TowerConfig(parts=("one.grid",)),
        text=TowerConfig(vectors=("sentence",), parts=("tokens",), bags=("lemmas",)),
    )
    reader = FeatureReader(tiny_cache.inputs(replace(tiny_config, model=model)))
    batch = reader.batch(Draw(np.arange(6), np.arange(6), np.zeros(6, np.int64)))
    moved = batch.map(lambda tensor: tensor.to("meta"))

    def tensors(one):
        groups = [(x.vectors, *x.parts, *x.masks, *x.bags, *x.bag_masks) for x in (one.image, one.text)]
        return [*groups[0], *groups[1], one.owner, one.semantic]

    assert [tensor.shape for tensor in tensors(moved)] == [tensor.shape for tensor in tensors(batch)]
    assert len(tensors(batch)) == 3 + 5 + 2
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}


def test_a_column_that_is_named_twice_is_read_once(tiny_cache, tiny_config):
    """Plainly, for every encoder that has such an output, and by its encoder."""
    tower = replace(tiny_config.model.image, vectors=("pooled", "one.pooled"))
    inputs = tiny_cache.inputs(replace(tiny_config, model=replace(tiny_config.model, image=tower)))
    assert inputs == tiny_cache.inputs(tiny_config)
    assert [len(views) for views in inputs.image_vectors] == [2, 2]


def test_identities_do_not_depend_on_how_an_encoder_is_typed(tiny_cache, tiny_config):
    inputs = tiny_cache.inputs(tiny_config)
    columns = [replace(column, encoder=f"other:{column.encoder}") for column in tiny_cache.columns]
    other = replace(tiny_cache, columns=columns).inputs(tiny_config)
    assert other != inputs
    assert other.identities() == inputs.identities()
    assert replace(inputs, text_vectors=()).identities() != inputs.identities()
    assert replace(inputs, precision="float32").identities() != replace(inputs, precision="bfloat16").identities()


def test_parts_come_with_masks(tiny_cache, tiny_config):
    model = replace(
        tiny_config.model,
        image=TowerConfig(vectors=(), parts=("one.grid",)),
        text=TowerConfig(vectors=("sentence",), parts=("tokens",)),
    )
    reader = FeatureReader(tiny_cache.inputs(replace(tiny_config, model=model)))
    batch = reader.batch(Draw(np.arange(6), np.arange(6), np.zeros(6, np.int64)))
    assert batch.image.vectors.shape == (6, 0)
    assert batch.image.parts[0].shape == (6, 5, 6)
    assert batch.image.masks[0].all()
    assert batch.text.masks[0].sum(1).tolist() == [1, 2, 3, 4, 5, 6]
    assert not batch.text.parts[0][~batch.text.masks[0]].any()
    assert reader.image_dims == (0, (6,))
    assert reader.text_dims == (16, (10,))


def test_bags_come_with_masks(tiny_cache, tiny_config):
    model = replace(tiny_config.model, text=TowerConfig(vectors=(), bags=("lemmas",)))
    reader = FeatureReader(tiny_cache.inputs(replace(tiny_config, model=model)))
    captions = tiny_cache.dataset.captions
    text = reader.batch(Draw(np.array([5, 0]), np.arange(2), np.zeros(2, np.int64))).text
    assert text.vectors.shape == (2, 0)
    assert text.parts == ()
    for row, ids, mask in zip([5, 0], text.bags[0], text.bag_masks[0], strict=True):
        assert ids[mask].tolist() == [lemma_id(word) for word in captions[row].split()]
    assert text.bags[0].dtype == torch.int64
    assert reader.text_dims == (0, ())


def test_vocabularies_are_of_the_split(tiny_cache, tiny_config):
    model = replace(tiny_config.model, text=TowerConfig(bags=("lemmas",)))
    reader = FeatureReader(tiny_cache.inputs(replace(tiny_config, model=model)))
    (vocabulary,) = reader.vocabularies("train", 5, 3)
    # Each of the 120 captions is "caption <k> of image <n>"; k = 0 in 48, 1 in 36.
    assert set(vocabulary.ids.tolist()) == {lemma_id(word) for word in ("caption", "of", "image", "0", "1")}
    assert sorted(vocabulary.idf.tolist())[:3] == [1, 1, 1]
    (rare,) = reader.vocabularies("train", 1000, 1)
    held = {lemma_id(word) for word in ("caption", "of", "image", *map(str, range(48)))}
    assert set(rare.ids.tolist()) == held
    assert FeatureReader(tiny_cache.inputs(tiny_config)).vocabularies("train", 5, 3) == ()


def test_labels_are_the_content_words_of_an_images_captions(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    labels, idf = reader.labels("train", 1000)
    words = ("caption", "image", *map(str, range(48)))  # "of" says nothing
    place = {word: k for k, word in enumerate(sorted(words, key=lemma_id))}
    assert labels.shape == (48, len(words))
    assert (labels.dtype, idf.dtype) == (torch.uint8, torch.float32)
    for image in range(48):
        said = {"caption", "image", str(image), *map(str, range(1 + image % 4))}
        assert labels[image, place["caption"]] == 1 + image % 4  # once in each
        assert labels[image].nonzero().flatten().tolist() == sorted(place[word] for word in said)
    assert idf[place["caption"]] == 1
    assert reader.labels("train", 3)[0].shape == (48, 3)


def test_labels_follow_the_rows_of_the_split(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    reader.missing = np.array([0, 50])  # undecoded
    images, _ = reader.split("val")
    labels, _ = reader.labels("val", 1000)
    assert labels.shape[0] == len(images) == 23
    # "caption" and "image" in all, then the image's own number and those of its captions: 48 + k has 1 + k % 4
    assert labels.count_nonzero(1).tolist() == [2 + 1 + 1 + image % 4 for image in images]


def test_labels_need_a_lexicon(tiny_cache, tiny_config):
    inputs = replace(tiny_cache.inputs(tiny_config), lemmas=None)
    with pytest.raises(
        SettingsError, match=r"this run reads none: add lexicon \(English\) or lexicon:LANGUAGE to --fea"
    ):
        FeatureReader(inputs).labels("train", 10)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (TowerConfig(vectors=(), bags=("tokens",)), r"words\.tokens holds vectors: a tower reads lemmas by its `bags`"),
        (
            TowerConfig(vectors=(), parts=("lemmas",)),
            r"lexicon-en\.lemmas holds lemma ids: .*everything else by `vectors",
        ),
        (TowerConfig(vectors=("lemmas",)), r"lexicon-en\.lemmas holds lemma ids"),
    ],
)
def test_words_and_vectors_are_not_mixed_up(tiny_cache, tiny_config, tower, message):
    config = replace(tiny_config, model=replace(tiny_config.model, text=tower))
    with pytest.raises(SettingsError, match=message):
        FeatureReader(tiny_cache.inputs(config))


def test_lists_of_numbers_are_no_vectors(tiny_cache, tiny_config, monkeypatch):
    """As a detector's scores are: how many there are differs from row to row."""
    monkeypatch.setattr(train.batches, "open_column", lambda *_: Numbers())
    for tower in (TowerConfig(vectors=("pooled",)), TowerConfig(vectors=(), parts=("pooled",))):
        config = replace(tiny_config, model=replace(tiny_config.model, image=tower))
        with pytest.raises(
            SettingsError, match=r"detector.scores has rows of shape \(L\): a tower reads one vector a row, \(D,\), by"
        ):
            FeatureReader(tiny_cache.inputs(config))


class Numbers:
    """A ragged column of single numbers."""

    name, ragged, shape, dtype = "detector.scores", True, (), np.dtype(np.float16)


def test_only_captions_have_words(tiny_config):
    model = replace(tiny_config.model, image=TowerConfig(bags=("lemmas",)))
    with pytest.raises(SettingsError, match=r"model.image.bags: found \('lemmas',\), expected none: only captions"):
        wanted_outputs(replace(tiny_config, model=model))


def test_an_image_tower_that_reads_nothing_is_refused(tiny_config):
    model = replace(tiny_config.model, image=TowerConfig(vectors=()))
    with pytest.raises(SettingsError, match=r"the image tower reads nothing: set model.image.vectors \(pooled\) or"):
        wanted_outputs(replace(tiny_config, model=model))


def test_losses_that_read_labels_want_lemmas(tiny_config):
    plain = tiny_config.objective
    assert not reads_labels(plain)
    assert not reads_labels(replace(plain, center=CenterConfig(weight=0.0, concept="lexical")))
    assert not reads_labels(replace(plain, center=CenterConfig(weight=1.0, concept="image")))
    for objective in (
        replace(plain, center=CenterConfig(weight=1.0, concept="lexical")),
        replace(plain, local=LocalLossConfig(weight=1.0)),
    ):
        assert reads_labels(objective)
        assert wanted_outputs(replace(tiny_config, objective=objective))[1] == ("sentence", "lemmas")
    text = TowerConfig(vectors=("sentence",), bags=("lemmas",))
    assert wanted_outputs(replace(tiny_config, model=replace(tiny_config.model, text=text)))[1] == (
        "sentence",
        "lemmas",
    )


def test_margins_that_compare_captions_read_sentences(tiny_cache, tiny_config):
    objective = ObjectiveConfig(hinge=HingeConfig(margin=MarginConfig(form="B")))
    config = replace(tiny_config, objective=objective)
    assert compares_captions(objective)
    assert not compares_captions(replace(objective, ranking="infonce"))
    batch = FeatureReader(tiny_cache.inputs(config)).batch(Draw(np.arange(4), np.arange(4), np.zeros(4, np.int64)))
    torch.testing.assert_close(batch.semantic.norm(dim=1), torch.ones(4), atol=2e-2, rtol=0)


def test_wanted_outputs_follow_the_towers(tiny_config):
    assert wanted_outputs(tiny_config) == (("pooled",), ("sentence",))
    model = replace(tiny_config.model, text=TowerConfig(vectors=(), parts=("tokens",)))
    objective = ObjectiveConfig(hinge=HingeConfig(margin=MarginConfig(form="C")))
    assert wanted_outputs(replace(tiny_config, model=model, objective=objective)) == (
        ("pooled",),
        ("tokens", "sentence"),
    )


def test_splits_hold_their_images_and_captions(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    images, captions = reader.split("val")
    assert images.tolist() == list(range(48, 72))
    assert set(reader.caption_image[captions]) == set(range(48, 72))
    with pytest.raises(CacheError, match=r"no images of split 'test'; found \['train', 'val'\]"):
        reader.split("test")
