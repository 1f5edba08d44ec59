"""The cross-attending host against SCAN's equations written as loops."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import train.hosts.scan as scan_module
from train.batches import Features
from train.config import LocalConfig, ModelConfig, ScanConfig, SettingsError, TowerConfig
from train.hosts import CrossAttentionHost, build_host
from train.towers import Dims

PARTS = Dims(0, (6,))
TOWER = TowerConfig(vectors=(), parts=("x",))
CONFIG = ModelConfig(host="scan", dim=8, scan=ScanConfig(words=5), image=TOWER, text=TOWER)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def features(rows, parts, real=None):
    real = real or [parts] * rows
    mask = torch.arange(parts) < torch.tensor(real)[:, None]
    return Features(torch.empty(rows, 0), (torch.randn(rows, parts, 6),), (mask,))


@torch.no_grad()
def by_loops(image, text, scan):
    """s of one image (K, D) and one caption (L, D), unit rows; SCAN, equations 1 to 9."""

    def attend(queries, keys):
        found = []
        for query in queries:
            scores = []
            for key in keys:
                length = math.sqrt(sum(max(0.0, float(key @ other)) ** 2 for other in queries) + 0.05**2)
                scores.append(scan.attention * max(0.0, float(key @ query)) / length)
            weights = torch.tensor(scores).softmax(0)
            attended = (weights[:, None] * keys).sum(0)
            found.append(float(query @ attended / attended.norm()))
        if scan.pooling == "mean":
            return sum(found) / len(found)
        total = sum(math.exp(scan.sharpness * value) for value in found) / len(found)
        return math.log(total) / scan.sharpness

    both = {"t2i": attend(text, image), "i2t": attend(image, text)}
    return both.get(scan.direction, (both["t2i"] + both["i2t"]) / 2)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("pooling", ["mean", "lse"])
def test_similarity_against_loops(direction, pooling):
    scan = replace(CONFIG.scan, direction=direction, pooling=pooling)
    model = build_host(replace(CONFIG, scan=scan), PARTS, PARTS)
    counts = [4, 2, 1]
    images, texts = model.embed_images(features(2, 3)), model.embed_texts(features(3, 4, counts))
    found = model.similarity(images, texts)
    for i in range(2):
        for j, count in enumerate(counts):
            expected = by_loops(images.parts[i], texts.parts[j, :count], scan)
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(model.distances(images, texts), 2 - 2 * found)
    assert found.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_blocks_of_captions_change_neither_distances_nor_gradients(direction, monkeypatch):
    model = build_host(replace(CONFIG, scan=replace(CONFIG.scan, direction=direction)), PARTS, PARTS)
    texts = features(7, 5, [5, 1, 3, 0, 4, 2, 5])
    gaps = texts.masks[0].clone()
    gaps[0, 1] = gaps[4, 0] = gaps[6, :4] = False  # as after erasing
    batch = features(3, 4), replace(texts, masks=(gaps,))

    def compared(numbers, kept):
        monkeypatch.setattr(scan_module, "_BLOCK", numbers)
        monkeypatch.setattr(scan_module, "_KEPT", kept)
        model.zero_grad()
        found = model.distances(model.embed_images(batch[0]), model.embed_texts(batch[1]))
        (found * torch.arange(1.0, 22.0).view(3, 7)).sum().backward()
        return found.detach(), [p.grad.clone() for p in model.parameters()]

    whole, expected = compared(10**9, 10**9)
    for numbers, kept in itertools.product((1, 2 * 3 * 4 * 5), (0, 10**9)):  # one caption, two captions
        found, gradients = compared(numbers, kept)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("words", [5, 3])
def test_what_a_block_needs_is_computed_again_and_not_kept(monkeypatch, words):
    """Padding does not count: captions of three words among five places are few numbers."""
    model = build_host(CONFIG, PARTS, PARTS)
    images, texts = model.embed_images(features(8, 9)), model.embed_texts(features(40, 5, [words] * 40))

    def kept(numbers):
        monkeypatch.setattr(scan_module, "_BLOCK", compared // 10)
        monkeypatch.setattr(scan_module, "_KEPT", numbers)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.distances(images, texts)
        return sizes

    compared = 8 * 9 * 40 * words
    assert max(kept(compared - 1)) < compared / 10
    assert sum(kept(compared)) > compared


@torch.no_grad()
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_no_more_is_compared_at_once_than_a_block_holds(direction, monkeypatch, largest):
    model = build_host(replace(CONFIG, scan=replace(CONFIG.scan, direction=direction)), PARTS, PARTS)
    images, texts = model.embed_images(features(8, 9)), model.embed_texts(features(40, 5))
    monkeypatch.setattr(scan_module, "_BLOCK", 3000)
    with largest:
        model.distances(images, texts)
    assert 8 * 9 * 5 * 5 < largest.elements <= 3000  # of 8 · 9 · 40 · 5


def test_captions_are_cut_and_padded_to_one_width():
    model = build_host(CONFIG, PARTS, PARTS)
    short, long = features(2, 3), features(2, 9)
    assert model.embed_texts(short).parts.shape == model.embed_texts(long).parts.shape == (2, 5, 8)
    cut = Features(long.vectors, (long.parts[0][:, :5],), (long.masks[0][:, :5],))
    torch.testing.assert_close(model.embed_texts(long).parts, model.embed_texts(cut).parts)


def test_an_empty_caption_is_like_nothing_and_gradients_stay_finite():
    model = build_host(CONFIG, PARTS, PARTS)
    images, texts = model.embed_images(features(2, 3)), model.embed_texts(features(2, 4, [0, 4]))
    distances = model.distances(images, texts)
    torch.testing.assert_close(distances[:, 0], torch.full((2,), 2.0))
    distances.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_learns():
    model = build_host(CONFIG, PARTS, PARTS)
    model.distances(model.embed_images(features(2, 3)), model.embed_texts(features(2, 4))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_guidance_is_the_mean_attention_of_the_pair():
    model = build_host(CONFIG, PARTS, PARTS)
    x, y = features(2, 3), features(2, 7, [7, 2])
    images, texts = model.image.encode(x, None), model.encode_texts(y)
    embedded = model.finish_images(images), model.finish_texts(texts)
    over_parts, over_words = model.guidance(images, texts, embedded)
    assert over_parts.shape == (2, 3)
    assert over_words.shape == (2, 5)  # the others are cut
    torch.testing.assert_close(over_parts.sum(1), torch.ones(2))
    torch.testing.assert_close(over_words.sum(1), torch.ones(2))
    assert over_words[1, 2:].abs().max() == 0  # padding
    i, words = 1, embedded[1].parts[1, :2]
    weights = []
    for word in words:
        scores = []
        for part in embedded[0].parts[i]:
            length = math.sqrt(sum(max(0.0, float(part @ other)) ** 2 for other in words) + 0.05**2)
            scores.append(9.0 * max(0.0, float(part @ word)) / length)
        weights.append(torch.tensor(scores).softmax(0))
    torch.testing.assert_close(over_parts[i], torch.stack(weights).mean(0), atol=1e-5, rtol=1e-5)


def test_views_are_looked_at_together():
    model = build_host(CONFIG, PARTS, PARTS)
    one, two = model.embed_images(features(2, 3)), model.embed_images(features(2, 3))
    assert model.mean_of_views([one, two]).parts.shape == (2, 6, 8)


@torch.no_grad()
def test_words_beyond_the_cut_change_nothing_about_erasing():
    model = build_host(CONFIG, PARTS, PARTS)
    x, long = features(3, 4), features(3, 9)
    cut = Features(long.vectors, (long.parts[0][:, :5],), (long.masks[0][:, :5],))
    _, _, erased = model(x, long, torch.arange(3), None, 1.0)
    _, _, expected = model(x, cut, torch.arange(3), None, 1.0)
    assert erased.text_kept.parts.shape == (3, 5, 8)
    assert (erased.image_kept.mask ^ erased.image_dropped.mask).all()
    assert torch.equal(erased.text_kept.mask, expected.text_kept.mask)
    assert torch.equal(erased.text_partial, expected.text_partial)
    assert torch.equal(erased.text_partial, erased.text_dropped.mask.any(1))


@torch.no_grad()
def test_padding_of_one_column_takes_no_words_from_another():
    """A caption's words of two encoders, alone and beside a longer caption that pads both columns."""
    model = build_host(CONFIG, PARTS, Dims(0, (6, 6)))
    words = torch.randn(2, 2, 6)
    alone = Features(torch.empty(1, 0), (words[:1], words[1:]), (torch.ones(1, 2, dtype=torch.bool),) * 2)
    columns = tuple(torch.cat((torch.zeros(1, 6, 6), torch.randn(1, 6, 6))) for _ in range(2))
    masks = torch.tensor([[True] * 2 + [False] * 4, [True] * 6])
    for column, own in zip(columns, words, strict=True):
        column[0, :2] = own
    beside = model.embed_texts(Features(torch.empty(2, 0), columns, (masks, masks)))
    expected = model.embed_texts(alone)
    assert expected.mask.sum() == 4
    assert torch.equal(beside.mask[:1], expected.mask)
    torch.testing.assert_close(beside.parts[:1], expected.parts)


