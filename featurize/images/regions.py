"""Regions: the things that a detector finds in an image, as boxes with features.

    regions:DETECTOR[@WEIGHTS][+ENCODER][+k=36][+score=0.2]

    regions:fasterrcnn_resnet50_fpn                  torchvision's weights, the box head's features
    regions:fasterrcnn_resnet50_fpn_v2@coco.pth+k=10
    regions:ssd-mobilenet+efficientnet-lite0         packaged; features of the boxes from another encoder's grid

The settings stand in the reference because a saved model opens its encoders again by their references alone.
"""

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from featurize.encoder import JSON, Card, EncoderError, ImageEncoder, Output, Precision
from featurize.images import open_image_encoder
from featurize.images.detector import Detector, align
from featurize.images.faster_rcnn import NAMES, FasterRCNN
from featurize.images.preprocessing import Whole, rgb, to_tensor
from featurize.images.ssd import NAME as SSD
from featurize.images.ssd import SSDMobileNet

_LONGEST = 1333
"""Pixels of a picture's longer side as detectors are shown it: the most that torchvision's look at."""
_SLIMMEST = 100


def open_regions(reference: str, precision: Precision, device: str) -> "RegionEncoder":
    """Opens "regions:DETECTOR[@WEIGHTS][+ENCODER][+k=36][+score=0.2]".

    Args:
        reference: DETECTOR is "ssd-mobilenet" (the extra `regions`) or one of torchvision's fasterrcnn_... networks,
            which alone takes WEIGHTS (default, random, random:SEED or a file, as in `featurize.images.weights`).
            ENCODER is any image encoder with a square grid; without one the features are the detector's own. k is the
            most regions of an image, score the least score of one; both have the values of bottom-up attention
            (Anderson et al., CVPR 2018) unless given.
        precision: of the forward pass; float32 where the device has no bfloat16.
        device: where networks run. OpenCV's detector stays on the CPU.

    Raises:
        EncoderError: unknown detector, encoder or setting, or a setting out of range.
        EncoderError: weights that are missing or do not fit; a package that is missing.
        EncoderError: the encoder has no square grid.
    """
    parsed = _Reference.parse(reference)
    detector = _open_detector(parsed, precision, device)
    grid = _Grid(parsed.encoder, precision, device) if parsed.encoder else None
    return RegionEncoder(detector, grid, parsed.k, parsed.score)


@dataclasses.dataclass(frozen=True)
class _Reference:
    detector: str  # with its weights
    encoder: str = ""
    k: int = 36
    score: float = 0.2

    @classmethod
    def parse(cls, reference: str) -> "_Reference":
        detector, *pieces = reference.removeprefix("regions:").split("+")
        parsed = cls(detector)
        for piece in pieces:
            name, equals, value = piece.partition("=")
            if equals and name == "k":
                parsed = dataclasses.replace(parsed, k=_count(reference, value))
            elif equals and name == "score":
                parsed = dataclasses.replace(parsed, score=_share(reference, value))
            elif equals and name.isalpha():
                raise EncoderError(f"{reference}: found the setting {name!r}, expected k or score: +k=36+score=0.2")
            elif parsed.encoder:
                raise EncoderError(
                    f"{reference}: found the encoders {parsed.encoder!r} and {piece!r}; expected one at most. List "
                    "each behind a detector of its own, as encoders of the same run"
                )
            else:
                parsed = dataclasses.replace(parsed, encoder=piece)
        return parsed


def _count(reference: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]+", value) or int(value) < 1:
        raise EncoderError(f"{reference}: found k={value}, expected a whole number of at least 1, e.g. k=36")
    return int(value)


def _share(reference: str, value: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value) or float(value) > 1:
        raise EncoderError(f"{reference}: found score={value}, expected a number from 0 to 1, e.g. score=0.2")
    return float(value)


def _open_detector(parsed: _Reference, precision: Precision, device: str) -> Detector:
    name, at, _ = parsed.detector.partition("@")
    if name == SSD:
        if at:
            raise EncoderError(f"regions:{parsed.detector}: {SSD} has the weights it is packaged with; leave @... out")
        return SSDMobileNet()
    if name not in NAMES:
        known = (SSD, *NAMES)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise EncoderError(f"unknown detector {name!r}, the nearest is {nearest!r}; expected {', '.join(known)}")
    return FasterRCNN(f"regions:{parsed.detector}", parsed.score, precision, device)


