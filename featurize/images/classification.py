"""Any of torchvision's classification networks, without its classifier."""

import difflib
import functools
from typing import Any

import torch
import torchvision.models
from PIL import Image
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from featurize.encoder import EncoderError, Precision, hash_weights
from featurize.images.grid import GridEncoder, cells
from featurize.images.preprocessing import ResizeAndCrop
from featurize.images.weights import open_weights

# What these two builders set when they load ImageNet weights, and must be told otherwise.
_INCEPTION = {"transform_input": True, "init_weights": True}


def open_classification(reference: str, precision: Precision, device: str) -> GridEncoder:
    """Opens "torchvision:NAME[@WEIGHTS]".

    The grid is the last feature map before global pooling and classifier: convolutional networks and Swin
    give its cells and, as pooled, their mean; a ViT gives its patch tokens and its class token, after the
    last norm. Input size and normalisation are those of the network's default weights, whatever the weights.

    Args:
        reference: NAME is any of `torchvision.models.list_models(torchvision.models)`. WEIGHTS is "default"
            (ImageNet; the same as nothing), "random", "random:SEED" or a file, see `open_weights`.
        precision: of the forward pass.
        device: where the network runs.

    Raises:
        EncoderError: unknown name, or weights that do not fit or would need pickle.
        EncoderError: no such file, or default weights that are neither stored nor reachable.
    """
    name = reference.removeprefix("torchvision:").partition("@")[0]
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise EncoderError(
            f"torchvision has no classification network {name!r}; the nearest name is {nearest!r} "
            f"(torchvision:{nearest})"
        )
    default = torchvision.models.get_model_weights(name).DEFAULT
    transforms = default.transforms()
    size = transforms.crop_size[0]
    network = open_weights(reference, default, functools.partial(_build, name, size), 1000, _last_tensor)
    weights = hash_weights(network)
    preprocessing = ResizeAndCrop(
        resize=transforms.resize_size[0],
        crop=size,
        filter=Image.Resampling[transforms.interpolation.name],
        mean=tuple(255 * value for value in transforms.mean),
        std=tuple(255 * value for value in transforms.std),
    )
    features = _last_features(network.eval(), size)
    return GridEncoder(f"torchvision:{name}", weights, features, preprocessing, precision=precision, device=device)


def _build(name: str, size: int, classes: int) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": classes}
    if name in {"googlenet", "inception_v3"}:
        arguments |= _INCEPTION
    if name.startswith("vit_"):
        arguments["image_size"] = size
    network: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    return network


def _last_tensor(network: nn.Module) -> str:
    """The classifier's bias, or its weight where it has none."""
    return list(network.state_dict())[-1]


def _last_features(network: nn.Module, size: int) -> nn.Module:
    """A network, in evaluation mode, up to its last features before pooling and classifier."""
    traced = fx.symbolic_trace(network)
    with torch.inference_mode():
        ShapeProp(traced).propagate(torch.zeros(1, 3, size, size))
    transformer = isinstance(network, torchvision.models.VisionTransformer)
    wanted = _is_tokens if transformer else _is_map
    last = [node for node in traced.graph.nodes if node.op != "placeholder" and wanted(node)][-1]
    traced.graph.output_node().args = (last,)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return _Tokens(traced) if transformer else _Map(traced)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _is_tokens(node: fx.Node) -> bool:
    return len(_shape(node)) == 3  # (1, 1 + N, D)


def _is_map(node: fx.Node) -> bool:
    shape = _shape(node)  # (1, D, h, w); the classifiers of SqueezeNet and ConvNeXt have four axes too
    in_classifier = "classifier" in node.meta.get("nn_module_stack", {})
    return len(shape) == 4 and shape[2] * shape[3] > 1 and not in_classifier


class _Map(nn.Module):
    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return cells(self.features(images))


class _Tokens(nn.Module):
    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.features(images)  # (B, 1 + N, D): class token, then patches
        return tokens[:, 1:], tokens[:, 0]
