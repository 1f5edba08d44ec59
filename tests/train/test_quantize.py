"""Codebooks against plain loops, and product codes against FAISS with the same centroids."""

import math

import faiss
import numpy as np
import pytest
import torch

from train.quantize import PartCodebook, ProductCodebook, affinities, dealt_axes, kmeans


def blobs(centres, each, spread, seed=0):
    rng = np.random.default_rng(seed)
    points = np.concatenate([c + spread * rng.standard_normal((each, len(c))) for c in np.asarray(centres)])
    return torch.tensor(rng.permutation(points), dtype=torch.float32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_affinities_are_minus_squared_distances_up_to_a_constant_per_point():
    points, centres = randn(2, 5, 3), randn(2, 4, 3, seed=1)
    found = affinities(points, centres) - points.square().sum(-1, keepdim=True)
    for g in range(2):
        for n in range(5):
            for m in range(4):
                expected = -sum((points[g, n, d] - centres[g, m, d]).item() ** 2 for d in range(3))
                assert found[g, n, m].item() == pytest.approx(expected, abs=1e-5)


def test_affinities_keep_float32_under_autocast():
    points, centres = randn(6, 32), randn(4, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = affinities(points, centres)
    assert torch.equal(low, affinities(points, centres))


def test_kmeans_finds_separated_blobs():
    true = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]]
    found = kmeans(blobs(true, 50, 0.1), 4, seed=3)
    np.testing.assert_allclose(sorted(found.tolist(), key=lambda c: np.round(c).tolist()), sorted(true), atol=0.1)


def test_kmeans_ends_where_lloyd_ends():
    """Each centre is the mean of the points nearest to it."""
    points = randn(60, 3)
    centres = kmeans(points, 5, iterations=200)
    own = [min(range(5), key=lambda m, p=p: float(((p - centres[m]) ** 2).sum())) for p in points]
    for m in range(5):
        members = points[[i for i, o in enumerate(own) if o == m]]
        torch.testing.assert_close(members.mean(0), centres[m])


def test_kmeans_repeats_for_a_seed_and_differs_between_seeds():
    points = randn(200, 4)
    assert torch.equal(kmeans(points, 8, seed=1), kmeans(points, 8, seed=1))
    assert not torch.equal(kmeans(points, 8, seed=1), kmeans(points, 8, seed=2))


def test_kmeans_of_coinciding_points_gives_that_point():
    assert torch.equal(kmeans(torch.full((5, 2), 3.0), 3), torch.full((3, 2), 3.0))


def test_kmeans_needs_a_point_for_each_cluster():
    with pytest.raises(ValueError, match="k-means found 2 points for 3 centres; lower"):
        kmeans(torch.zeros(2, 4), 3)


def test_part_assignment_is_the_softmax_of_squared_distances():
    codebook = PartCodebook(3, 2)
    with torch.no_grad():
        codebook.centres.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
        codebook.log_sharpness.fill_(math.log(0.5))
    found = codebook(torch.tensor([[[1.0, 1.0]]]))[0, 0]  # squared distances 2, 1, 2
    weights = [math.exp(-1.0), math.exp(-0.5), math.exp(-1.0)]
    torch.testing.assert_close(found, torch.tensor(weights) / sum(weights))


def test_initialise_makes_the_nearest_centre_outweigh_the_second_100_to_1():
    """Two tight blobs 2 apart: nearest at 0, second at 4, so alpha = ln(100) / 4."""
    codebook = PartCodebook(2, 2)
    codebook.initialise(blobs([[0.0, 0.0], [2.0, 0.0]], 40, 1e-4))
    np.testing.assert_allclose(sorted(codebook.centres.tolist()), [[0.0, 0.0], [2.0, 0.0]], atol=1e-3)
    assert codebook.log_sharpness.exp().item() == pytest.approx(math.log(100) / 4, rel=1e-3)
    weights = codebook(torch.tensor([[[0.0, 0.0]]])).flatten()
    assert (weights.max() / weights.min()).item() == pytest.approx(100, rel=1e-2)


def test_part_codebook_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="found 1 clusters; expected at least 2"):
        PartCodebook(1, 4)
    codebook = PartCodebook(2, 4)
    with pytest.raises(ValueError, match=r"shape \(3, 5\); expected \(N, 4\)"):
        codebook.initialise(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="found 6 sampled parts that coincide"):
        codebook.initialise(torch.full((6, 4), 0.3))


def test_principal_axes_are_dealt_in_snake_order():
    """Eight axes of known variance, two sub-spaces: the first takes the 1st, 4th, 5th and 8th, the second the rest."""
    scales = torch.tensor([3.0, 8, 1, 5, 7, 2, 6, 4])
    corners = torch.cat((torch.eye(8), -torch.eye(8))) * scales
    rotation = dealt_axes(corners + 0.5, 2)
    expected = torch.zeros(8, 8)
    for column, place in enumerate([1, 3, 7, 2, 4, 6, 0, 5]):  # scales 8, 5, 4, 1 and 7, 6, 3, 2
        expected[place, column] = 1
    torch.testing.assert_close(rotation, expected)


