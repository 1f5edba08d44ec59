"""Vocabulary, bag of lemmas, labels: against loops written out and scikit-learn."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from train.config import SettingsError
from train.lexicon import BagOfLemmas, Lemmas, Vocabulary, image_labels, jaccard
from train.noise import Noise
from train.schedule import worker_slices

CAPTIONS = [[7, 7, 900, 3], [3, 7], [], [2**31 - 1, 3, 3, 3], [5, 900, 900, 0], [7], [12, 7, 5]]


def end_to_end(captions):
    return Lemmas(
        np.array([lemma for caption in captions for lemma in caption], np.int64),
        np.repeat(np.arange(len(captions)), [len(caption) for caption in captions]),
        len(captions),
    )


def padded(captions, width=0):
    width = max(width, 1, *map(len, captions))
    ids = torch.tensor([caption + [0] * (width - len(caption)) for caption in captions])
    return ids, torch.arange(width) < torch.tensor([[len(caption)] for caption in captions])


def random_captions(seed, count, kinds=40, longest=9):
    rng = np.random.default_rng(seed)
    names = np.sort(rng.choice(2**31, kinds, replace=False))
    return [rng.choice(names, rng.integers(0, longest)).tolist() for _ in range(count)]


def tfidf(captions, vocabulary, dropout=0.5):
    """A branch whose answer is the tf-idf vector itself."""
    size = len(vocabulary.ids)
    bag = BagOfLemmas(size, size, dropout)
    bag.fit(vocabulary)
    torch.nn.init.eye_(bag.weight)
    return bag


def test_a_vocabulary_holds_the_most_frequent_lemmas():
    # Captions that hold 7: 4, 3: 3, 5 and 900: 2, the others: 1.
    chosen = Vocabulary.of(end_to_end(CAPTIONS), size=3)
    assert chosen.ids.tolist() == [3, 5, 7]  # of 5 and 900, the lower
    assert (chosen.ids.dtype, chosen.idf.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(chosen.idf, torch.tensor([math.log(8 / (1 + df)) + 1 for df in (3, 2, 4)]))
    assert Vocabulary.of(end_to_end(CAPTIONS), size=9, min_frequency=2).ids.tolist() == [3, 5, 7, 900]
    assert Vocabulary.of(end_to_end(CAPTIONS), size=9, min_frequency=2, stop={7, 5}).ids.tolist() == [3, 900]
    assert Vocabulary.of(end_to_end(CAPTIONS), size=9).ids.tolist() == [0, 3, 5, 7, 12, 900, 2**31 - 1]


def test_a_vocabulary_follows_a_loop():
    captions = random_captions(0, 60)
    frequency = Counter(lemma for caption in captions for lemma in set(caption))
    best = sorted(frequency, key=lambda lemma: (-frequency[lemma], lemma))[:25]
    chosen = Vocabulary.of(end_to_end(captions), size=25)
    assert chosen.ids.tolist() == sorted(best)
    idf = [math.log(61 / (1 + frequency[lemma])) + 1 for lemma in sorted(best)]
    torch.testing.assert_close(chosen.idf, torch.tensor(idf))


@pytest.mark.parametrize(("captions", "kinds"), [([[1, 2], [2, 3]], 3), ([[], []], 0)])
def test_a_vocabulary_of_nothing_is_refused(captions, kinds):
    with pytest.raises(SettingsError, match=rf"2 captions hold {kinds} different lemmas, and none .* 3 captions or mo"):
        Vocabulary.of(end_to_end(captions), size=9, min_frequency=3)


def test_lookup_finds_places_and_tells_what_is_unknown():
    vocabulary = Vocabulary(torch.tensor([3, 7, 2**31 - 1]), torch.ones(3))
    asked = torch.tensor([[7, 0, 2**31 - 1], [4, 3, 2**40]])
    assert vocabulary.lookup(asked).tolist() == [[1, -1, 2], [-1, 0, -1]]


@pytest.mark.parametrize("size", [40, 12])
def test_entries_are_those_of_scikit_learn(size):
    captions = random_captions(1, 50)
    vocabulary = Vocabulary.of(end_to_end(captions), size)
    places = {lemma: place for place, lemma in enumerate(vocabulary.ids.tolist())}
    oracle = TfidfVectorizer(analyzer=list, lowercase=False, vocabulary=places)
    expected = oracle.fit_transform(captions).toarray()
    torch.testing.assert_close(
        tfidf(captions, vocabulary)(*padded(captions)).double(), torch.from_numpy(expected), atol=1e-6, rtol=0
    )


def test_room_to_spare_changes_nothing():
    captions = random_captions(2, 20)
    vocabulary = Vocabulary.of(end_to_end(captions), 30)
    roomy = BagOfLemmas(64, 8, 0.5)
    roomy.fit(Vocabulary.of(end_to_end([[1, 2, 3]]), 9))
    roomy.fit(vocabulary)  # what was there is forgotten
    exact = BagOfLemmas(30, 8, 0.5)
    exact.fit(vocabulary)
    with torch.no_grad():
        exact.weight.copy_(roomy.weight[:30])
    inputs = padded([*captions, [1, 2, 3]])
    torch.testing.assert_close(roomy(*inputs), exact(*inputs))


def test_captions_without_known_lemmas_are_zero():
    captions = [[5, 7], [99], [], [5]]
    bag = BagOfLemmas(4, 3, 0.5)
    assert not bag(*padded(captions)).any()  # nothing is known before the fit
    bag.fit(Vocabulary(torch.tensor([5, 7]), torch.ones(2)))
    out = bag(*padded(captions))
    assert out.any(1).tolist() == [True, False, False, True]
    torch.testing.assert_close(out[0], (bag.weight[0] + bag.weight[1]) / math.sqrt(2))
    assert bag(*padded([[]])).tolist() == [[0, 0, 0]]


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(SettingsError, match="a vocabulary of 3 lemmas, but room for 2"):
        BagOfLemmas(2, 3, 0.5).fit(Vocabulary(torch.arange(3), torch.ones(3)))


def test_a_saved_branch_knows_its_words():
    captions = random_captions(3, 20)
    bag = BagOfLemmas(32, 8, 0.5)
    bag.fit(Vocabulary.of(end_to_end(captions), 32))
    again = BagOfLemmas(32, 8, 0.5)
    again.load_state_dict(bag.state_dict())
    torch.testing.assert_close(again(*padded(captions)), bag(*padded(captions)), rtol=0, atol=0)


def test_the_weight_starts_as_that_of_a_linear_layer():
    torch.manual_seed(0)
    weight = BagOfLemmas(400, 50, 0.5).weight.detach()
    reference = torch.nn.Linear(400, 50).weight
    assert float(weight.abs().max()) <= 1 / 20
    assert weight.std().item() == pytest.approx(reference.std().item(), rel=0.02)


@pytest.mark.parametrize("training", [False, True])
def test_padding_and_the_order_of_words_change_nothing(training):
    captions = random_captions(4, 12)
    bag = BagOfLemmas(40, 8, 0.5)
    bag.fit(Vocabulary.of(end_to_end(captions), 20))

    def run(rows, width=0):
        return bag(*padded(rows, width), Noise(0, 5, 12, slice(0, 12)) if training else None)

    torch.testing.assert_close(run(captions, 70), run(captions))
    torch.testing.assert_close(run([caption[::-1] for caption in captions]), run(captions))


def test_workers_drop_what_one_worker_drops():
    captions = random_captions(5, 11)
    bag = BagOfLemmas(40, 8, 0.5)
    bag.fit(Vocabulary.of(end_to_end(captions), 20))
    whole = bag(*padded(captions), Noise(3, 7, 11, slice(0, 11)))
    parts = [bag(*padded(captions[own]), Noise(3, 7, 11, own)) for own in worker_slices(11, 3)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert (whole != bag(*padded(captions))).any()


def test_dropout_takes_whole_entries_and_rescales_the_rest():
    captions = [[4, 4, 4, 8, 15, 16, 23, 42, 42]] * 4000
    vocabulary = Vocabulary(torch.tensor([4, 8, 15, 16, 23, 42]), torch.rand(6) + 1)
    bag = tfidf(captions, vocabulary, dropout=0.25)
    plain = bag(*padded(captions[:1]))[0]
    noisy = bag(*padded(captions), Noise(0, 0, 4000, slice(0, 4000)))
    shares = noisy / plain
    assert torch.isclose(shares, torch.tensor(4 / 3)).logical_or(shares == 0).all()
    torch.testing.assert_close((shares == 0).float().mean(0), torch.full((6,), 0.25), atol=0.03, rtol=0)
    together = ((shares[:, 0] == 0) & (shares[:, 5] == 0)).float().mean()
    assert together.item() == pytest.approx(1 / 16, abs=0.02)  # entries fall independently


def test_gradients_reach_the_words_that_were_said():
    bag = BagOfLemmas(4, 3, 0.5)
    bag.fit(Vocabulary(torch.tensor([5, 7, 9]), torch.ones(3)))
    bag(*padded([[5, 5, 9], [], [99]])).square().sum().backward()
    assert bag.weight.grad.isfinite().all()
    assert bag.weight.grad.any(1).tolist() == [True, False, True, False]


def test_under_autocast_the_answer_is_the_same():
    captions = random_captions(6, 10)
    bag = BagOfLemmas(40, 8, 0.5)
    bag.fit(Vocabulary.of(end_to_end(captions), 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = bag(*padded(captions))
    torch.testing.assert_close(low.float(), bag(*padded(captions)), atol=1e-3, rtol=1e-2)


def test_labels_are_all_that_any_caption_says():
    captions = random_captions(7, 30)
    owner = np.sort(np.random.default_rng(0).integers(0, 9, 30))
    owner[owner == 4] = 5  # an image without captions
    vocabulary = Vocabulary.of(end_to_end(captions), 15)
    expected = np.zeros((9, 15))
    for caption, image in zip(captions, owner, strict=True):
        for place, lemma in enumerate(vocabulary.ids.tolist()):
            expected[image, place] += list(caption).count(lemma)
    assert expected.max() > 1
    labels = image_labels(end_to_end(captions), owner, 9, vocabulary)
    assert labels.dtype == torch.uint8
    np.testing.assert_array_equal(labels.numpy(), expected)
    assert not labels[4].any()


def test_labels_count_to_255():
    lemmas = Lemmas(np.full(300, 7), np.zeros(300, np.int64), 1)
    vocabulary = Vocabulary(torch.tensor([7]), torch.ones(1))
    assert image_labels(lemmas, np.zeros(1, np.int64), 1, vocabulary).tolist() == [[255]]


def test_the_jaccard_index_follows_a_loop():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (12, 20)).astype(np.uint8)
    labels[3], labels[4] = 0, labels[5]
    labels[11] = 0
    idf = rng.uniform(1, 5, 20)
    expected = np.eye(12)
    for i in range(12):
        for j in range(12):
            both = sum(w for a, b, w in zip(labels[i], labels[j], idf, strict=True) if a and b)
            either = sum(w for a, b, w in zip(labels[i], labels[j], idf, strict=True) if a or b)
            if i != j and either:
                expected[i, j] = both / either
    found = jaccard(torch.from_numpy(labels), torch.from_numpy(idf).float())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert found[4, 5].item() == pytest.approx(1)
    assert (found[3, 11], found[3, 3]) == (0, 1)  # nothing is said of either
    torch.testing.assert_close(found, found.T)


def test_rare_words_weigh_more():
    labels = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.uint8)
    # Images 0 and 1 share the first word, 0 and 2 the second, 1 and 2 the third: 1/6, 2/6, 3/6.
    expected = torch.tensor([[1, 1 / 6, 2 / 6], [1 / 6, 1, 3 / 6], [2 / 6, 3 / 6, 1]])
    torch.testing.assert_close(jaccard(labels, torch.tensor([1.0, 2.0, 3.0])), expected)
