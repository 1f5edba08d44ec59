"""Any of torchvision's classification networks, without its classifier."""

import difflib
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
import torchvision.models
from PIL import Image
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from featurize.encoder import EncoderError, Precision, first_line, hash_weights
from featurize.images.grid import GridEncoder, cells
from featurize.images.preprocessing import ResizeAndCrop

# What these two builders set when they load ImageNet weights, and must be told otherwise.
_INCEPTION = {"transform_input": True, "init_weights": True}


def open_classification(reference: str, precision: Precision, device: str) -> GridEncoder:
    """Opens "torchvision:NAME[@WEIGHTS]".

    The grid is the last feature map before global pooling and classifier: convolutional networks and Swin
    give its cells and, as pooled, their mean; a ViT gives its patch tokens and its class token, after the
    last norm. Input size and normalisation are those of the network's default weights, whatever the weights.

    Args:
        reference: NAME is any of `torchvision.models.list_models(torchvision.models)`. WEIGHTS is "default"
            (ImageNet, kept in torch.hub's folder, downloaded if absent; the same as nothing), "random" or
            "random:SEED" (seed 0), or a file: .safetensors, or what `torch.save` made of a state dict, with
            any number of classes.
        precision: of the forward pass.
        device: where the network runs.

    Raises:
        EncoderError: unknown name, or weights that do not fit or would need pickle.
        EncoderError: no such file, or default weights that are neither stored nor reachable.
    """
    name, _, source = reference.removeprefix("torchvision:").partition("@")
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
    if source in {"", "default"}:
        network = _fitted(name, size, _default_file(default, f"torchvision:{name}"))
    elif seed := re.fullmatch(r"random(?::(\d+))?", source):
        network = _random(name, size, int(seed[1] or 0))
    else:
        network = _fitted(name, size, _existing(source, reference))
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


def _build(name: str, size: int, classes: int = 1000) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": classes}
    if name in {"googlenet", "inception_v3"}:
        arguments |= _INCEPTION
    if name.startswith("vit_"):
        arguments["image_size"] = size
    network: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    return network


def _random(name: str, size: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(name, size)


def _fitted(name: str, size: int, file: Path) -> nn.Module:
    """The network with the weights of a file."""
    state = _read(file)
    network = _build(name, size)
    head = list(network.state_dict())[-1]  # the classifier's last tensor: its first axis counts the classes
    if head in state and (classes := state[head].shape[0]) != 1000:
        network = _build(name, size, classes)
    target = network.state_dict()
    # Batch counters are absent from old files and unused in evaluation.
    missing = [key for key in target if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in target]
    differing = [key for key in state if key in target and state[key].shape != target[key].shape]
    if missing or unexpected or differing:
        examples = (
            f"{len(missing)} tensors are missing {missing[:2]}, {len(unexpected)} are unexpected "
            f"{unexpected[:2]}, {len(differing)} have another shape {differing[:2]}"
        )
        raise EncoderError(f"{file} does not fit torchvision's {name}: {examples}; give weights of that network")
    target.update(state)
    network.load_state_dict(target)
    return network


def _read(file: Path) -> dict[str, Tensor]:
    """A state dict by its tensors' names, without ever unpickling objects."""
    try:
        if file.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files make the readers fail in many ways; objects are refused by an UnpicklingError.
        raise EncoderError(
            f"{file} cannot be read as weights ({type(error).__name__}: {first_line(error)}); expected "
            ".safetensors, or a state dict saved by torch.save(model.state_dict(), FILE): objects are never "
            "unpickled"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise EncoderError(
            f"{file} holds a {type(found).__name__} that is no state dict (names to tensors); save it with "
            "torch.save(model.state_dict(), FILE)"
        )
    return {_current(key): value for key, value in found.items()}


def _current(key: str) -> str:
    """A tensor's name without the prefix of a data-parallel wrapper; DenseNet's old names made new."""
    key = key.removeprefix("module.")
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)


def _existing(source: str, reference: str) -> Path:
    file = Path(source).expanduser()
    if not file.is_file():
        raise EncoderError(
            f"{reference}: there is no file {file.absolute()}; after @ comes default, random, random:SEED or "
            "a file of weights"
        )
    return file


def _default_file(default: Any, network: str) -> Path:
    """Torchvision's own weights in torch.hub's folder, downloaded into it if absent."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(default.url).path).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", file.name)
        try:
            torch.hub.download_url_to_file(default.url, str(file), digest and digest[1], progress=False)
        except OSError as error:
            raise EncoderError(
                f"{network}: {file} does not exist and {default.url} cannot be reached ({error}). "
                f"Download that URL elsewhere and put it there, or name the file: {network}@FILE; "
                f"{network}@random needs none"
            ) from error
    return file


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
