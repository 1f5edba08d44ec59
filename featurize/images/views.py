"""Other looks at the same image: mirrored, or a random part of it that is the same part on every machine."""

import hashlib
from typing import get_args

from PIL import Image, ImageOps

from featurize.config import View


def view(image: Image.Image, name: View, key: str) -> Image.Image:
    """One view of an image.

    Args:
        image: any size and mode.
        name: "plain" (the image itself), "flip" (mirrored left to right), or "crop", "crop2", "crop3", "crop4" (each
            another random part, sides 0.65 to 0.9 of the image's, mirrored in half of the cases).
        key: seeds the crops, e.g. the image id: the same key gives the same places on every machine.

    Raises:
        ValueError: unknown name.
    """
    if name == "plain":
        return image
    if name == "flip":
        return ImageOps.mirror(image)
    if name == "crop":
        return _crop(image, key)
    if name in get_args(View):
        return _crop(image, f"{name} {key}")
    raise ValueError(f"unknown view {name!r}: expected {', '.join(get_args(View))}")


def _crop(image: Image.Image, seed: str) -> Image.Image:
    digest = hashlib.sha256(seed.encode()).digest()
    # Four uniform numbers in [0, 1), 8 bytes each.
    side, across, down, mirrored = (int.from_bytes(digest[i : i + 8]) / 2**64 for i in range(0, 32, 8))
    share = 0.65 + 0.25 * side
    width, height = (max(1, round(share * length)) for length in image.size)
    left, top = round(across * (image.width - width)), round(down * (image.height - height))
    part = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(part) if mirrored < 0.5 else part
