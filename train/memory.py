"""Momentum memory banks: more negatives than the batch holds (SEDE 2; MoCo, He et al., CVPR 2020).

One first-in-first-out queue for each modality remembers the *keys* of past batches: embeddings made by the momentum
network, which follows the trained one slowly, so that keys of different age can be compared. An anchor from the trained
network is ranked against keys only, its partner's key being the positive. Were the positive the partner's embedding
from the trained network, all embeddings could be told from all keys by one common direction, and collapse into a cone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.config import SettingsError
from train.embeddings import Distances, Embeddings
from train.losses.distances import share_no_image


@dataclass(frozen=True)
class EmbeddingShape:
    """The shape of one modality's embeddings, row by row.

    Attributes:
        vector: E; 0 for a host without vectors.
        local: L; 0 without a local space.
        parts: K, parts that the host compares; 0 where it compares vectors.
        part: D, width of such a part.
    """

    vector: int
    local: int = 0
    parts: int = 0
    part: int = 0


class _Queue(nn.Module):
    """Embeddings in fixed places."""

    vector: Tensor
    local: Tensor
    parts: Tensor
    mask: Tensor

    def __init__(self, size: int, shape: EmbeddingShape) -> None:
        super().__init__()
        self.register_buffer("vector", torch.zeros(size, shape.vector))
        self.register_buffer("local", torch.zeros(size, shape.local))
        self.register_buffer("parts", torch.zeros(size, shape.parts, shape.part))
        self.register_buffer("mask", torch.zeros(size, shape.parts, dtype=torch.bool))

    def read(self, count: int) -> Embeddings:
        """The first so many places."""
        return Embeddings(self.vector, self.local, self.parts, self.mask).map(lambda x: x[:count])

    def write(self, places: Tensor, keys: Embeddings) -> None:
        """Into these places (N,), in a copy: the loss of this step may still have to read what was there."""
        for name, buffer in list(self.named_buffers()):
            new: Tensor = getattr(keys, name)
            if new.shape[1:] != buffer.shape[1:]:
                raise ValueError(
                    f"memory bank: found keys whose {name} has shape {tuple(new.shape[1:])} a row; expected "
                    f"{tuple(buffer.shape[1:])}, the shape it was built for"
                )
            if new.numel():
                setattr(self, name, buffer.index_copy(0, places, new.to(buffer.dtype)))


class MemoryBank(nn.Module):
    """The last `size` keys of each modality with the images they show. All of it is in the state.

    Places fill from the first to the last, then the oldest keys are overwritten; `size` need not be a multiple of the
    batch. Every worker enqueues the keys of the global batch, so all hold the same bank.

    Args:
        size: Q, places in each queue.
        image: shape of image keys.
        text: shape of caption keys.

    Raises:
        SettingsError: on a bank without places.
    """

    image_ids: Tensor
    mixed_ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, image: EmbeddingShape, text: EmbeddingShape) -> None:
        super().__init__()
        if size < 1:
            raise SettingsError(f"found a memory bank of {size} keys; expected at least 1")
        self.size = size
        self.image = _Queue(size, image)
        self.text = _Queue(size, text)
        self.register_buffer("image_ids", torch.full((size,), -1))  # -1: nothing there yet
        self.register_buffer("mixed_ids", torch.full((size,), -1))
        self.register_buffer("pointer", torch.tensor(0))  # place of the next key

    @property
    def filled(self) -> int:
        """F, how many keys each queue holds: 0 to Q."""
        return int((self.image_ids >= 0).sum())

    def compare(
        self, image: Embeddings, text: Embeddings, key_image: Embeddings, key_text: Embeddings, distances: Distances
    ) -> tuple[Tensor, Tensor]:
        """Squared distances of anchors to keys: first to those of their own batch, then to the F that are remembered.

        Args:
            image: B images from the trained network.
            text: their captions.
            key_image: the same images from the momentum network.
            key_text: the same captions from the momentum network.
            distances: the host's.

        Returns:
            (B, B + F) of images to caption keys and (B, B + F) of captions to image keys; the pairs' own keys are on
            the diagonals. Empty places are left out: a host cannot compare an image without parts.
        """
        to_texts, to_images = distances(image, key_text), distances(key_image, text).T  # (B, B)
        if count := self.filled:
            to_texts = torch.cat((to_texts, distances(image, self.text.read(count))), 1)  # (B, B + F)
            to_images = torch.cat((to_images, distances(self.image.read(count), text).T), 1)
        return to_texts, to_images

    def negatives(self, image_ids: Tensor, mixed_ids: Tensor) -> Tensor:
        """Which keys are negatives of these pairs: see `share_no_image`.

        Args:
            image_ids: (B,) int64.
            mixed_ids: (B,) int64, `image_ids` again where nothing is mixed.

        Returns:
            (B, F) bool.
        """
        count = self.filled
        return share_no_image(image_ids, mixed_ids, self.image_ids[:count], self.mixed_ids[:count])

    @torch.no_grad()
    def enqueue(self, image: Embeddings, text: Embeddings, image_ids: Tensor, mixed_ids: Tensor) -> None:
        """Remember the keys of a batch; of one larger than the queue, the last `size`.

        Args:
            image: B image keys.
            text: B caption keys.
            image_ids: (B,) int64, 0 or more.
            mixed_ids: (B,) int64.

        Raises:
            ValueError: the keys have another shape than the bank was built for.
        """
        kept = slice(max(0, len(image_ids) - self.size), None)
        image_ids, mixed_ids = image_ids[kept], mixed_ids[kept]
        places = (self.pointer + torch.arange(len(image_ids), device=image_ids.device)) % self.size  # (n,)
        self.image.write(places, image.map(lambda x: x[kept]))
        self.text.write(places, text.map(lambda x: x[kept]))
        self.image_ids[places] = image_ids
        self.mixed_ids[places] = mixed_ids
        self.pointer.copy_((self.pointer + len(image_ids)) % self.size)
