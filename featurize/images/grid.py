"""The encoder around every network that describes an image by a grid of cells and one pooled vector."""

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from featurize.encoder import JSON, Card, EncoderError, Output, Precision, freeze, frozen_forward, usable_precision
from featurize.images.preprocessing import Preprocessing

COARSE = 3
"""Cells on a side of the coarse grid: few enough to compare every one with every word of every caption."""


class GridEncoder:
    """An `ImageEncoder` with the outputs "grid" (N, D), cells row by row, "coarse" (9, D) and "pooled" (D,).

    Coarse is the grid averaged into 3 by 3 cells; a smaller grid, or one of images that are not square, has none.

    Args:
        name: the card's name.
        weights: `hash_weights` of the network as it was loaded.
        network: (B, 3, H, W) float32 → grid (B, N, D), pooled (B, D). It is frozen in place.
        preprocessing: from images to the network's input.
        precision: of the forward pass; float32 where the device has no bfloat16.
        device: where the network runs, e.g. "cpu", "cuda".
        ingredients: what else could change the outputs; recorded in the card.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        network: nn.Module,
        preprocessing: Preprocessing,
        *,
        precision: Precision,
        device: str,
        ingredients: dict[str, JSON] | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._precision = usable_precision(precision, self._device)
        self._network = network
        self._preprocessing = preprocessing
        freeze(network, self._precision, self._device)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self._device).view(3, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        blank = self.prepare(Image.new("RGB", (32, 32)))
        self.card = Card(
            name=name,
            weights=weights,
            preprocessing={
                **preprocessing.record(),
                **(ingredients or {}),
                "precision": self._precision,
            },
            outputs=tuple(
                Output(output, tuple(values.shape[1:])) for output, values in self.encode(blank[None]).items()
            ),
        )

    def prepare(self, image: Image.Image) -> Tensor:
        """One image, resized and cropped: (3, H, W) uint8 RGB on the CPU. Safe to call from threads."""
        return self._preprocessing.pixels(image)

    def encode(self, batch: Tensor) -> dict[str, Tensor]:
        """Grid, coarse grid and pooled vector of each image.

        Args:
            batch: (B, 3, H, W) uint8, rows made by `prepare`.

        Returns:
            "grid" (B, N, D), "coarse" (B, 9, D) where there is one, and "pooled" (B, D), float32 on the CPU.

        Raises:
            EncoderError: the batch has another dtype or number of axes.
        """
        if batch.dtype != torch.uint8 or batch.dim() != 4:
            raise EncoderError(
                f"expected a uint8 batch (B, 3, H, W) of prepared images, found {batch.dtype} {tuple(batch.shape)}"
            )
        with frozen_forward(self._precision, self._device):
            images = batch.to(self._device).to(torch.float32, memory_format=torch.channels_last)
            images.sub_(self._mean).div_(self._std)
            grid, pooled = self._network(images)  # (B, N, D), (B, D)
            outputs = {"grid": grid.cpu().float(), "pooled": pooled.cpu().float()}
        side = math.isqrt(grid.shape[1])
        if side >= COARSE and side * side == grid.shape[1] and batch.shape[2] == batch.shape[3]:
            square = outputs["grid"].mT.unflatten(2, (side, side))  # (B, D, side, side)
            outputs["coarse"] = F.adaptive_avg_pool2d(square, COARSE).flatten(2).mT
        return outputs


def cells(features: Tensor) -> tuple[Tensor, Tensor]:
    """A convolutional map (B, D, h, w) as a grid (B, h·w, D) and its mean (B, D) in float32."""
    grid = features.flatten(2).transpose(1, 2)
    return grid, grid.float().mean(1)
