"""What every detector has in common: candidate boxes of pictures, and features of any boxes in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torchvision.ops
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from featurize.encoder import JSON

COCO_CLASSES: tuple[str, ...] = tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
"""Names of COCO's 91 class ids; 0 is the background, and eleven ids are not in use ("N/A")."""


@dataclass(frozen=True)
class Boxes:
    """L boxes of one picture.

    Attributes:
        places: (L, 4) float32 x1, y1, x2, y2 in [0, 1] of the picture's width and height.
        scores: (L,) float32 in [0, 1].
        labels: (L,) int32 class ids.
    """

    places: Tensor
    scores: Tensor
    labels: Tensor

    def best(self, count: int, score: float) -> "Boxes":
        """The boxes that score at least so much, best first, no more than `count` of them.

        Ties are broken by class id and then by the corners, so the order never depends on how the boxes were found.
        Boxes without an area are left out. A picture without any box left is one region of score 0 and class 0 (the
        background), the whole of it: whatever reads regions has something to read.
        """
        x1, y1, x2, y2 = self.places.unbind(1)
        kept = ((x2 > x1) & (y2 > y1) & (self.scores >= score)).nonzero()[:, 0]
        if not len(kept):
            return Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(1), torch.zeros(1, dtype=torch.int32))
        keys = (y2, x2, y1, x1, self.labels, -self.scores)  # the last one decides first
        chosen = kept[torch.from_numpy(np.lexsort([key[kept].numpy() for key in keys]))[:count]]
        return Boxes(self.places[chosen], self.scores[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Seen:
    """What a detector saw in B pictures.

    Attributes:
        candidates: boxes of each picture, in any order, on the CPU.
        describe: features of other boxes in the same pictures: B tensors (L_i, 4) → B tensors (L_i, D) float32.
    """

    candidates: list[Boxes]
    describe: Callable[[Sequence[Tensor]], list[Tensor]]


class Detector(Protocol):
    """A frozen network that finds things in pictures.

    Attributes:
        name: as in a reference.
        weights: sha256 of what it has learned.
        width: D, of its own features of a box.
        record: all else that decides its answers, its class names among them.
    """

    name: str
    weights: str
    width: int
    record: dict[str, JSON]

    def look(self, pictures: Tensor) -> Seen:
        """Looks at pictures (B, 3, H, W), uint8 RGB on the CPU."""
        ...


def align(maps: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
    """Features of boxes on a map that covers the whole picture: RoIAlign (He et al., Mask R-CNN, ICCV 2017), averaged.

    Each box is cut into 3 by 3 bins, each sampled about once a cell, and the bins are averaged.

    Args:
        maps: (B, D, h, w) float32.
        boxes: B tensors (L_i, 4), corners in [0, 1].

    Returns:
        B tensors (L_i, D).
    """
    height, width = maps.shape[2:]
    scale = torch.tensor([width, height, width, height])
    rois = torchvision.ops.roi_align(maps, [box * scale for box in boxes], output_size=3, aligned=True)
    return list(rois.mean((2, 3)).split([len(box) for box in boxes]))
