"""Codebooks, the two forms of LESS's quantization: centres for parts (A), product codes for embeddings (B).

Form A is read by the `netvlad` aggregator; form B by the quantization loss and, after training, by search.
"""

import math

import torch
from torch import Tensor, nn

from train.config import SettingsError

NEAREST_RATIO = 100.0  # form A starts with the nearest centre weighing this many times the second nearest


def affinities(points: Tensor, centres: Tensor) -> Tensor:
    """2 p·c - ‖c‖²: minus the squared distance, without the ‖p‖² that is the same for every centre.

    Computed in float32 or wider, also inside an autocast region.

    Args:
        points: (..., N, D).
        centres: (..., M, D), with the same leading dimensions.

    Returns:
        (..., N, M); its softmax over M is the softmax of -‖p - c‖², its largest entry the nearest centre.
    """
    dtype = torch.promote_types(points.dtype, torch.float32)
    with torch.autocast(points.device.type, enabled=False):
        points, centres = points.to(dtype), centres.to(dtype)
        return 2.0 * (points @ centres.mT) - centres.square().sum(-1).unsqueeze(-2)


@torch.no_grad()
def kmeans(points: Tensor, clusters: int, *, seed: int = 0, iterations: int = 25) -> Tensor:
    """Lloyd's k-means from k-means++ seeds (Arthur & Vassilvitskii, SODA 2007).

    It runs on the CPU and gives the same centres for the same seed. A cluster that loses all its points keeps
    its centre.

    Args:
        points: (N, D).
        clusters: M, at most N.
        seed: of the first centres.
        iterations: of Lloyd's two steps; fewer when nothing changes any more.

    Returns:
        (M, D) float32, on the device of `points`.

    Raises:
        SettingsError: when there are fewer points than clusters.
    """
    if len(points) < clusters:
        raise SettingsError(
            f"k-means found {len(points)} points for {clusters} centres; lower "
            "--train.objective.quantization.codewords (or a tower's clusters), or train on more data"
        )
    device, points = points.device, points.float().cpu()
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(points), (1,), generator=generator)
    centres = points[first].repeat(clusters, 1)  # (M, D)
    nearest = torch.full((len(points),), math.inf)  # squared distance to the seeds so far
    for m in range(1, clusters):
        nearest = torch.minimum(nearest, (points - centres[m - 1]).square().sum(1))
        # The smallest normal number keeps the draw defined when every point is a seed already.
        chances = nearest.double() + torch.finfo(torch.float32).tiny
        centres[m] = points[torch.multinomial(chances, 1, generator=generator)[0]]
    own = torch.full((len(points),), -1)
    for _ in range(iterations):
        before, own = own, affinities(points, centres).argmax(1)
        if torch.equal(before, own):
            break
        counts = torch.bincount(own, minlength=clusters)[:, None]
        means = torch.zeros_like(centres).index_add_(0, own, points) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    return centres.to(device)


class PartCodebook(nn.Module):
    """Form A: centres in the space of parts, and how sharply a part chooses among them.

    NetVLAD (Arandjelović et al., TPAMI 2018, section 3.1). One codebook may serve both towers: they then hold
    the same module. Until `initialise` has run, centres are random and the sharpness alpha is D^-½.

    Args:
        clusters: M, at least 2.
        dim: D.

    Raises:
        SettingsError: on fewer than 2 clusters.
    """

    def __init__(self, clusters: int, dim: int) -> None:
        super().__init__()
        if clusters < 2:
            raise SettingsError(f"found {clusters} clusters; expected at least 2 centres to choose from")
        self.centres = nn.Parameter(torch.randn(clusters, dim))
        self.log_sharpness = nn.Parameter(torch.tensor(-0.5 * math.log(dim)))  # log alpha

    def initialise(self, parts: Tensor, seed: int = 0) -> None:
        """Set centres by k-means, and alpha such that the nearest centre outweighs the second 100 to 1.

        The ratio of the two largest weights is exp(alpha (d²_second - d²_nearest)); alpha makes it 100 at the
        mean of that difference.

        Args:
            parts: (N, D), a sample of projected parts; of both modalities where they share the codebook.
            seed: of k-means.

        Raises:
            SettingsError: when the sample has fewer parts than centres, or no two different parts.
        """
        clusters, dim = self.centres.shape
        if parts.ndim != 2 or parts.shape[1] != dim:
            raise SettingsError(f"found a sample of parts of shape {tuple(parts.shape)}; expected (N, {dim})")
        centres = kmeans(parts, clusters, seed=seed)
        two = affinities(parts.detach(), centres).topk(2).values  # (N, 2)
        difference = (two[:, 0] - two[:, 1]).mean()
        if difference <= 0:
            raise SettingsError(
                f"found {len(parts)} sampled parts that coincide; expected different ones: check the "
                "features they come from"
            )
        with torch.no_grad():
            self.centres.copy_(centres)
            self.log_sharpness.copy_((math.log(NEAREST_RATIO) / difference).log())

    def forward(self, parts: Tensor) -> Tensor:
        """Soft assignment a_im = softmax_m(2 alpha c_m·x_i - alpha ‖c_m‖²) = softmax_m(-alpha ‖x_i - c_m‖²).

        Args:
            parts: (B, K, D).

        Returns:
            (B, K, M), each row summing to 1.
        """
        return (self.log_sharpness.exp() * affinities(parts, self.centres)).softmax(-1)


