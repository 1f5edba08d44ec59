"""Product codes as they are searched: against loops, against FAISS, and as metrics."""

import sys

import faiss
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from evaluate.codes import (
    SAMPLE,
    encode,
    evaluate_codes,
    fit_codebook,
    lookup_tables,
    open_codebook,
    save_codebook,
    search_codes,
    to_faiss,
)
from evaluate.protocols import evaluate_full
from evaluate.ranks import EvaluationError
from train import quantize
from train.config import QuantizationConfig, SettingsError
from train.quantize import ProductCodebook

SMALL = QuantizationConfig(subspaces=2, codewords=16)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small():
    return fit_codebook(SMALL, randn(60, 8), randn(90, 8, seed=1))


@pytest.fixture(scope="module")
def bytes_of():
    """A codebook of whole bytes: 16 dimensions, 4 sub-spaces, 256 codewords."""
    return fit_codebook(QuantizationConfig(subspaces=4), randn(300, 16), randn(300, 16, seed=1))


@pytest.mark.parametrize("tile", [7, 4096])
def test_codes_are_the_nearest_codewords_in_one_byte_each(tile, monkeypatch):
    monkeypatch.setattr(quantize, "TILE", tile)
    codebook, z = small(), randn(30, 8, seed=2)
    codes = encode(codebook, z)
    assert codes.dtype == torch.uint8
    assert codes.shape == (30, 2)
    rotated = z @ codebook.rotation
    for n in range(30):
        for s in range(2):
            piece = rotated[n, 4 * s : 4 * s + 4]
            gaps = [float((piece - word).square().sum()) for word in codebook.codewords[s]]
            assert codes[n, s] == gaps.index(min(gaps))


def test_lookup_tables_hold_squared_distances_to_codewords():
    codebook, queries = small(), randn(5, 8, seed=3)
    tables = lookup_tables(codebook, queries)
    rotated = queries @ codebook.rotation
    for s in range(2):
        for q in range(5):
            for m in range(16):
                expected = (rotated[q, 4 * s : 4 * s + 4] - codebook.codewords[s, m]).square().sum()
                assert tables[s, q, m].item() == pytest.approx(expected.item(), abs=1e-5)


def test_lookup_tables_hold_no_difference_of_every_query_and_codeword(largest):
    """Beside the tables, (S, Q, M), there would be (S, Q, M, E/S): here 16 times as much."""
    codebook = ProductCodebook(64, 4, 16)
    with largest:
        lookup_tables(codebook, randn(100, 64))
    assert largest.elements == 4 * 100 * 16


@pytest.mark.parametrize("tile", [3, 4096])
def test_search_equals_distances_to_decoded_items(tile):
    """Of equally near items (40 in 256 cells, some twice) the lower row comes first."""
    codebook, queries = small(), randn(6, 8, seed=3)
    codes = encode(codebook, torch.cat((randn(20, 8, seed=4), randn(20, 8, seed=4))))
    distances, rows = search_codes(codebook, queries, codes, 9, tile)
    full = (queries[:, None] - codebook.decode(codes)).square().sum(-1)
    torch.testing.assert_close(distances, full.sort(dim=1).values[:, :9])
    torch.testing.assert_close(full.gather(1, rows), distances)
    assert (rows[:, ::2][:, :4] + 20 == rows[:, 1::2]).all()


def test_a_search_for_more_than_there_is_gives_all():
    codebook = small()
    distances, rows = search_codes(codebook, randn(2, 8), encode(codebook, randn(3, 8)), 10)
    assert distances.shape == rows.shape == (2, 3)
    assert rows.sort(dim=1).values.tolist() == [[0, 1, 2]] * 2


def test_metrics_are_those_of_decoded_items():
    """Every caption and image on a codeword of its own: codes lose nothing; 24 codewords for all lose much."""
    images = normalize(randn(40, 8, seed=5))
    captions = normalize(images.repeat_interleave(2, 0) + 0.3 * randn(80, 8, seed=6))
    owner = torch.arange(80) // 2
    exact = ProductCodebook(8, 1, 120)
    exact.codewords = torch.cat((images, captions))[None]
    plain = evaluate_full(images, captions, owner, split="val")
    assert evaluate_codes(exact, images, captions, owner, split="val").as_flat() == pytest.approx(plain.as_flat())
    coarse = fit_codebook(QuantizationConfig(subspaces=1, codewords=24), images, captions)
    assert evaluate_codes(coarse, images, captions, owner, split="val").rsum < 0.8 * plain.rsum


def test_metrics_by_hand():
    """Two images, one caption each, on a line with codewords at 0, 1 and 10.

    Images at 0.4 and 0.6 are coded 0 and 1, captions at 0.45 and 9 are coded 0 and 10. Image 0 finds its caption first
    (0.16 < 92.16), image 1 the other one (0.36 < 88.36); caption 0 finds image 0 (0.2025 < 0.3025), caption 1 finds
    image 1 (64 < 81).
    """
    codebook = ProductCodebook(1, 1, 3)
    codebook.codewords = torch.tensor([[[0.0], [1.0], [10.0]]])
    images, captions = torch.tensor([[0.4], [0.6]]), torch.tensor([[0.45], [9.0]])
    report = evaluate_codes(codebook, images, captions, torch.tensor([0, 1]), split="val")
    assert (report.i2t.r1, report.t2i.r1) == (50.0, 100.0)


