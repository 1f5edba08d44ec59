"""A caption's words in their dictionary form (lemmas): what bags of words and labels from words are made of.

A lemma is stored as a number that follows from its letters alone. So no vocabulary is fixed here: the column does not
depend on the corpus, and a query is encoded alike. Which lemmas count is chosen at training (`train.lexicon`).
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version

import torch
from simplemma import Lemmatizer
from simplemma.strategies.dictionaries.dictionary_factory import DATA_FOLDER, SUPPORTED_LANGUAGES
from torch import Tensor

from featurize.encoder import Card, EncoderError, Output

LIMIT = 512  # lemmas kept of a caption

# `\w` leaves out the vowel signs and accents that follow a letter in Hindi, Hebrew, Arabic and other scripts.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
_LETTER = rf"(?:[^\W\d_][{_MARKS}]*)"
_WORD = re.compile(rf"{_LETTER}+(?:['\u200c]{_LETTER}+)*|\d+")  # U+200C joins words' parts in Persian

# Forms frequent in captions that the English dictionary takes for a noun or for a rare verb ("playe", "singe").
_CORRECTIONS = {
    "en": {
        "crosses": "cross",
        "guarding": "guard",
        "hanging": "hang",
        "playing": "play",
        "singing": "sing",
        "sitting": "sit",
        "swinging": "swing",
        "weeds": "weed",
    }
}

# Words of scikit-learn's list, made for newspapers, that name what a picture shows, or how many.
# fmt: off
_VISIBLE = frozenset({
    "amount", "back", "bill", "bottom", "call", "cry", "describe", "detail", "eight", "eleven", "empty", "fifteen",
    "fifty", "fill", "find", "fire", "five", "forty", "four", "front", "full", "hundred", "interest", "mill",
    "move", "name", "nine", "part", "show", "side", "six", "sixty", "system", "ten", "thick", "thin", "three",
    "top", "twelve", "twenty", "two",
})
# fmt: on
_CLITICS = frozenset({"s", "n't"})  # left over by captions that are tokenised already: "child 's", "is n't"


def lemma_id(lemma: str) -> int:
    """The number that stands for a lemma: the first 31 bits of the blake2b digest (4 bytes) of its UTF-8."""
    return int.from_bytes(hashlib.blake2b(lemma.encode(), digest_size=4).digest()) >> 1


def language_of(reference: str) -> str:
    """The language of "lexicon" (English) or "lexicon:LANGUAGE"."""
    return reference.partition(":")[2] or "en"


class LexiconEncoder:
    """A `TextEncoder` with the output "lemmas": (L,) int32, the `lemma_id` of each word in order.

    Words are runs of letters, with apostrophes inside them; digits are words of their own; everything else separates.
    All are in lower case, function words are among them, and only the first 512 of a caption are kept. L may be 0.
    The dictionaries are those of the package simplemma.

    Args:
        language: an ISO code that simplemma has a dictionary of, e.g. "en".

    Raises:
        EncoderError: there is no dictionary of this language.
    """

    def __init__(self, language: str) -> None:
        if language not in SUPPORTED_LANGUAGES:
            known = ", ".join(sorted(SUPPORTED_LANGUAGES))
            raise EncoderError(f"lexicon:{language}: no dictionary of this language; there are {known}")
        self._language = language
        self._lemmatizer = Lemmatizer()
        self._corrections = _CORRECTIONS.get(language, {})
        self._id_of_word = lru_cache(1 << 16)(lambda word: lemma_id(self.lemma(word)))
        rules = json.dumps([_WORD.pattern, self._corrections], sort_keys=True)
        dictionary = (DATA_FOLDER / f"{language}.plzma").read_bytes()
        self.card = Card(
            name=f"lexicon-{language}",
            # Besides its dictionary, rules in the package's code find lemmas, so its version belongs to the weights.
            weights=hashlib.sha256(f"simplemma {version('simplemma')}\n".encode() + dictionary).hexdigest(),
            preprocessing={
                "words": hashlib.sha256(rules.encode()).hexdigest(),
                "limit": LIMIT,
                "id": "blake2b, 31 bits",
            },
            outputs=(Output("lemmas", (), ragged=True, dtype="int32"),),
        )

    def lemma(self, word: str) -> str:
        """The dictionary form, in lower case, of a word in lower case; an unknown word is its own."""
        return self._corrections.get(word) or self._lemmatizer.lemmatize(word, self._language).lower()

    def prepare(self, captions: Sequence[str]) -> list[list[int]]:
        """The lemma ids of each caption's words."""
        plain = (unicodedata.normalize("NFC", caption).lower().replace("\u2019", "'") for caption in captions)
        return [[self._id_of_word(word) for word in _WORD.findall(caption)[:LIMIT]] for caption in plain]

    def encode(self, batch: Sequence[Sequence[int]]) -> dict[str, Tensor | list[Tensor]]:
        """Prepared captions as they are: "lemmas" -> B tensors (L_i,) int32."""
        return {"lemmas": [torch.tensor(row, dtype=torch.int32) for row in batch]}


@lru_cache
def stop_ids(language: str) -> frozenset[int]:
    """The ids of lemmas that say nothing of a picture: articles, pronouns, prepositions, auxiliaries.

    They are the lemmas of scikit-learn's English list, less what names something visible. Of other languages there is
    no list, and the set is empty.
    """
    if language != "en":
        return frozenset()
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    encoder = LexiconEncoder(language)
    lemmas = {encoder.lemma(word) for word in (ENGLISH_STOP_WORDS - _VISIBLE) | _CLITICS}
    return frozenset(lemma_id(lemma) for lemma in lemmas - _VISIBLE)
