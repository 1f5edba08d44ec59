"""Weights of torchvision's networks: its own, random ones, or those of a file, of which nothing is unpickled."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
from torch import Tensor, nn

from featurize.encoder import EncoderError, first_line


def open_weights(
    reference: str, default: Any, build: Callable[[int], nn.Module], classes: int, head: Callable[[nn.Module], str]
) -> nn.Module:
    """A torchvision network with the weights that its reference names.

    Args:
        reference: "FAMILY:NAME[@WEIGHTS]". WEIGHTS is "default" (kept in torch.hub's folder, downloaded if absent; the
            same as nothing), "random" or "random:SEED" (seed 0), or a file: .safetensors, or what `torch.save` made of
            a state dict, with any number of classes.
        default: torchvision's own weights of this network.
        build: makes it for a number of classes, without weights.
        classes: of the default weights.
        head: names the tensor whose first axis counts the classes.

    Raises:
        EncoderError: weights that do not fit or would need pickle.
        EncoderError: no such file, or default weights that are neither stored nor reachable.
    """
    network, _, source = reference.partition("@")
    if seed := re.fullmatch(r"random(?::(\d+))?", source):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed[1] or 0))
            return build(classes)
    file = _default_file(default, network) if source in {"", "default"} else _existing(source, reference)
    return _fitted(network.partition(":")[2], file, build, classes, head)


def _fitted(
    name: str, file: Path, build: Callable[[int], nn.Module], classes: int, head: Callable[[nn.Module], str]
) -> nn.Module:
    """The network with the weights of a file."""
    state = _read(file)
    network = build(classes)
    last = head(network)
    if last in state and (found := state[last].shape[0]) != classes:
        network = build(found)
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