@pytest.mark.parametrize(
    ("changes", "dims", "message"),
    [
        ({}, (Dims(4, (6,)), PARTS), "host scan compares parts and nothing else: set model.image.parts"),
        ({}, (PARTS, Dims(0, (6,), (9,))), "empty model.text.vectors and model.text.bags"),
        ({"local": LocalConfig(dim=4)}, (PARTS, PARTS), "no single vector to join a local space to"),
        ({"blocks": 2}, (PARTS, PARTS), r"found model\.blocks 2, .*; expected 1, False and True"),
        ({"shared_codebook": True}, (PARTS, PARTS), r"pools none: found .* model\.shared_codebook True"),
        ({"normalise": False}, (PARTS, PARTS), r"compares unit parts .* model\.normalise False"),
        ({"scan": ScanConfig(words=0)}, (PARTS, PARTS), "words 0; expected all above 0"),
    ],
)
def test_settings_without_meaning_are_refused(changes, dims, message):
    with pytest.raises(SettingsError, match=message):
        CrossAttentionHost(replace(CONFIG, **changes), *dims)


def test_there_is_no_vector_to_index():
    with pytest.raises(SettingsError, match=r"no vector to index or to search; take a run whose model\.host is vse"):
        build_host(CONFIG, PARTS, PARTS).require_index()