class ProductCodebook(nn.Module):
    """Form B: S sub-spaces with M codewords each, shared by both modalities.

    An embedding is cut into S consecutive pieces of E/S dimensions; each piece becomes the number of its
    nearest codeword. `codewords` has the layout (S, M, E/S) of the centroids of a FAISS product quantizer, so
    a copy of them there gives the same codes. Until `initialise` has run, they are spread as random unit
    vectors are.

    Args:
        dim: E.
        subspaces: S, a divisor of E.
        codewords: M, at least 2; 256 makes each piece one byte.

    Raises:
        SettingsError: when E cannot be cut into S pieces, or on fewer than 2 codewords.
    """

    def __init__(self, dim: int, subspaces: int, codewords: int) -> None:
        super().__init__()
        if subspaces < 1 or dim % subspaces:
            raise SettingsError(
                f"found {dim} dimensions and {subspaces} sub-spaces; expected sub-spaces that divide the dimensions"
            )
        if codewords < 2:
            raise SettingsError(f"found {codewords} codewords; expected at least 2 in each sub-space")
        self.codewords = nn.Parameter(torch.randn(subspaces, codewords, dim // subspaces) * dim**-0.5)

    def initialise(self, embeddings: Tensor, seed: int = 0) -> None:
        """Set the codewords by k-means in each sub-space.

        Args:
            embeddings: (N, E), a sample of both modalities, N at least M.
            seed: of k-means.

        Raises:
            SettingsError: when the sample has fewer embeddings than codewords.
        """
        pieces = self._pieces(embeddings.detach())
        found = [kmeans(piece, self.codewords.shape[1], seed=seed) for piece in pieces]
        with torch.no_grad():
            self.codewords.copy_(torch.stack(found))

    def log_soft_codes(self, z: Tensor, tau: float) -> Tensor:
        """Logarithm of the soft codes a_snm = softmax_m(-‖z_ns - c_sm‖² / τ).

        Args:
            z: (N, E).
            tau: temperature, in squared distance within one sub-space.

        Returns:
            (S, N, M) float32, sub-spaces first.
        """
        return (affinities(self._pieces(z), self.codewords) / tau).log_softmax(-1)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """The hard codes: in each sub-space, the number of the nearest codeword.

        Args:
            z: (N, E).

        Returns:
            (N, S) int64, 0 to M-1.
        """
        return affinities(self._pieces(z), self.codewords).argmax(-1).T

    def decode(self, codes: Tensor) -> Tensor:
        """The embeddings that codes stand for; gradients reach the codewords that were chosen.

        Args:
            codes: (N, S) integers, 0 to M-1.

        Returns:
            (N, E).
        """
        subspace = torch.arange(len(self.codewords), device=self.codewords.device)
        return self.codewords[subspace, codes.long()].flatten(1)  # (N, S, E/S) to (N, E)

    def straight_through(self, codes: Tensor, soft: Tensor) -> Tensor:
        """Hard codes forward, soft codes backward: gradients reach `z` and every codeword by its soft weight.

        Args:
            codes: (N, S), from `encode`.
            soft: (S, N, M), the soft codes of the same embeddings.

        Returns:
            (N, E), in value exactly `decode(codes)`.
        """
        mixed = (soft @ self.codewords).transpose(0, 1).flatten(1)  # (S, N, E/S) to (N, E)
        return self.decode(codes).detach() + (mixed - mixed.detach())

    @torch.no_grad()
    def perplexity(self, codes: Tensor) -> Tensor:
        """How many codewords are in use: exp of the entropy of their frequencies, averaged over sub-spaces.

        Args:
            codes: (N, S).

        Returns:
            A scalar from 1 (all codes equal) to M (all codewords equally often).
        """
        subspaces, codewords, _ = self.codewords.shape
        counts = torch.zeros(subspaces, codewords, device=codes.device)
        counts.scatter_add_(1, codes.long().T, torch.ones_like(codes.T, dtype=counts.dtype))
        nats: Tensor = torch.special.entr(counts / len(codes)).sum(1)  # (S,)
        return nats.exp().mean()

    def _pieces(self, z: Tensor) -> Tensor:
        subspaces, _, width = self.codewords.shape
        if z.ndim != 2 or z.shape[1] != subspaces * width:
            raise SettingsError(f"found embeddings of shape {tuple(z.shape)}; expected (N, {subspaces * width})")
        return z.reshape(-1, subspaces, width).transpose(0, 1)  # (S, N, E/S)
