"""Torchvision's Faster R-CNN networks (Ren et al., NeurIPS 2015): boxes, and the features that classify them."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn

from featurize.encoder import JSON, Precision, freeze, frozen_forward, hash_weights, usable_precision
from featurize.images.detector import COCO_CLASSES, Boxes, Seen
from featurize.images.weights import open_weights

NAMES: tuple[str, ...] = tuple(
    name for name in torchvision.models.list_models(torchvision.models.detection) if name.startswith("fasterrcnn_")
)
# Torchvision trained these with a batch norm that added nothing to the variance (pytorch/vision #2933).
_NO_EPSILON = ("fasterrcnn_resnet50_fpn",)
_SCORES = "roi_heads.box_predictor.cls_score.bias"


class FasterRCNN:
    """A `Detector` whose features are those of its box head: RoIAlign on the pyramid, then the head's layers (1024).

    Sizes, anchors and non-maximum suppression are torchvision's own for the network, whatever the weights; a network of
    91 classes is taken to know COCO's. Backbone, proposal and box head run in `precision`; boxes are computed in
    float32, because bfloat16 would move their corners by pixels.

    Args:
        reference: "regions:NAME[@WEIGHTS]", NAME being one of `NAMES`; see `open_weights`.
        score: boxes below it are not looked at any further.
        precision: of the forward pass; float32 where the device has no bfloat16.
        device: where the network runs, e.g. "cpu", "cuda".

    Raises:
        EncoderError: weights that do not fit, are not there or would need pickle.
    """

    def __init__(self, reference: str, score: float, precision: Precision, device: str) -> None:
        self.name = reference.removeprefix("regions:").partition("@")[0]
        default = torchvision.models.get_model_weights(self.name).DEFAULT
        network: Any = open_weights(reference, default, functools.partial(_build, self.name), 91, lambda _: _SCORES)
        self.weights = hash_weights(network)
        self.width: int = network.roi_heads.box_predictor.cls_score.in_features
        self._device = torch.device(device)
        used = usable_precision(precision, self._device)
        network.eval().requires_grad_(False).to(self._device)
        network.backbone = _Fast(network.backbone, used, self._device)
        network.rpn.head = _Fast(network.rpn.head, used, self._device)
        network.roi_heads.box_head = _Fast(network.roi_heads.box_head, used, self._device)
        network.roi_heads.score_thresh = score
        # All that are left after suppression: which are kept is decided where ties are broken.
        network.roi_heads.detections_per_img = 10**9
        self._network = network
        classes: int = network.roi_heads.box_predictor.cls_score.out_features
        self.record: dict[str, JSON] = {
            "shorter": network.transform.min_size[-1],
            "longer": network.transform.max_size,
            "suppression": network.roi_heads.nms_thresh,
            "classes": list(COCO_CLASSES) if classes == len(COCO_CLASSES) else classes,
            "precision": used,
        }

    def look(self, pictures: Tensor) -> Seen:
        """Looks at pictures (B, 3, H, W), uint8 RGB on the CPU."""
        network = self._network
        with torch.inference_mode():
            batch, _ = network.transform(list(pictures.to(self._device) / 255))
            features = network.backbone(batch.tensors)
            proposals, _ = network.rpn(batch, features)
            found, _ = network.roi_heads(features, proposals, batch.image_sizes)
        height, width = batch.image_sizes[0]  # of all: the pictures are of one size
        size = torch.tensor([width, height, width, height], device=self._device)

        def describe(boxes: Sequence[Tensor]) -> list[Tensor]:
            with torch.inference_mode():
                placed = [box.to(self._device) * size for box in boxes]
                pooled = network.roi_heads.box_roi_pool(features, placed, batch.image_sizes)
                described: Tensor = network.roi_heads.box_head(pooled).cpu()
            return list(torch.split(described, [len(box) for box in boxes]))

        candidates = [
            Boxes((one["boxes"] / size).clamp(0, 1).cpu(), one["scores"].cpu(), one["labels"].int().cpu())
            for one in found
        ]
        return Seen(candidates, describe)


def _build(name: str, classes: int) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if name in _NO_EPSILON:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    return network


class _Fast(nn.Module):
    """A part of a frozen network in its own precision, whose answers are float32."""

    def __init__(self, part: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        freeze(part, precision, device)
        self.part = part
        self.precision = precision
        self.device = device
        if hasattr(part, "out_channels"):
            self.out_channels = part.out_channels

    def forward(self, inputs: Any) -> Any:
        with frozen_forward(self.precision, self.device):
            return _float32(self.part(inputs))


def _float32(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.float()
    if isinstance(values, dict):
        return {name: value.float() for name, value in values.items()}
    return type(values)([_float32(value) for value in values])
