"""Everything that a restart needs, saved and restored whole."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from train.hosts import Host

_FILE = "state.pt"


class StateError(ValueError):
    """A checkpoint is damaged or belongs to another run."""


@dataclass
class TrainState:
    """A run between two steps.

    Attributes:
        model: the host with its towers.
        objective: the losses, with what they learn and remember (bank, centres, margin, codebook, temperature).
        optimizer: of both.
        average: moving average of the host's weights, or None.
        momentum: the network that makes the memory bank's keys, or None.
        fingerprint: configuration and cache identities; a checkpoint of another fingerprint is refused.
        step: steps taken.
        best: best validation rSum so far.
        best_epoch: the epoch that reached it.
        best_weights: the (averaged) host's weights that reached it.
        stopped: whether training is over, by early stopping or at the last epoch.
        seconds: spent so far on training and validating, restarts not counted.
    """

    model: Host
    objective: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    momentum: AveragedModel | None
    fingerprint: Mapping[str, Any]
    step: int = 0
    best: float = float("-inf")
    best_epoch: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stopped: bool = False
    seconds: float = 0.0

    @property
    def evaluated(self) -> Host:
        """The host that is validated and kept: averaged, where there is an average."""
        module = self.model if self.average is None else self.average.module
        assert isinstance(module, Host)
        return module

    def followers(self) -> dict[str, AveragedModel]:
        """The networks that follow the trained one, by name."""
        named = {"average": self.average, "momentum": self.momentum}
        return {name: follower for name, follower in named.items() if follower is not None}

    def save(self, folder: Path) -> None:
        """Write `state.pt` into an existing folder."""
        torch.save(
            {
                "fingerprint": json.dumps(self.fingerprint, sort_keys=True),
                "model": self.model.state_dict(),
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                **{name: follower.state_dict() for name, follower in self.followers().items()},
                "step": self.step,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "best_weights": self.best_weights,
                "stopped": self.stopped,
                "seconds": self.seconds,
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
        for name, follower in self.followers().items():
            follower.load_state_dict(saved[name])
        self.step, self.best, self.best_epoch = saved["step"], saved["best"], saved["best_epoch"]
        self.best_weights, self.stopped = saved["best_weights"], saved["stopped"]
        self.seconds = saved["seconds"]


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint folder, on the CPU.

    Raises:
        StateError: it is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise StateError(
            f"{folder / _FILE}: not a readable checkpoint ({reason}); remove {folder} to go on from the one before"
        ) from error
    return state
