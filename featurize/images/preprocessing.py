"""From an RGB image of any size to the pixels that a network takes."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featurize.encoder import JSON

_LONGEST = 8  # a side longer than this times the other is cut before the short one is enlarged


class Preprocessing(Protocol):
    """How images become a network's input: pixels of one size, of which the batch is normalised."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, in units of 0 to 255."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, in units of 0 to 255."""
        ...

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8, the same H and W for every image."""
        ...

    def record(self) -> dict[str, JSON]:
        """All that decides the pixels and their normalisation."""
        ...


@dataclass(frozen=True)
class Whole:
    """The whole image, squeezed to a square: captions speak of its edges too.

    Networks trained on random crops with aspect ratios 3:4 to 4:3 (Inception's augmentation) take it well.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, size, size) uint8."""
        return to_tensor(rgb(image).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def record(self) -> dict[str, JSON]:
        """All that decides the pixels and their normalisation."""
        return {
            "resize": [self.size, self.size],
            "filter": "bicubic",
            "mean": list(self.mean),
            "std": list(self.std),
        }


@dataclass(frozen=True)
class ResizeAndCrop:
    """The shorter side becomes `resize`, then the centre square of `crop` is cut out, as torchvision does."""

    resize: int
    crop: int
    filter: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, crop, crop) uint8."""
        image = shorten(rgb(image))
        width, height = image.size
        short = min(width, height)
        size = (int(self.resize * width / short), int(self.resize * height / short))
        image = image.resize(size, self.filter)
        left, top = round((size[0] - self.crop) / 2), round((size[1] - self.crop) / 2)
        return to_tensor(image.crop((left, top, left + self.crop, top + self.crop)))

    def record(self) -> dict[str, JSON]:
        """All that decides the pixels and their normalisation."""
        return {
            "resize": self.resize,
            "crop": self.crop,
            "filter": self.filter.name.lower(),
            "mean": list(self.mean),
            "std": list(self.std),
        }


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; one from `decode` is so already."""
    return image if image.mode == "RGB" else image.convert("RGB")


def shorten(image: Image.Image) -> Image.Image:
    """The middle of an extremely long image, so that enlarging its short side cannot exhaust the memory."""
    longest = _LONGEST * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (H, W, 3) → (3, H, W)
