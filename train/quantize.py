"""Codebooks, the two forms of LESS's quantization: centres for parts (A), product codes for embeddings (B).

Form A is read by the `netvlad` aggregator; form B by the quantization loss and, after training, by search.
"""

import math

import torch
from torch import Tensor, nn

from train.config import SettingsError

DEAD = 0.05  # form B: a codeword used less than this share of the average begins again
TILE = 4096  # form B: embeddings that are encoded at once, each against S · M codewords
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


@torch.no_grad()
def dealt_axes(points: Tensor, subspaces: int) -> Tensor:
    """A rotation after which every sub-space holds about as much of the points' variance as the others.

    The principal axes, most variance first, are dealt to the sub-spaces in snake order (0, 1, ..., S-1, S-1, ..., 1, 0,
    0, ...). Computed on the CPU in float64; an axis points to where its largest coefficient is positive.

    Args:
        points: (N, E).
        subspaces: S, a divisor of E.

    Returns:
        (E, E) float32 orthogonal, on the device of `points`: `points @ rotation` are the rotated points, and its
        columns s·E/S to (s+1)·E/S - 1 are the axes of sub-space s.
    """
    device, points = points.device, points.double().cpu()
    centred = points - points.mean(0)
    axes: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)  # (E, E), most variance first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    rounds = torch.arange(len(axes)).reshape(-1, subspaces)  # (E/S, S) axes in the order they are dealt
    rounds[1::2] = rounds[1::2].flip(1)
    return axes[:, rounds.T.flatten()].float().to(device)


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
    """Form B: a rotation, then S sub-spaces with M codewords each, shared by both modalities.

    A rotated embedding is cut into S consecutive pieces of E/S dimensions; each piece becomes the number of its
    nearest codeword. A rotation changes no distance. `codewords` has the layout (S, M, E/S) of the centroids of a FAISS
    product quantizer, so a copy of them there gives the same codes. Until `initialise` has run, the codebook is not
    `ready`: nothing is rotated, and codewords are spread as random unit vectors are. Then they follow the embeddings as
    moving averages (VQ-VAE-2, Razavi et al., NeurIPS 2019, equation 2), not by gradient.

    Args:
        dim: E.
        subspaces: S, a divisor of E.
        codewords: M, at least 2; 256 makes each piece one byte.

    Raises:
        SettingsError: when E cannot be cut into S pieces, or on fewer than 2 codewords.
    """

    codewords: Tensor
    counts: Tensor
    rotation: Tensor
    spread: Tensor
    ready: Tensor

    def __init__(self, dim: int, subspaces: int, codewords: int) -> None:
        super().__init__()
        if subspaces < 1 or dim % subspaces:
            raise SettingsError(
                f"found {dim} dimensions and {subspaces} sub-spaces; expected sub-spaces that divide the dimensions"
            )
        if codewords < 2:
            raise SettingsError(f"found {codewords} codewords; expected at least 2 in each sub-space")
        self.register_buffer("codewords", torch.randn(subspaces, codewords, dim // subspaces) * dim**-0.5)
        self.register_buffer("counts", torch.ones(subspaces, codewords))  # of a batch's pieces, moving average
        self.register_buffer("rotation", torch.eye(dim))
        self.register_buffer("spread", torch.tensor(1.0))  # mean squared distance of a piece to its codeword
        self.register_buffer("ready", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, embeddings: Tensor, seed: int = 0) -> None:
        """Take the rotation of `dealt_axes`, and codewords by k-means in each sub-space.

        Args:
            embeddings: (N, E), a sample of both modalities, N at least M.
            seed: of k-means.

        Raises:
            SettingsError: when the sample has fewer embeddings than codewords, or another number of dimensions.
        """
        subspaces, codewords, _ = self.codewords.shape
        self._check(embeddings)
        self.rotation.copy_(dealt_axes(embeddings, subspaces))
        pieces = self.pieces(embeddings)
        self.codewords.copy_(torch.stack([kmeans(piece, codewords, seed=seed) for piece in pieces]))
        codes = self.encode(embeddings)
        self.counts.copy_(self._counted(codes))
        error = (embeddings - self.decode(codes)).square().sum(1).mean()
        self.spread.copy_((error / subspaces).clamp_min(torch.finfo(torch.float32).tiny))
        self.ready.fill_(True)

    @torch.no_grad()
    def follow(self, z: Tensor, codes: Tensor, decay: float) -> None:
        """Move each codeword towards the mean of the pieces that chose it; a codeword out of use starts again.

        With n pieces of the batch and their sum Σ: N' = decay · N + (1 - decay) · n, and c becomes
        (decay · N · c + (1 - decay) · Σ) / N'. Where N' is less than DEAD times its mean over codewords, c becomes a
        piece of this batch, those furthest from their codewords first, and N' the mean.

        Args:
            z: (N, E) a batch.
            codes: (N, S) its codes.
            decay: 0 to 1.
        """
        pieces, chosen = self.pieces(z), codes.long().T  # (S, N, E/S), (S, N)
        words = self.codewords.clone()
        kept = decay * self.counts
        counts = kept + (1 - decay) * self._counted(codes)  # (S, M)
        for subspace, piece in enumerate(pieces):
            sums = torch.zeros_like(words[subspace]).index_add_(0, chosen[subspace], piece)
            moved = kept[subspace, :, None] * words[subspace] + (1 - decay) * sums
            used = counts[subspace, :, None]
            words[subspace] = torch.where(used > 0, moved / used, words[subspace])
            mean = counts[subspace].mean()
            dead = (counts[subspace] < DEAD * mean).nonzero()[: len(piece), 0]
            if len(dead):
                gaps = (piece - words[subspace, chosen[subspace]]).square().sum(1)
                words[subspace, dead] = piece[gaps.topk(len(dead)).indices]
                counts[subspace, dead] = mean
        # New tensors: the loss of this step may still have to read the old ones.
        self.codewords, self.counts = words, counts

    def _counted(self, codes: Tensor) -> Tensor:
        """How many of the codes (N, S) name each codeword: (S, M) float."""
        counts = torch.zeros(self.codewords.shape[:2], device=codes.device)
        return counts.scatter_add_(1, codes.long().T, torch.ones_like(codes.T, dtype=counts.dtype))

    def log_soft_codes(self, z: Tensor, tau: float) -> Tensor:
        """Logarithm of the soft codes a_snm = softmax_m(-‖z_ns - c_sm‖² / (τ · spread)).

        Args:
            z: (N, E).
            tau: temperature, in units of `spread`, the error of a piece when the codebook was initialised; 1 before.

        Returns:
            (S, N, M) float32, sub-spaces first.
        """
        return (affinities(self.pieces(z), self.codewords) / (tau * self.spread)).log_softmax(-1)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """The hard codes: in each sub-space, the number of the nearest codeword.

        Args:
            z: (N, E).

        Returns:
            (N, S) int64, 0 to M-1.
        """
        found = [affinities(self.pieces(some), self.codewords).argmax(-1).T for some in torch.split(z, TILE)]
        return torch.cat(found)

    def decode(self, codes: Tensor) -> Tensor:
        """The embeddings (N, E) that codes (N, S), integers from 0 to M-1, stand for."""
        subspace = torch.arange(len(self.codewords), device=self.codewords.device)
        rotated = self.codewords[subspace, codes.long()].flatten(1)  # (N, S, E/S) to (N, E)
        with torch.autocast(rotated.device.type, enabled=False):
            return rotated @ self.rotation.T

    @torch.no_grad()
    def perplexity(self, codes: Tensor) -> Tensor:
        """How many codewords are in use: exp of the entropy of their frequencies, averaged over sub-spaces.

        Args:
            codes: (N, S).

        Returns:
            A scalar from 1 (all codes equal) to M (all codewords equally often).
        """
        nats: Tensor = torch.special.entr(self._counted(codes) / len(codes)).sum(1)  # (S,)
        return nats.exp().mean()

    def pieces(self, z: Tensor) -> Tensor:
        """Rotated embeddings, cut: (N, E) to (S, N, E/S)."""
        self._check(z)
        dtype = torch.promote_types(z.dtype, torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            rotated = z.to(dtype) @ self.rotation.to(dtype)
        return rotated.reshape(len(z), len(self.codewords), -1).transpose(0, 1)

    def _check(self, z: Tensor) -> None:
        dim = len(self.rotation)
        if z.ndim != 2 or z.shape[1] != dim:
            raise SettingsError(f"found embeddings of shape {tuple(z.shape)}; expected (N, {dim})")
