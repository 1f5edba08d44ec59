"""Everything that a restart needs, saved and restored whole; and the model that a run leaves behind."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from featurize.shards import publish
from train.batches import Inputs
from train.config import ModelConfig
from train.towers import DualEncoder

_FILE = "state.pt"


class StateError(ValueError):
    """A checkpoint or model is damaged or belongs to another run."""


@dataclass
class TrainState:
    """A run between two steps.

    Attributes:
        model: the towers.
        objective: the losses, with what they learn and remember (centres, margin, codebook, temperature).
        optimizer: of both.
        average: moving average of the towers' weights, or None.
        fingerprint: configuration and cache identities; a checkpoint of another fingerprint is refused.
        step: steps taken.
        best: best validation rSum so far.
        best_epoch: the epoch that reached it.
        best_weights: the (averaged) towers' weights that reached it.
        stopped: whether training is over, by early stopping or at the last epoch.
    """

    model: DualEncoder
    objective: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    fingerprint: Mapping[str, Any]
    step: int = 0
    best: float = float("-inf")
    best_epoch: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stopped: bool = False

    @property
    def evaluated(self) -> DualEncoder:
        """The towers that are validated and kept: averaged, where there is an average."""
        module = self.model if self.average is None else self.average.module
        assert isinstance(module, DualEncoder)
        return module

    def save(self, folder: Path) -> None:
        """Write `state.pt` into an existing folder."""
        torch.save(
            {
                "fingerprint": json.dumps(self.fingerprint, sort_keys=True),
                "model": self.model.state_dict(),
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "step": self.step,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "best_weights": self.best_weights,
                "stopped": self.stopped,
            },
            folder / _FILE,
        )

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            StateError: it was written by a run with other settings or another cache.
        """
        saved = read_state(folder)
        mine = json.dumps(self.fingerprint, sort_keys=True)
        if saved["fingerprint"] != mine:
            theirs, own = json.loads(saved["fingerprint"]), json.loads(mine)
            differing = sorted(key for key in {*theirs, *own} if theirs.get(key) != own.get(key))
            raise StateError(
                f"{folder}: the checkpoint belongs to a run that differs in {', '.join(differing)}; "
                "resume with the settings it was started with, or start a new run"
            )
        self.model.load_state_dict(saved["model"])
        self.objective.load_state_dict(saved["objective"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.step, self.best, self.best_epoch = saved["step"], saved["best"], saved["best_epoch"]
        self.best_weights, self.stopped = saved["best_weights"], saved["stopped"]


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint folder, on the CPU.

    Raises:
        StateError: it is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise StateError(f"{folder / _FILE}: not a readable checkpoint ({error})") from error
    return state


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    dims: tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]],
    inputs: Inputs,
) -> None:
    """Write a model that can be opened without the cache it was trained on: `weights.safetensors`, then `model.json`.

    Args:
        folder: created if need be.
        weights: of the towers.
        config: of the model.
        dims: (V, (D_c, ...)) of image and of caption features.
        inputs: the columns it reads, hence the encoders a query must pass through.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
    description = {
        "model": asdict(config),
        "image_dims": dims[0],
        "text_dims": dims[1],
        "inputs": {**asdict(inputs), "dataset": str(inputs.dataset)},
    }
    publish(folder / "model.json", json.dumps(description, indent=1).encode())


def open_model(folder: Path) -> tuple[DualEncoder, Inputs]:
    """The saved towers, in evaluation mode, and the inputs they expect.

    Raises:
        StateError: there is no finished model in this folder.
    """
    try:
        description = json.loads((folder / "model.json").read_text("utf-8"))
        weights = load_file(folder / "weights.safetensors")
    except (OSError, ValueError) as error:
        raise StateError(
            f"{folder}: no finished model ({error}); train one, or continue with `train --resume RUN`"
        ) from error
    config = TypeAdapter(ModelConfig).validate_python(description["model"])
    dims = TypeAdapter(tuple[int, tuple[int, ...]])
    model = DualEncoder(
        config,
        dims.validate_python(description["image_dims"]),
        dims.validate_python(description["text_dims"]),
    )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(requires_grad=False), TypeAdapter(Inputs).validate_python(description["inputs"])