def test_dealt_axes_rotate_and_share_the_variance_equally():
    points = randn(400, 12) * torch.tensor([1.2**k for k in range(12)])
    rotation = dealt_axes(points, 3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(12), atol=1e-5, rtol=0)
    rotated = points @ rotation
    within = torch.cov(rotated.T) * (1 - torch.eye(12))
    assert within.abs().max() < 1e-3 * rotated.var(0).max()
    shares = rotated.var(0).reshape(3, 4).sum(1) / rotated.var(0).sum()
    assert shares.max() < 0.42
    assert points.var(0).reshape(3, 4).sum(1)[-1] / points.var(0).sum() > 0.7


def test_dealt_axes_have_one_sign():
    points = randn(50, 6)
    torch.testing.assert_close(dealt_axes(points, 2), dealt_axes(-points, 2))


def faiss_quantizer(codebook):
    subspaces, codewords, width = codebook.codewords.shape
    quantizer = faiss.ProductQuantizer(subspaces * width, subspaces, int(math.log2(codewords)))
    faiss.copy_array_to_vector(codebook.codewords.numpy().ravel(), quantizer.centroids)
    return quantizer


def test_codes_equal_those_of_faiss_with_the_same_centroids():
    codebook = ProductCodebook(32, 4, 256)
    z = torch.nn.functional.normalize(randn(500, 32), dim=1)
    quantizer = faiss_quantizer(codebook)
    codes = codebook.encode(z)
    np.testing.assert_array_equal(codes.numpy(), quantizer.compute_codes(z.numpy()))
    np.testing.assert_array_equal(codebook.decode(codes).numpy(), quantizer.decode(codes.numpy().astype(np.uint8)))


def test_initialise_is_as_good_as_faiss_training():
    """Mean squared error of our codes within 5 % of that of a FAISS product quantizer behind the same rotation."""
    z = torch.nn.functional.normalize(randn(1500, 16) @ randn(16, 16, seed=1), dim=1)
    codebook = ProductCodebook(16, 2, 16)
    assert not codebook.ready
    codebook.initialise(z)
    assert codebook.ready
    rotated = (z @ dealt_axes(z, 2)).numpy()
    quantizer = faiss.ProductQuantizer(16, 2, 4)
    quantizer.train(rotated)
    theirs = np.square(quantizer.decode(quantizer.compute_codes(rotated)) - rotated).sum(1).mean()
    ours = (codebook.decode(codebook.encode(z)) - z).square().sum(1).mean().item()
    assert ours < 1.05 * theirs
    assert codebook.spread.item() == pytest.approx(ours / 2, rel=1e-5)


def test_an_initialised_codebook_uses_every_codeword():
    z = randn(400, 8)
    codebook = ProductCodebook(8, 2, 16)
    codebook.initialise(z)
    codes = codebook.encode(z)
    assert [len(codes[:, s].unique()) for s in range(2)] == [16, 16]


def test_a_rotated_codebook_equals_an_unrotated_one_in_rotated_space():
    z = randn(20, 8)
    codebook, plain = ProductCodebook(8, 2, 4), ProductCodebook(8, 2, 4)
    codebook.initialise(randn(100, 8, seed=1))
    plain.codewords = codebook.codewords
    codes = codebook.encode(z)
    assert torch.equal(codes, plain.encode(z @ codebook.rotation))
    torch.testing.assert_close(codebook.decode(codes) @ codebook.rotation, plain.decode(codes), atol=1e-5, rtol=1e-5)
    tau = 0.4
    torch.testing.assert_close(
        codebook.log_soft_codes(z, tau), plain.log_soft_codes(z @ codebook.rotation, tau * codebook.spread.item())
    )


def test_soft_codes_equal_a_loop():
    codebook = ProductCodebook(6, 3, 4)
    z, tau = randn(5, 6), 0.7
    found = codebook.log_soft_codes(z, tau).exp()
    assert found.shape == (3, 5, 4)
    for s in range(3):
        for n in range(5):
            squares = [
                sum((z[n, 2 * s + d] - codebook.codewords[s, m, d]).item() ** 2 for d in range(2)) for m in range(4)
            ]
            weights = [math.exp(-q / tau) for q in squares]
            torch.testing.assert_close(found[s, n], torch.tensor(weights) / sum(weights))


def test_encode_picks_the_nearest_codeword_of_each_piece_and_decode_returns_it():
    codebook = ProductCodebook(4, 2, 2)
    codebook.codewords = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[5.0, 5.0], [-5.0, -5.0]]])
    codes = codebook.encode(torch.tensor([[0.9, 0.8, -1.0, -2.0], [0.1, 0.2, 9.0, 9.0]]))
    assert codes.tolist() == [[1, 1], [0, 0]]
    assert codebook.decode(codes).tolist() == [[1.0, 1.0, -5.0, -5.0], [0.0, 0.0, 5.0, 5.0]]
    assert codebook.decode(codes.to(torch.uint8)).tolist() == codebook.decode(codes).tolist()


