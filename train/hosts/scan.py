"""The `scan` host: every word looks at an image's parts, and every part at the words (SCAN, Lee et al., ECCV 2018).

With unit parts v_k and unit words e_l, s_kl = v_k·e_l. Text to image (equations 6 to 9), for each word l:

    s̄_kl = [s_kl]₊ / ‖[s_k·]₊‖ over words,   α_kl = softmax_k(λ₁ s̄_kl),   a_l = Σ_k α_kl v_k,   R_l = cos(e_l, a_l)

Image to text (equations 1 to 4) swaps the roles. The similarity is the mean of R over words (parts), or
log-mean-exp(λ₂ R) / λ₂: a mean where the paper takes a sum, so that it stays in [-1, 1] whatever the number of words.
d² = 2 - 2 s, as for unit vectors.

Attended vectors are never built: e_l·a_l = Σ_k α_kl s_kl and ‖a_l‖² = α_lᵀ G α_l with G = V Vᵀ, so N images against M
captions need one matrix product and a few passes over (N, K, M, L) numbers instead of (N, M, L, D). These passes go
over blocks of captions of about equal length, which hold little padding; while training the blocks of large batches
are computed a second time instead of kept, so memory does not grow with N·K·M·L.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from train.batches import Features
from train.config import ModelConfig, SettingsError
from train.contexts import real_first, take
from train.embeddings import Embeddings
from train.hosts.host import Host
from train.noise import Noise
from train.towers import Dims, Encoded, Tower

_BLOCK = 2**21
"""Numbers (N, K, M, L) that are compared at once: more are no faster, and fewer waste time on many small passes."""

_KEPT = 2**23
"""Numbers (N, K, M, L), captions' padding aside, whose passes are kept for the backward pass, some 400 MB; of more they
are computed again."""

_TINY = 1e-8
_FLOOR = 0.05
"""Added to the length below s̄, in squares: where hardly anything is positive, s̄ must not jump from 0 to 1."""


class CrossAttentionHost(Host):
    """Two towers whose parts are compared with each other: no index, evaluation in tiles.

    Args:
        config: of the model.
        image: widths of the image features; parts only.
        text: widths of the caption features; parts only.

    Raises:
        SettingsError: a tower without parts, or with something else; settings that only vectors have.
    """

    indexable = False

    def __init__(self, config: ModelConfig, image: Dims, text: Dims) -> None:
        super().__init__(config)
        for name, dims in (("image", image), ("text", text)):
            if not dims.parts or dims.vectors or dims.words:
                raise SettingsError(
                    f"host scan compares parts and nothing else: set model.{name}.parts (grid or cells of images, "
                    f"tokens of captions) and empty model.{name}.vectors and model.{name}.bags"
                )
        if config.blocks != 1 or config.shared_codebook or not config.normalise:
            raise SettingsError(
                f"host scan compares unit parts and pools none: found model.blocks {config.blocks}, "
                f"model.shared_codebook {config.shared_codebook} and model.normalise {config.normalise}; expected 1, "
                "False and True"
            )
        if config.local.dim:
            raise SettingsError("host scan has no single vector to join a local space to; set model.local.dim 0")
        if config.scan.attention <= 0 or config.scan.sharpness <= 0 or config.scan.words < 1:
            raise SettingsError(
                f"found scan attention {config.scan.attention}, sharpness {config.scan.sharpness}, words "
                f"{config.scan.words}; expected all above 0"
            )
        self.image = Tower(config.image, config.dim, image, part_dim=config.dim)
        self.text = Tower(config.text, config.dim, text, part_dim=config.dim)

    def finish_images(self, encoded: Encoded, mask: Tensor | None = None) -> Embeddings:
        """See `Host.finish_images`."""
        return _parts(encoded.parts, encoded.mask if mask is None else mask)

    def encode_texts(self, features: Features, noise: Noise | None = None) -> Encoded:
        """See `Host.encode_texts`; real words come first, and are cut or padded to `scan.words`."""
        encoded = self.text.encode(features, noise)
        order = real_first(encoded.mask)[:, : self.config.scan.words]
        room = self.config.scan.words - order.shape[1]
        words, mask = take(encoded.parts, order), encoded.mask.gather(1, order)
        return Encoded(encoded.whole, F.pad(words, (0, 0, 0, room)), F.pad(mask, (0, room)))

    def finish_texts(self, encoded: Encoded, mask: Tensor | None = None) -> Embeddings:
        """See `Host.finish_texts`."""
        return _parts(encoded.parts, encoded.mask if mask is None else mask)

    def distances(self, image: Embeddings, text: Embeddings) -> Tensor:
        """2 - 2 s for N images and M captions: (N, M) in [0, 4]."""
        return 2.0 - 2.0 * self.similarity(image, text)

    def similarity(self, image: Embeddings, text: Embeddings) -> Tensor:
        """The score s (N, M): text to image, image to text, or the mean of both, as `scan.direction` says."""
        order = text.mask.sum(1).argsort()  # (M,)
        room = _BLOCK if image.parts.device.type == "cpu" else 16 * _BLOCK  # a GPU wants fewer and larger ones
        each = max(1, image.mask.numel() * text.mask.shape[1])  # numbers of one caption
        learns = torch.is_grad_enabled() and (image.parts.requires_grad or text.parts.requires_grad)
        recompute = learns and image.mask.numel() * int(text.mask.sum()) > _KEPT
        found = []
        for rows in torch.split(order, max(1, room // each)):
            block = image.parts, image.mask, *_trimmed(text.parts[rows], text.mask[rows])
            found.append(checkpoint(self._compare, *block, use_reentrant=False) if recompute else self._compare(*block))
        return torch.cat(found, 1)[:, order.argsort()]

    def _compare(self, parts: Tensor, part_mask: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """Similarity (N, M) of unit parts (N, K, D) and unit words (M, L, D)."""
        dots = (parts.flatten(0, 1) @ words.flatten(0, 1).T).view(*parts.shape[:2], *words.shape[:2])  # (N, K, M, L)
        found = []
        if self.config.scan.direction in ("t2i", "both"):
            found.append(self._attend(dots, parts, part_mask, word_mask))
        if self.config.scan.direction in ("i2t", "both"):
            found.append(self._attend(dots.permute(2, 3, 0, 1), words, word_mask, part_mask).T)
        return torch.stack(found).mean(0)

    def _attend(self, dots: Tensor, keys: Tensor, key_mask: Tensor, query_mask: Tensor) -> Tensor:
        """Similarity (N, M) where each of M items' Q queries attends over each of N items' K keys.

        Args:
            dots: (N, K, M, Q) products of unit keys and unit queries, 0 at masked ones.
            keys: (N, K, D) unit.
            key_mask: (N, K).
            query_mask: (M, Q).
        """
        weights = self.attention(dots, key_mask)  # (N, K, M, Q)
        toward = (weights * dots).sum(1)  # (N, M, Q) query · attended
        gram = keys @ keys.mT  # (N, K, K)
        flat = weights.flatten(2)  # (N, K, M·Q)
        squared = ((gram @ flat) * flat).sum(1).view_as(toward)
        cosine = toward * squared.clamp_min(_TINY).rsqrt()
        count = query_mask.sum(1).clamp_min(1)  # (M,)
        if self.config.scan.pooling == "mean":
            return (cosine * query_mask).sum(2) / count
        sharpness = self.config.scan.sharpness
        lowest = torch.finfo(cosine.dtype).min
        total = torch.logsumexp((sharpness * cosine).masked_fill(~query_mask, lowest), 2)
        pooled = (total - count.log()) / sharpness
        return pooled.masked_fill(~query_mask.any(1), 0.0)

    def attention(self, dots: Tensor, key_mask: Tensor) -> Tensor:
        """Attention over keys (N, K, M, Q), summing to 1 over K; see the file's docstring."""
        positive = dots.clamp_min(0.0)
        per_length = (positive.square().sum(3, keepdim=True) + _FLOOR**2).rsqrt()  # (N, K, M, 1)
        masked = torch.where(key_mask, 0.0, torch.finfo(dots.dtype).min)  # added: its backward pass is free
        return (positive * (self.config.scan.attention * per_length) + masked[:, :, None, None]).softmax(1)

    def guidance(self, image: Encoded, text: Encoded, embedded: tuple[Embeddings, Embeddings]) -> tuple[Tensor, Tensor]:
        """Mean over the pair's words of their attention to parts, and the reverse; see `Host.guidance`."""
        parts, words = embedded[0], embedded[1]
        dots = (parts.parts @ words.parts.mT)[:, :, None]  # (B, K, 1, L), each image with its caption
        over_parts = _mean_attention(self.attention(dots, parts.mask), words.mask)
        over_words = _mean_attention(self.attention(dots.permute(0, 3, 2, 1), words.mask), parts.mask)
        return over_parts * image.mask, over_words * text.mask

    def mean_of_views(self, views: Sequence[Embeddings]) -> Embeddings:
        """All views' parts: every word may look at each of them."""
        return Embeddings(
            views[0].vector,
            views[0].local,
            torch.cat([view.parts for view in views], 1),
            torch.cat([view.mask for view in views], 1),
        )


def _trimmed(words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Captions (M, L, D) with their real words in front, cut to the longest of them."""
    order = real_first(mask)[:, : max(1, int(mask.sum(1).max()))]
    return take(words, order), mask.gather(1, order)


def _parts(parts: Tensor, mask: Tensor) -> Embeddings:
    """Unit parts, zeros where masked."""
    unit = F.normalize(parts.float(), dim=-1) * mask[..., None]
    rows = len(parts)
    return Embeddings(unit.new_zeros(rows, 0), unit.new_zeros(rows, 0), unit, mask)


def _mean_attention(weights: Tensor, query_mask: Tensor) -> Tensor:
    """Mean over the real queries of (B, K, 1, Q) attention: (B, K)."""
    masked = weights.squeeze(2) * query_mask[:, None, :]
    return masked.sum(2) / query_mask.sum(1, keepdim=True).clamp_min(1)