def test_a_fitted_codebook_is_made_of_both_modalities_evenly():
    images, captions = randn(50, 8), randn(SAMPLE * 2, 8, seed=1)
    expected = ProductCodebook(8, 2, 4)
    expected.initialise(torch.cat((images, captions[::2])))
    found = fit_codebook(QuantizationConfig(subspaces=2, codewords=4), images, captions)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_faiss_finds_the_same_neighbours(bytes_of, tmp_path):
    items, queries = randn(500, 16, seed=2), randn(20, 16, seed=3)
    codes = encode(bytes_of, items)
    faiss.write_index(to_faiss(bytes_of, codes), str(tmp_path / "items.faiss"))
    index = faiss.read_index(str(tmp_path / "items.faiss"))
    theirs, their_rows = index.search(queries.numpy(), 10)
    distances, rows = search_codes(bytes_of, queries, codes, 10)
    np.testing.assert_allclose(distances.numpy(), theirs, rtol=1e-4)
    apart = (distances.diff(dim=1) > 1e-4).all(dim=1).numpy()  # no two answers equally near
    assert apart.sum() > 10
    np.testing.assert_array_equal(rows.numpy()[apart], their_rows[apart])


@pytest.mark.parametrize("subspaces", [32, 64])
def test_faiss_finds_the_same_neighbours_in_longer_codes(subspaces):
    items, queries = randn(400, 64, seed=2), randn(20, 64, seed=3)
    codebook = fit_codebook(QuantizationConfig(subspaces=subspaces), items[:200], items[200:])
    codes = encode(codebook, items)
    assert codes.shape == (400, subspaces)
    theirs, their_rows = to_faiss(codebook, codes).search(queries.numpy(), 10)
    distances, rows = search_codes(codebook, queries, codes, 10)
    np.testing.assert_allclose(distances.numpy(), theirs, rtol=1e-4)
    apart = (distances.diff(dim=1) > 1e-3).all(dim=1).numpy()  # no two answers equally near
    assert apart.sum() > 10
    np.testing.assert_array_equal(rows.numpy()[apart], their_rows[apart])


def test_faiss_codes_new_items_alike(bytes_of):
    items = randn(300, 16, seed=4)
    index = to_faiss(bytes_of, torch.zeros(0, 4, dtype=torch.uint8))
    index.add(items.numpy())
    found = faiss.vector_to_array(faiss.downcast_index(index.index).codes).reshape(300, 4)
    assert (found == encode(bytes_of, items).numpy()).all(axis=1).mean() > 0.99  # rounding may turn a tie


def test_faiss_is_only_needed_for_export(bytes_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    codes = encode(bytes_of, randn(3, 16))
    with pytest.raises(EvaluationError, match="faiss, which is not installed: pip install faiss-cpu"):
        to_faiss(bytes_of, codes)


def test_a_saved_codebook_is_the_same(tmp_path):
    codebook, z = small(), randn(10, 8, seed=2)
    save_codebook(codebook, tmp_path)
    opened = open_codebook(tmp_path)
    assert opened.ready
    for name, value in codebook.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    assert torch.equal(encode(opened, z), encode(codebook, z))


@pytest.mark.parametrize("content", [None, b"", b"not a codebook at all"])
def test_a_codebook_that_is_not_there_is_said_so(tmp_path, content):
    if content is not None:
        (tmp_path / "codebook.safetensors").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"codebook.safetensors: no codebook .*; train with objective.quant"):
        open_codebook(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            QuantizationConfig(subspaces=3),
            "found 3 sub-spaces for index vectors of 8 dimensions .*; expected a divisor",
        ),
        (QuantizationConfig(subspaces=0), "found 0 sub-spaces"),
        (
            QuantizationConfig(subspaces=2, codewords=257),
            "found 257 codewords .*; expected at most 256, which one byte",
        ),
        (QuantizationConfig(subspaces=2, codewords=151), "found 150 embeddings .* for 151 codewords"),
    ],
)
def test_codes_that_cannot_be_fitted_or_stored_are_refused(config, message):
    with pytest.raises(SettingsError, match=message):
        fit_codebook(config, randn(60, 8), randn(90, 8, seed=1))


def test_what_does_not_fit_is_refused():
    codebook = small()
    with pytest.raises(EvaluationError, match="found 257 codewords in a sub-space; expected at most 256"):
        encode(ProductCodebook(8, 2, 257), randn(3, 8))
    with pytest.raises(EvaluationError, match=r"shape \(3, 9\); the codebook expects \(N, 8\)"):
        encode(codebook, randn(3, 9))
    with pytest.raises(EvaluationError, match="found 16 codewords in a sub-space; expected 256 to export"):
        to_faiss(codebook, torch.zeros(0, 2, dtype=torch.uint8))
    codes = encode(codebook, randn(3, 8))
    for k, tile, some in ((0, 9, codes), (1, 0, codes), (1, 9, codes[:, :1])):
        with pytest.raises(EvaluationError, match=r"found k = .* and codes of shape .* and codes of shape \(N, 2\)"):
            search_codes(codebook, randn(2, 8), some, k, tile)
