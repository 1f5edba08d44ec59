"""Local loss against a loop, closed forms, and its properties."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from train.config import LocalLossConfig
from train.losses.local import LocalLoss

CONFIG = LocalLossConfig(weight=1.0, tau=0.5, tau_labels=0.3, labels_weight=0.7)
IDF = torch.tensor([1.0, 3.0, 2.0, 1.5, 4.0])


def build(config=CONFIG, dim=8):
    torch.manual_seed(4)
    loss = LocalLoss(config, dim, 5)
    loss.fit(IDF)
    return loss


@pytest.fixture
def labels():
    """Seven pairs of four images, as `image_ids`: pairs 0, 2, 6 and 1, 4 have the same words; pair 3 has none."""
    words = {5: [1, 1, 0, 0, 1], 2: [0, 1, 1, 0, 0], 0: [0, 0, 0, 0, 0], 1: [1, 0, 0, 1, 1]}
    return torch.tensor([words[image] for image in (5, 2, 5, 0, 2, 1, 5)], dtype=torch.uint8)


def slow_jaccard(a, b):
    both = sum(w for w, x, y in zip(IDF.tolist(), a, b, strict=True) if x and y)
    either = sum(w for w, x, y in zip(IDF.tolist(), a, b, strict=True) if x or y)
    return both / either if either else 0.0


def softmax(scores):
    exponents = [math.exp(s) for s in scores]
    return [e / sum(exponents) for e in exponents]


def slow_similarity(image, text, labels, config):
    """KL divergences entry by entry, both directions."""
    size, total = len(image), 0.0
    for left, right in ((image, text), (text, image)):
        for i in range(size):
            same = [1.0 if i == j else slow_jaccard(labels[i], labels[j]) for j in range(size)]
            target = softmax([r / config.tau_labels for r in same])
            found = softmax(
                [sum(a * b for a, b in zip(left[i], right[j], strict=True)) / config.tau for j in range(size)]
            )
            total += sum(p * math.log(p / q) for p, q in zip(target, found, strict=True))
    return total / (2 * size)


def slow_words(loss, image, text, labels):
    """Cross-entropy of each word of each embedding."""
    weights, biases, total = loss.words.weight.tolist(), loss.words.bias.tolist(), 0.0
    for rows in (image, text):
        for row, used in zip(rows, labels, strict=True):
            for weight, bias, y in zip(weights, biases, used, strict=True):
                chance = 1 / (1 + math.exp(-bias - sum(w * x for w, x in zip(weight, row, strict=True))))
                total -= math.log(chance if y else 1 - chance)
    return total / (2 * len(labels) * len(IDF))


def test_equals_a_loop(embeddings, labels, image_ids):
    loss, (image, text) = build(), embeddings(kind="unit")
    total, logs = loss(image, text, labels, image_ids)
    similarity = slow_similarity(image.tolist(), text.tolist(), labels.tolist(), CONFIG)
    words = slow_words(loss, image.tolist(), text.tolist(), labels.tolist())
    assert logs["similarity"].item() == pytest.approx(similarity, rel=1e-4)
    assert logs["words"].item() == pytest.approx(words, rel=1e-5)
    assert total.item() == pytest.approx(similarity + 0.7 * words, rel=1e-4)
    assert not any(value.requires_grad for value in logs.values())


def test_of_two_pairs_by_hand():
    """Words in common: idf 3 of 1 + 3 + 2, r = ½, at tau' = ½ weights e² and e; all embeddings alike, so halves."""
    loss = build(replace(CONFIG, tau_labels=0.5, labels_weight=0.0))
    labels = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.uint8)
    same = torch.ones(2, 8) / math.sqrt(8)
    p = math.e / (math.e + 1)
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert loss(same, same, labels, torch.arange(2))[0].item() == pytest.approx(expected, rel=1e-5)


def test_pairs_of_one_image_are_alike_though_it_has_no_words():
    """Three pairs without words, two of one image: r is 1, 1, 0; at tau' = 1 weights e, e, 1; embeddings alike."""
    loss = build(replace(CONFIG, tau_labels=1.0, labels_weight=0.0))
    labels, same = torch.zeros(3, 5, dtype=torch.uint8), torch.ones(3, 8) / math.sqrt(8)
    rows = [[math.e, math.e, 1.0], [math.e, math.e, 1.0], [1.0, 1.0, math.e]]
    expected = sum(w / sum(row) * math.log(3 * w / sum(row)) for row in rows for w in row) / 3
    assert loss(same, same, labels, torch.tensor([4, 4, 7]))[0].item() == pytest.approx(expected, rel=1e-5)