def followed(words, counts, z, decay):
    """The moving averages, one codeword at a time."""
    words, counts = [list(map(list, space)) for space in words], [list(space) for space in counts]
    width = len(words[0][0])
    for s, (space, used) in enumerate(zip(words, counts, strict=True)):
        members = [[] for _ in space]
        for row in z:
            piece = row[s * width : (s + 1) * width]
            gaps = [sum((p - c) ** 2 for p, c in zip(piece, word, strict=True)) for word in space]
            members[gaps.index(min(gaps))].append(piece)
        for m, chosen in enumerate(members):
            count = decay * used[m] + (1 - decay) * len(chosen)
            for d in range(width):
                total = sum(piece[d] for piece in chosen)
                space[m][d] = (decay * used[m] * space[m][d] + (1 - decay) * total) / count
            used[m] = count
    return words, counts


def test_codewords_follow_the_pieces_that_choose_them():
    codebook = ProductCodebook(6, 3, 4)
    codebook.counts = 1 + torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    words, counts = codebook.codewords.tolist(), codebook.counts.tolist()
    for seed in range(2):
        z = randn(9, 6, seed=seed)
        words, counts = followed(words, counts, z.tolist(), 0.8)
        codebook.follow(z, codebook.encode(z), 0.8)
    torch.testing.assert_close(codebook.codewords, torch.tensor(words))
    torch.testing.assert_close(codebook.counts, torch.tensor(counts))


def test_following_still_data_ends_at_its_means():
    """Two blobs in each sub-space, codewords off their means: moving averages find them."""
    z = blobs([[0.0, 5.0], [4.0, 9.0]], 30, 0.1)
    codebook = ProductCodebook(2, 2, 2)
    codebook.codewords = torch.tensor([[[1.0], [3.0]], [[4.0], [10.0]]])
    for _ in range(200):
        codebook.follow(z, codebook.encode(z), 0.9)
    near = z[:, 0] < 2
    expected = torch.stack((z[near].mean(0), z[~near].mean(0)), 1)[:, :, None]
    torch.testing.assert_close(codebook.codewords, expected, atol=1e-4, rtol=1e-4)


def test_a_codeword_out_of_use_begins_again_at_the_worst_coded_piece():
    codebook = ProductCodebook(1, 1, 3)
    codebook.codewords = torch.tensor([[[0.0], [10.0], [1000.0]]])
    z = torch.tensor([[0.0]] * 4 + [[10.0]] * 4 + [[14.0]])
    for _ in range(40):
        codebook.follow(z, codebook.encode(z), 0.9)
    assert sorted(codebook.codewords.flatten().tolist()) == pytest.approx([0.0, 10.0, 14.0], abs=0.3)
    assert codebook.perplexity(codebook.encode(z)).item() == pytest.approx(
        math.exp(-(8 / 9) * math.log(4 / 9) - math.log(1 / 9) / 9)
    )


def test_a_codeword_that_nothing_ever_chose_stays_finite():
    """More codewords out of use than the batch has pieces."""
    codebook = ProductCodebook(1, 1, 8)
    codebook.counts.zero_()
    z = torch.tensor([[0.5], [0.6]])
    codebook.follow(z, codebook.encode(z), 0.9)
    assert torch.isfinite(codebook.codewords).all()


def test_perplexity_counts_the_codewords_in_use():
    codebook = ProductCodebook(4, 2, 4)
    one, all_four = torch.zeros(8, dtype=torch.int64), torch.arange(8) % 4
    assert codebook.perplexity(torch.stack((one, one), 1)).item() == pytest.approx(1.0)
    assert codebook.perplexity(torch.stack((all_four, all_four), 1)).item() == pytest.approx(4.0)
    assert codebook.perplexity(torch.stack((one, all_four), 1)).item() == pytest.approx(2.5)


@pytest.mark.parametrize("subspaces", [3, 0])
def test_subspaces_must_divide_the_dimensions(subspaces):
    with pytest.raises(ValueError, match=f"found 16 dimensions and {subspaces} sub-spaces; expected sub-spaces that"):
        ProductCodebook(16, subspaces, 8)


def test_product_codebook_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="found 1 codewords; expected at least 2"):
        ProductCodebook(16, 4, 1)
    with pytest.raises(ValueError, match=r"shape \(3, 15\); expected \(N, 16\)"):
        ProductCodebook(16, 4, 8).encode(torch.zeros(3, 15))
    with pytest.raises(ValueError, match="k-means found 3 points for 8 centres; lower"):
        ProductCodebook(16, 4, 8).initialise(torch.zeros(3, 16))
