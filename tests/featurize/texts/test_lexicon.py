"""Words, their dictionary forms, and the numbers that stand for these."""

import numpy as np
import pytest
import torch

from featurize.describe import describe_texts
from featurize.encoder import EncoderError
from featurize.texts import open_text_encoder
from featurize.texts.lexicon import LIMIT, LexiconEncoder, language_of, lemma_id, stop_ids


@pytest.fixture(scope="module")
def english():
    return LexiconEncoder("en")


def ids(text):
    return [lemma_id(lemma) for lemma in text.split()]


def test_an_id_is_the_first_31_bits_of_the_digest():
    assert lemma_id("dog") == 0xF73E71A0 // 2  # printf dog | b2sum -l 32
    assert max(lemma_id(str(number)) for number in range(1000)) < 2**31
    assert len({lemma_id(str(number)) for number in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("caption", "lemmas"),
    [
        ("Two dogs chased the children's balls.", "two dog chase the child ball"),
        ("THE MEN ARE RUNNING", "the man be run"),
        ("A dog\u2019s bone; a dog's bone", "a dog bone a dog bone"),  # either apostrophe
        ("a T-shirt, 4x4 on_it", "a t shirt 4 x 4 on it"),
        ("the 'quoted' word", "the quote word"),
        ("An e\u0301clair", "a \u00e9clair"),  # letter and accent are one letter
        ("In Paris", "in paris"),
        ("blorfs", "blorfs"),
        ("playing, sitting, hanging, swinging", "play sit hang swing"),  # corrected
        ("?! ... \u2014 \U0001f436", ""),
        ("", ""),
    ],
)
def test_words_become_lemmas_in_order(english, caption, lemmas):
    assert english.prepare([caption]) == [ids(lemmas)]


def test_marks_belong_to_their_letters():
    word = "\u0915\u0941\u0924\u094d\u0924\u0947"  # Hindi, dogs: three letters with vowel signs and a virama
    assert len(LexiconEncoder("hi").prepare([f"{word} {word}"])[0]) == 2


def test_another_language():
    italian = open_text_encoder("lexicon:it")
    assert italian.card.name == "lexicon-it"
    assert italian.prepare(["Due cani giocavano"]) == [ids("due cane giocare")]


def test_the_lexicon_is_english_unless_told(english):
    assert open_text_encoder("lexicon").card == open_text_encoder("lexicon:en").card == english.card
    assert language_of("lexicon") == "en"
    assert language_of("lexicon:de") == "de"


@pytest.mark.parametrize("reference", ["lexicon:xx", "lexicon:../en"])
def test_a_language_without_a_dictionary(reference):
    with pytest.raises(EncoderError, match=rf"^{reference}: no dictionary of this language; there are ar, ast, .*en, "):
        open_text_encoder(reference)


def test_a_caption_is_cut_at_the_limit(english):
    assert english.prepare(["dog " * (LIMIT + 1)]) == [ids("dog " * LIMIT)]


def test_rows_are_whole_numbers_of_each_caption(english):
    rows = describe_texts(english, ["two dogs", "", "a man"], 2)["lemmas"]
    assert [row.dtype for row in rows] == [np.int32] * 3
    assert [row.tolist() for row in rows] == [ids("two dog"), [], ids("a man")]
    (output,) = english.card.outputs
    assert (output.name, output.shape, output.ragged, output.dtype) == ("lemmas", (), True, "int32")
    assert english.encode([[1]])["lemmas"][0].dtype == torch.int32


def test_another_dictionary_is_another_encoder(english, monkeypatch):
    monkeypatch.setattr("featurize.texts.lexicon.version", lambda _: "0")
    assert LexiconEncoder("en").card.weights != english.card.weights
    assert LexiconEncoder("de").card.weights != LexiconEncoder("en").card.weights
    monkeypatch.setattr("featurize.texts.lexicon._CORRECTIONS", {})
    assert LexiconEncoder("en").card.preprocessing["words"] != english.card.preprocessing["words"]


def test_stop_words_are_met_in_their_dictionary_form(english):
    stopped = stop_ids("en")
    (function_words,) = english.prepare(["The is are was had him these one of its in and on's"])
    assert set(function_words) <= stopped
    (visible,) = english.prepare(["two dogs in front of a fire, back to back; three thin men on top"])
    assert [number in stopped for number in visible] == [
        *(False, False, True, False, True, True, False, False, True, False, False, False, False, True, False)
    ]
    assert lemma_id("s") in stopped
    assert stop_ids("de") == frozenset()
