"""What a new query becomes before the towers see it."""

from unittest.mock import MagicMock

import torch

from evaluate.search import Searcher
from featurize.extract import text_encoder
from featurize.texts.lexicon import lemma_id
from train.batches import ColumnRef, Inputs


def test_a_querys_words_are_encoded_like_the_captions(tmp_path, monkeypatch):
    weights = text_encoder("lexicon", "float32").card.weights
    lemmas = ColumnRef("lexicon-en.lemmas", "0" * 64, "lexicon", weights, "lemmas", "plain")
    inputs = Inputs(tmp_path, (), (), (), (), None, "float32", text_bags=(lemmas,))
    model = MagicMock()
    monkeypatch.setattr("evaluate.search.open_model", lambda _: (model, inputs))
    monkeypatch.setattr("evaluate.search.Index", MagicMock())
    searcher = Searcher.open(tmp_path)

    searcher.embed_texts(["?", "two dogs"])
    (features,) = model.embed_texts.call_args.args
    assert features.bags[0].tolist() == [[0, 0], [lemma_id("two"), lemma_id("dog")]]
    assert features.bags[0].dtype == torch.int64
    assert features.bag_masks[0].tolist() == [[False, False], [True, True]]
    assert features.vectors.shape == (2, 0)

    searcher.embed_texts(["?"])  # no word at all: one empty place, as the cache pads
    (features,) = model.embed_texts.call_args.args
    assert features.bags[0].shape == (1, 1)
    assert features.bag_masks[0].tolist() == [[False]]
