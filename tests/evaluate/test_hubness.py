"""Hubness: the bias against loops, the extra dimension against subtraction and faiss, banks, state, errors."""

import math

import faiss
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.nn.functional import normalize

from evaluate.hubness import HubnessCorrection, augment_gallery, augment_queries
from evaluate.ranks import EvaluationError, Relevance, rank_relevant


@pytest.fixture
def spaces():
    """Images, captions, and a correction of other images and captions; all unit vectors."""
    generator = torch.Generator().manual_seed(0)
    images, captions, bank, other = (normalize(torch.randn(n, 8, generator=generator)) for n in (40, 60, 30, 25))
    return images, captions, HubnessCorrection(bank, other)


def scores(queries, items, bias):
    """-d²/2 - bias, (Q, N), by scipy."""
    return -cdist(queries.double().numpy(), items.double().numpy(), "sqeuclidean") / 2 - bias.numpy()


@pytest.mark.parametrize("tile", [1, 7, 1024])
def test_the_bias_is_a_smooth_maximum_over_the_other_modality(spaces, tile):
    images, captions, correction = spaces
    for gallery, bank, kind in ((images, correction.captions, "images"), (captions, correction.images, "captions")):
        expected = []
        for item in gallery.double():
            total = math.fsum(math.exp(20 * -((item - query.double()) ** 2).sum().item() / 2) for query in bank)
            expected.append(0.7 * math.log(total) / 20)
        assert correction.bias(gallery, kind, tile).tolist() == pytest.approx(expected)


def test_the_bias_in_closed_form():
    """Two bank captions at distance 1 and one item: h = -1/2 + log(2)/b."""
    bank = torch.tensor([[1.0], [-1.0]])
    correction = HubnessCorrection(bank, bank, a=2, b=4)
    assert correction.bias(torch.zeros(1, 1), "images").item() == pytest.approx(2 * (-0.5 + math.log(2) / 4))


def test_a_large_b_is_the_maximum_and_does_not_overflow(spaces):
    images, _, correction = spaces
    sharp = HubnessCorrection(correction.images, correction.captions, a=1, b=1e6)
    nearest = scores(images, correction.captions, torch.zeros(25)).max(axis=1)
    assert sharp.bias(images, "images").tolist() == pytest.approx(nearest.tolist(), abs=1e-5)


def test_an_added_dimension_orders_as_subtracting_does(spaces):
    images, captions, correction = spaces
    bias = correction.bias(images, "images")
    gallery, queries = augment_gallery(images, bias), augment_queries(captions)
    assert gallery.shape == (40, 9)
    assert queries.shape == (60, 9)
    expected = (-scores(captions, images, bias)).argsort(axis=1)
    assert not (expected == (-scores(captions, images, torch.zeros(40))).argsort(axis=1)).all()
    assert (cdist(queries.numpy(), gallery.numpy()).argsort(axis=1) == expected).all()
    index = faiss.IndexFlatL2(9)
    index.add(gallery.numpy())
    assert (index.search(queries.numpy(), 40)[1] == expected).all()


def test_an_inner_product_index_takes_the_bias_itself(spaces):
    """What the module's docstring says of [q; 1] and [x; -bias]."""
    images, captions, correction = spaces
    bias = correction.bias(images, "images")
    index = faiss.IndexFlatIP(9)
    index.add(np.column_stack([images.numpy(), -bias.float().numpy()]))
    found = index.search(np.column_stack([captions.numpy(), np.ones(60, np.float32)]), 40)[1]
    assert (found == (-scores(captions, images, bias)).argsort(axis=1)).all()


def test_ranks_are_those_of_the_corrected_scores(spaces):
    images, captions, correction = spaces
    owner = torch.arange(60) % 40
    bias = correction.bias(images, "images")
    found = rank_relevant(augment_queries(captions), augment_gallery(images, bias), Relevance.text_to_image(owner))
    matrix = scores(captions, images, bias)
    assert found.values.tolist() == [
        int((row >= row[image]).sum()) for row, image in zip(matrix, owner.tolist(), strict=True)
    ]


def test_a_hub_is_set_back():
    """Item 0 is the nearest of both queries; the bank says that it is near to everything."""
    items = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    queries = torch.tensor([[0.45, 0.0], [0.0, 0.45]])
    bank = torch.tensor([[0.1, 0.0], [0.0, 0.1], [-0.1, 0.0], [0.0, -0.1]])
    relevance = Relevance.text_to_image(torch.tensor([1, 2]))
    assert rank_relevant(queries, items, relevance).values.tolist() == [2, 2]
    bias = HubnessCorrection(bank, bank).bias(items, "images")
    corrected = rank_relevant(augment_queries(queries), augment_gallery(items, bias), relevance)
    assert corrected.values.tolist() == [1, 1]


def test_file_and_back(spaces, tmp_path):
    _, _, correction = spaces
    correction.save(tmp_path / "hubness.safetensors")
    again = HubnessCorrection.open(tmp_path / "hubness.safetensors")
    assert again.state().keys() == correction.state().keys()
    assert all(value.equal(again.state()[name]) for name, value in correction.state().items())
    with pytest.raises(EvaluationError, match=r"no hubness correction .* --evaluate\.hubness\.queries above 0"):
        HubnessCorrection.open(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "hubness.safetensors").read_bytes()[:50])
    with pytest.raises(EvaluationError, match="no hubness correction"):
        HubnessCorrection.open(tmp_path / "cut.safetensors")


def test_state_and_back(spaces):
    _, _, correction = spaces
    again = HubnessCorrection.from_state(HubnessCorrection(correction.images, correction.captions, 0.3, 7).state())
    assert (again.a, again.b) == (0.3, 7)
    assert again.images.equal(correction.images)
    assert again.captions.equal(correction.captions)
    with pytest.raises(EvaluationError, match=r"expected \['a', 'b', 'captions', 'images'\], found \['a'\]"):
        HubnessCorrection.from_state({"a": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 2)}, r"hubness bank of images: .* at least one row"),
        ({"captions": torch.full((1, 2), math.nan)}, r"hubness bank of captions row 0 holds NaN or infinity"),
        ({"captions": torch.zeros(1, 3)}, r"images have 2 dimensions, captions 3"),
        ({"a": -0.1}, r"expected a >= 0 and b > 0, found a = -0.1, b = 20.0"),
        ({"b": 0.0}, r"found a = 0.7, b = 0.0"),
    ],
)
def test_correction_errors(change, message):
    with pytest.raises(EvaluationError, match=message):
        HubnessCorrection(**({"images": torch.zeros(1, 2), "captions": torch.zeros(1, 2)} | change))


def test_other_errors():
    correction = HubnessCorrection(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(EvaluationError, match=r"images have 3 dimensions, the hubness banks 2"):
        correction.bias(torch.zeros(1, 3), "images")
    with pytest.raises(EvaluationError, match=r"captions row 0 holds NaN"):
        correction.bias(torch.full((1, 2), math.nan), "captions")
    with pytest.raises(EvaluationError, match=r"tile: expected at least 1, found 0"):
        correction.bias(torch.zeros(1, 2), "images", tile=0)
    with pytest.raises(EvaluationError, match=r"expected 2 finite numbers, .* shape \(1,\) with 0 that"):
        augment_gallery(torch.zeros(2, 2), torch.zeros(1))
    with pytest.raises(EvaluationError, match=r"expected 1 finite numbers, .* with 1 that"):
        augment_gallery(torch.zeros(1, 2), torch.tensor([math.inf]))