def test_embeddings_as_similar_as_their_words_cost_nothing(labels, image_ids):
    """Rows of a root of the matrix of similarities, unit as its diagonal is 1; tau = tau'."""
    loss = build(replace(CONFIG, tau_labels=0.5, labels_weight=0.0))
    rows = labels.tolist()
    similar = torch.tensor([[1.0 if i == j else slow_jaccard(rows[i], rows[j]) for j in range(7)] for i in range(7)])
    values, vectors = torch.linalg.eigh(similar.double())
    root = (vectors * values.clamp_min(0).sqrt()).float()
    assert loss(root, root, labels, image_ids)[0].item() == pytest.approx(0.0, abs=1e-5)


def test_descent_brings_pairs_with_the_same_words_together(embeddings, labels, image_ids):
    image, text = embeddings(kind="unit")
    loss = build()
    for _ in range(150):
        total, _ = loss(F.normalize(image, dim=1), F.normalize(text, dim=1), labels, image_ids)
        leaves = [image, text, *loss.parameters()]
        with torch.no_grad():
            for leaf, slope in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                leaf.sub_(5.0 * slope)
    similar = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    assert similar[0, [2, 6]].min() > similar[0, [1, 3, 4, 5]].max()
    words = torch.sigmoid(loss.words(F.normalize(image, dim=1)))
    assert ((words > 0.5) == labels.bool()).float().mean() > 0.9


def test_swapping_modalities_and_permuting_pairs_change_nothing(embeddings, labels, image_ids):
    loss, (image, text) = build(), embeddings(kind="unit")
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    expected, _ = loss(image, text, labels, image_ids)
    torch.testing.assert_close(loss(text, image, labels, image_ids)[0], expected)
    torch.testing.assert_close(loss(image[order], text[order], labels[order], image_ids[order])[0], expected)


def test_words_that_nobody_uses_change_no_similarity(embeddings, labels, image_ids):
    image, text = embeddings(kind="unit")
    config = replace(CONFIG, labels_weight=0.0)
    wider = LocalLoss(config, 8, 7)
    wider.fit(torch.cat((IDF, torch.tensor([9.0, 9.0]))))
    padded = F.pad(labels, (0, 2))
    torch.testing.assert_close(
        wider(image, text, padded, image_ids)[0], build(config)(image, text, labels, image_ids)[0]
    )


@pytest.mark.parametrize("kind", ["unit", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_both_sides_and_the_head(embeddings, labels, image_ids, kind, bf16):
    image, text = embeddings(kind=kind)
    loss = build()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        half = (x.bfloat16() if bf16 else x for x in (image, text))
        total, _ = loss(*half, labels, image_ids)
    total.backward()
    assert total.dtype == torch.float32
    for grad in (image.grad, text.grad, loss.words.weight.grad, loss.words.bias.grad):
        assert torch.isfinite(grad).all()
        assert grad.count_nonzero() > 0


def test_before_training_words_are_rare(embeddings):
    """A word's chance is near 1 in 100, so that a hundred words of which one is there cost about 0.056 each."""
    torch.manual_seed(0)
    image, text = embeddings(kind="unit")
    _, logs = LocalLoss(CONFIG, 8, 100)(image, text, torch.eye(7, 100, dtype=torch.uint8), torch.arange(7))
    assert logs["words"].item() == pytest.approx((math.log(100) + 99 * math.log(100 / 99)) / 100, rel=0.1)


def test_a_head_of_weight_0_is_not_built(embeddings, labels, image_ids):
    loss, (image, text) = build(replace(CONFIG, labels_weight=0.0)), embeddings(kind="unit")
    assert not list(loss.parameters())
    total, logs = loss(image, text, labels, image_ids)
    assert list(logs) == ["similarity"]
    torch.testing.assert_close(total, build()(image, text, labels, image_ids)[1]["similarity"])


def test_the_words_weights_are_in_the_checkpoint():
    other = LocalLoss(CONFIG, 8, 5)
    assert other.idf.tolist() == [1.0] * 5
    other.load_state_dict(build().state_dict())
    assert torch.equal(other.idf, IDF)


@pytest.mark.parametrize(
    ("config", "dim", "words", "message"),
    [
        (CONFIG, 0, 5, r"needs a local space: set --train\.model\.local\.dim"),
        (CONFIG, 8, 0, "found no content words in the training captions"),
        (replace(CONFIG, tau=0.0), 8, 5, "found tau 0.0 and tau_labels 0.3 .* expected both above 0"),
        (replace(CONFIG, tau_labels=-1.0), 8, 5, "found tau 0.5 and tau_labels -1.0"),
        (replace(CONFIG, labels_weight=-0.5), 8, 5, r"found labels_weight -0.5; expected 0 \(not built\) or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, dim, words, message):
    with pytest.raises(ValueError, match=message):
        LocalLoss(config, dim, words)
