"""Frozen networks at work: what they say of images and captions, in batches, on this process's device."""

import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from featurize.encoder import ImageEncoder, Precision, TextEncoder
from featurize.images import open_image_encoder
from featurize.shards import Array
from featurize.texts import open_text_encoder


def device() -> str:
    """Where networks of this process run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=8)
def image_encoder(reference: str, precision: Precision) -> ImageEncoder:
    """An image encoder on this process's device, opened once."""
    return open_image_encoder(reference, precision, device())


@functools.lru_cache(maxsize=8)
def text_encoder(reference: str, precision: Precision) -> TextEncoder:
    """A text encoder on this process's device, opened once."""
    return open_text_encoder(reference, precision, device())


def describe_images(encoder: ImageEncoder, prepared: Iterable[Tensor], batch: int) -> dict[str, list[Array]]:
    """What an encoder says of prepared images: output name -> one array an image, float32 or int32.

    Images of equal size share a forward pass.
    """
    answers: dict[str, list[Array]] = {}
    remaining = iter(prepared)
    while images := list(itertools.islice(remaining, batch)):
        together: dict[str, list[Array]] = {}
        for size in dict.fromkeys(image.shape for image in images):
            places = [place for place, image in enumerate(images) if image.shape == size]
            for name, values in encoder.encode(torch.stack([images[place] for place in places])).items():
                rows = together.setdefault(name, [np.empty(0)] * len(images))
                for place, value in zip(places, values, strict=True):
                    rows[place] = value.numpy()
        for name, rows in together.items():
            answers.setdefault(name, []).extend(rows)
    return answers


def describe_texts(encoder: TextEncoder, captions: Sequence[str], batch: int) -> dict[str, list[Array]]:
    """What an encoder says of captions: output name -> one array a caption, float32 or int32.

    Captions of equal length share a forward pass, so that padding costs nothing.
    """
    tokens = encoder.prepare(captions)
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    answers: dict[str, list[Array]] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for name, values in encoder.encode([tokens[row] for row in rows]).items():
            places = answers.setdefault(name, [np.empty(0)] * len(order))
            for row, value in zip(rows, values, strict=True):
                places[row] = value.numpy()
    return answers
