"""A model of imported features answers no query that no network here can describe."""

from types import SimpleNamespace

import pytest
from PIL import Image

from evaluate.search import Searcher
from featurize.manifest import CacheError
from train.batches import ColumnRef


def ref(name, encoder):
    return ColumnRef(name, "0" * 64, encoder, "0" * 64, name.rpartition(".")[2], "plain")


@pytest.fixture
def searcher():
    """One that reads extracted and imported columns of both modalities, and was never trained."""
    made = Searcher.__new__(Searcher)
    made.inputs = SimpleNamespace(
        image_vectors=((ref("efficientnet-lite0.pooled", "efficientnet-lite0"),),),
        image_parts=((ref("import-bua.regions", "import:/data/bua.h5"),),),
        text_vectors=(ref("import-clip.sentence", "import:clip"),),
        text_parts=(ref("import-clip.tokens", "import:clip"),),
        text_bags=(),
    )
    return made


def test_a_picture(searcher):
    with pytest.raises(
        CacheError,
        match=r"a picture cannot be asked: the model reads import-bua.regions of import:/data/bua.h5, features that "
        r"others extracted, .* Ask with a text, or train a run on encoders only \(--featurize.images\)",
    ):
        searcher.search(Image.new("RGB", (8, 8)))


def test_a_text(searcher):
    with pytest.raises(
        CacheError,
        match=r"a text cannot be asked: the model reads import-clip.sentence, import-clip.tokens of import:clip, .* "
        r"Ask with a picture, or train a run on encoders only \(--featurize.texts\)",
    ):
        searcher.search("two dogs")
