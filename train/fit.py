"""How the loop is driven: by Ray Train over workers, or plainly in this process with the same numbers."""

import functools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from featurize.extract import WORKER_ENV
from featurize.places import publish
from featurize.resources import cluster_has, require_resources
from train.batches import FeatureReader
from train.checkpoints import Checkpoints
from train.config import SettingsError
from train.loop import Progress, Work, feature_dims, train_worker
from train.models import save_model
from train.state import read_state


class ProgressFile:
    """A progress bar whose numbers stand in a file, for another process to draw.

    Args:
        path: of the file.
        total: steps.
        done: steps that are done already.
    """

    def __init__(self, path: Path, total: int, done: int) -> None:
        self.path = path
        self.total = total
        self.done = done
        self.text = f"train: continuing after step {done}" if done else "train"
        self._next = 0.0
        self._write()

    def update(self, n: int = 1) -> None:
        """Count steps; written at most twice a second."""
        self.done += n
        if time.monotonic() >= self._next:
            self._write()

    def set_description(self, desc: str) -> None:
        """Say what is going on."""
        self.text = desc
        self._write()

    def close(self) -> None:
        """Write the last state."""
        self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + 0.5
        publish(self.path, json.dumps({"total": self.total, "done": self.done, "text": self.text}).encode())


@contextmanager
def _drawn(path: Path) -> Iterator[None]:
    """Draw the progress that a worker writes to a file, until the block ends."""
    path.unlink(missing_ok=True)
    finished = threading.Event()

    def draw() -> None:
        with tqdm(desc="train: Ray Train starts its workers", unit="steps") as bar:
            while True:
                last = finished.wait(0.5)
                if path.exists():
                    now = json.loads(path.read_text("utf-8"))
                    if bar.total is None:
                        bar.reset(now["total"])
                        bar.initial = now["done"]
                    bar.n = now["done"]
                    bar.set_description(now["text"], refresh=True)
                if last:
                    return

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@contextmanager
def _told_as_raised() -> Iterator[None]:
    """Raise what a worker's code raised instead of Ray Train's report of it; lost workers stay Ray's to report."""
    import ray.train

    try:
        yield
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if not type(failure).__module__.startswith("ray."):
                raise failure from error
        raise


def _ray_worker(work: Work, checkpoints: Checkpoints, progress: Path) -> None:
    import ray.train.torch

    train_worker(work, checkpoints, ray.train.torch.get_device(), functools.partial(ProgressFile, progress))


def _plain_bar(total: int, done: int) -> Progress:
    return tqdm(desc="train", total=total, initial=done, unit="steps")


@dataclass(frozen=True)
class Fitted:
    """What training took and gave.

    Attributes:
        seconds: on training and validating, all workers at once.
        steps: that were taken.
        epoch: whose weights are kept, from 1.
    """

    seconds: float
    steps: int
    epoch: int


def fit(work: Work, folder: Path) -> Fitted:
    """Train, and leave the best model in `<folder>/model`; continues a run that was interrupted in this folder.

    With `workers >= 1` Ray Train runs the loop and restarts killed workers from the last checkpoint; with 0 the loop
    runs here.

    Args:
        work: what to do.
        folder: the run's, holds `checkpoints/`; workers on other nodes must reach it by the same path.

    Raises:
        SettingsError: there are not as many GPUs or CPU cores.
        ray.train.TrainingFailedError: workers were lost more often than `max_failures`.
        Exception: what a worker's code raised, if it did so every time.
    """
    config = work.config
    folder = folder.absolute()
    checkpoints = Checkpoints(folder / "checkpoints")
    if config.workers == 0:
        if config.gpu and not torch.cuda.is_available():
            raise SettingsError("--train.gpu true: torch finds no CUDA device on this machine; leave the option out")
        device = torch.device("cuda" if config.gpu else "cpu")
        train_worker(work, checkpoints, device, _plain_bar)
    else:
        import ray.train
        from ray.train.torch import TorchTrainer

        cpus = min(config.cpus_per_worker, max(1, int(cluster_has("CPU")) // config.workers))
        bundle = {"CPU": cpus, **({"GPU": 1} if config.gpu else {})}
        require_resources(bundle, config.workers, "lower --train.workers or leave out --train.gpu", SettingsError)
        trainer = TorchTrainer(
            functools.partial(_ray_worker, work, checkpoints, folder / "progress.json"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpu,
                resources_per_worker=bundle,
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the V1 class
                name="ray",
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
                worker_runtime_env={"env_vars": {**WORKER_ENV, "OMP_NUM_THREADS": str(cpus)}},
            ),
        )
        with _drawn(folder / "progress.json"), _told_as_raised():
            trainer.fit()
    last = checkpoints.latest()
    assert last is not None
    state = read_state(last)
    reader = FeatureReader(work.inputs)
    save_model(
        folder / "model",
        state["best_weights"],
        config.model,
        feature_dims(reader, config),
        work.inputs,
    )
    return Fitted(state["seconds"], state["step"], state["best_epoch"] + 1)