class _Grid:
    """Features of boxes from the grid of another encoder, which is shown the whole picture, squeezed to a square.

    So the grid covers the picture from edge to edge, and boxes need not be moved, whatever the encoder would crop.

    Attributes:
        card: of the encoder.
        width: D, of its cells.
        side: pixels of its square input.

    Raises:
        EncoderError: the encoder has no grid, or one that is not square.
    """

    def __init__(self, reference: str, precision: Precision, device: str) -> None:
        self._encoder: ImageEncoder = open_image_encoder(reference, precision, device)
        self.card = self._encoder.card
        height, width = self._encoder.prepare(Image.new("RGB", (32, 32))).shape[1:]
        shape = next((output.shape for output in self.card.outputs if output.name == "grid"), (0, 0))
        self._cells = math.isqrt(shape[0])
        self.width: int = shape[-1]
        if not self._cells or self._cells**2 != shape[0] or height != width:
            raise EncoderError(
                f"regions need the features of a square grid: {reference} gives {shape[0]} cells of a picture of "
                f"{height} by {width} pixels; name an encoder of square pictures with a grid, e.g. efficientnet-lite0"
            )
        self.side: int = height

    def describe(self, pictures: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Features (L_i, D) of each picture's boxes (L_i, 4)."""
        squeeze = Whole(self.side, mean=(), std=()).pixels
        images = (Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures)
        grid = self._encoder.encode(torch.stack([squeeze(image) for image in images]))["grid"]
        assert isinstance(grid, Tensor)
        return align(grid.mT.reshape(len(grid), -1, self._cells, self._cells), boxes)  # (B, N, D) → (B, D, h, w)


class RegionEncoder:
    """An `ImageEncoder` of at most k regions of an image, best score first, in ragged outputs.

    "regions" (L, D): features of the boxes, see the detector and `_Grid`.
    "boxes" (L, 4): x1, y1, x2, y2 in [0, 1] of the image's width and height.
    "scores" (L,): in [0, 1].
    "labels" (L,): class ids, whole numbers; their names are in the card.
    "placed" (L, D + 5): the features and, behind them, x1, y1, x2, y2 and the area, all relative to the image: the five
    numbers by which ViLBERT (Lu et al., NeurIPS 2019) says where a region is.

    Where nothing scores enough, the whole image is one region of score 0 and class 0, so L is never 0.

    Args:
        detector: finds the boxes.
        grid: gives their features; the detector itself if None.
        k: regions of an image, at most.
        score: least score of a region.
    """

    def __init__(self, detector: Detector, grid: _Grid | None, k: int, score: float) -> None:
        self._detector = detector
        self._grid = grid
        self._k = k
        self._score = score
        width = grid.width if grid else detector.width
        features: dict[str, JSON] = {}  # and how they are computed, which may differ from how boxes are found
        name, weights = f"regions:{detector.name}", detector.weights
        if grid:
            name = f"{name}+{grid.card.name}"
            weights = hashlib.sha256(f"{weights} {grid.card.weights}".encode()).hexdigest()
            used = grid.card.preprocessing
            features = {"features": {**used, "squeezed": grid.side}, "precision": used["precision"]}
        self.card = Card(
            name,
            weights,
            {**detector.record, **features, "longest": _LONGEST, "k": k, "score": score},
            (
                Output("regions", (width,), ragged=True),
                Output("boxes", (4,), ragged=True),
                Output("scores", (), ragged=True),
                Output("labels", (), ragged=True, dtype="int32"),
                Output("placed", (width + 5,), ragged=True),
            ),
        )

    def prepare(self, image: Image.Image) -> Tensor:
        """The image in its own proportions, no side above 1333 pixels: (3, H, W) uint8. Safe to call from threads.

        A side of less than a hundredth of the other is stretched to that: detectors would round it to nothing.
        """
        image = rgb(image)
        scale = min(1.0, _LONGEST / max(image.size))
        least = max(1, round(scale * max(image.size) / _SLIMMEST))
        width, height = (max(least, round(scale * side)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return to_tensor(image)

    def encode(self, batch: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """The regions of each image.

        Args:
            batch: (B, 3, H, W) uint8, rows made by `prepare` of images of one size.

        Returns:
            For each output B tensors whose first axis counts the regions of that image, float32 or int32 on the CPU.

        Raises:
            EncoderError: the batch has another dtype or number of axes.
        """
        if batch.dtype != torch.uint8 or batch.dim() != 4:
            raise EncoderError(
                f"expected a uint8 batch (B, 3, H, W) of prepared images, found {batch.dtype} {tuple(batch.shape)}"
            )
        seen = self._detector.look(batch)
        found = [candidates.best(self._k, self._score) for candidates in seen.candidates]
        places = [boxes.places for boxes in found]
        features = self._grid.describe(batch, places) if self._grid else seen.describe(places)
        placed = [
            torch.cat([values, place, torch.prod(place[:, 2:] - place[:, :2], 1, keepdim=True)], 1)
            for values, place in zip(features, places, strict=True)
        ]
        return {
            "regions": features,
            "boxes": list(places),
            "scores": [boxes.scores for boxes in found],
            "labels": [boxes.labels for boxes in found],
            "placed": placed,
        }
