"""The model that a run leaves behind: its files, and several of them as one."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from featurize.places import place, publish
from train.batches import Inputs
from train.config import ModelConfig
from train.hosts import Embedder, Ensemble, Host, build_host
from train.towers import Dims

_DESCRIPTION, _WEIGHTS = "model.json", "weights.safetensors"


class ModelError(ValueError):
    """A model cannot be opened, or models cannot be joined: what was found, what to do."""


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    dims: tuple[Dims, Dims],
    inputs: Inputs,
) -> None:
    """Write a model that can be opened without the cache it was trained on: `weights.safetensors`, then `model.json`.

    Args:
        folder: created if need be.
        weights: of the host.
        config: of the model.
        dims: widths of image and of caption features.
        inputs: the columns it reads, hence the encoders a query must pass through.
    """
    folder.mkdir(parents=True, exist_ok=True)
    apart = {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}  # towers may share some
    publish(folder / _WEIGHTS, save(apart))
    description = {
        "model": asdict(config),
        "image_dims": asdict(dims[0]),
        "text_dims": asdict(dims[1]),
        "inputs": {**asdict(inputs), "dataset": str(inputs.dataset)},
    }
    publish(folder / _DESCRIPTION, json.dumps(description, indent=1).encode())


def save_ensemble(folder: Path, members: Sequence[Path]) -> None:
    """Write several models as one: a copy of each in a folder of its number, then `model.json`.

    Args:
        folder: created if need be.
        members: model folders.

    Raises:
        ModelError: see `open_ensemble`.
    """
    open_ensemble(members)
    for number, member in enumerate(members):
        target = folder / str(number)
        target.mkdir(parents=True, exist_ok=True)
        for name in (_WEIGHTS, _DESCRIPTION):
            shutil.copyfile(member / name, target / name)
    publish(folder / _DESCRIPTION, json.dumps({"members": len(members)}).encode())


def open_ensemble(members: Sequence[Path]) -> tuple[Ensemble, Inputs]:
    """Several saved models as one.

    Args:
        members: model folders.

    Returns:
        The ensemble and what all members read; what the losses of their training compared may differ, and is left out.

    Raises:
        ModelError: one is missing, is an ensemble itself, or reads other columns than the first.
        train.config.SettingsError: one compares parts and has no vector to join, or there is none.
    """
    opened = [_open_host(member) for member in members]
    read = [replace(inputs, semantic=None, lemmas=None) for _, inputs in opened]
    for member, inputs in zip(members, read, strict=True):
        if (inputs.dataset, inputs.identities()) != (read[0].dataset, read[0].identities()):
            first, own = ({column.name for column in one.columns()} for one in (read[0], inputs))
            differing = ", ".join(sorted(first ^ own)) or "the identities of some columns, or the data set's folder"
            raise ModelError(
                f"{member} reads other columns than {members[0]}: they differ in {differing}; join models that were "
                "trained on the same columns of one cache"
            )
    return Ensemble([host for host, _ in opened]), read[0]


def open_model(folder: Path) -> tuple[Embedder, Inputs]:
    """The saved model, in evaluation mode, and the inputs it expects.

    Raises:
        ModelError: there is no finished model in this folder.
    """
    members = _describe(folder).get("members")
    if members is None:
        return _open_host(folder)
    ensemble, inputs = open_ensemble([folder / str(number) for number in range(members)])
    return ensemble.eval(), inputs


def _describe(folder: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: no finished model ({error}); train one, or continue with `train --resume RUN`"
        ) from error
    return description


def _open_host(folder: Path) -> tuple[Host, Inputs]:
    description = _describe(folder)
    if "members" in description:
        raise ModelError(f"{folder} is an ensemble, and ensembles are not joined; name its members instead")
    try:
        weights = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / _WEIGHTS}: not readable ({error}); train the model again") from error
    config = TypeAdapter(ModelConfig).validate_python(description["model"])
    dims = TypeAdapter(Dims)
    image, text = (dims.validate_python(description[name]) for name in ("image_dims", "text_dims"))
    model = build_host(config, image, text)
    model.load_state_dict(weights)
    inputs = {**description["inputs"], "dataset": place(description["inputs"]["dataset"], ModelError)}
    return model.eval().requires_grad_(requires_grad=False), TypeAdapter(Inputs).validate_python(inputs)
