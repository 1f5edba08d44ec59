"""Real processes, killed: each method goes on from its last checkpoint, in its MLflow run, to the same result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient

from train.checkpoints import Checkpoints
from train.state import read_state

ROOT = Path(__file__).parents[2]
SETTINGS = [
    *("--data.scenes.train", "40", "--data.scenes.val", "16", "--data.scenes.test", "8"),
    *("--featurize.images", "efficientnet-lite0", "--featurize.texts", "minilm,lexicon", "--featurize.views", "plain"),
    *("--train.batch", "32", "--train.model.dim", "64", "--train.cpus_per_worker", "1"),
]
BANK = ("--train.objective.bank.size", "50")  # neither a multiple of the batch nor more than a run fills
METHODS = {
    "less": (*("--train.objective.quantization.codewords", "16"), *("--train.workers", "1", "--train.epochs", "20")),
    "hier": ("--train.workers", "0", "--train.epochs", "10"),
    "sede-vse": (*BANK, "--train.workers", "0", "--train.epochs", "10"),
    "sede-scan": (*BANK, "--train.model.scan.words", "12", "--train.workers", "0", "--train.epochs", "10"),
    "isthmus": ("--train.workers", "0", "--train.epochs", "10"),
}
"""What each has beside SETTINGS; the last is the number of epochs."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def steps_of_an_epoch(method):
    """Of 40 images with five captions each: 120 groups of at most two in batches of 16, 200 single ones in 32."""
    return 7 if method == "sede-scan" else 8


def command(place, name, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    where = ["--cache", str(place / "cache"), "--runs", str(place / "runs"), "--name", name] if name else []
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments, *where],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    out, _ = process.communicate()
    assert process.returncode == 0, out


def training(place, name, method, *settings):
    """Train a method on the complete cache."""
    return command(place, name, "train", method, *SETTINGS, *METHODS[method], *settings)


def undisturbed(place, method):
    """The run of a method that nobody disturbs, begun if there is none yet."""
    name = f"{method}-undisturbed"
    return None if (place / "runs" / name).exists() else training(place, name, method)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A complete cache, of all that any of the methods reads."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ["featurize", "hier", *SETTINGS, "--cache", str(folder / "cache")]
    finish(command(folder, None, *arguments))
    return folder


def wait_for_half(place, name, method):
    """Until a checkpoint of the middle of training is there."""
    half = int(METHODS[method][-1]) * steps_of_an_epoch(method) // 2
    checkpoints, end = Checkpoints(place / "runs" / name / "checkpoints"), time.monotonic() + 200
    while (latest := checkpoints.latest()) is None or int(latest.name.rpartition("-")[2]) < half:
        assert time.monotonic() < end
        time.sleep(0.02)


def check(place, name, method):
    """The run is finished, whole, one run in MLflow, and equal to the undisturbed one to the last bit."""
    folder, epochs, each = place / "runs" / name, int(METHODS[method][-1]), steps_of_an_epoch(method)
    client = MlflowClient(f"sqlite:///{place / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("isthmus")
    (run,) = [run for run in client.search_runs([experiment.experiment_id]) if run.data.tags["mlflow.runName"] == name]
    assert run.info.run_id == json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "val/rsum")}
    assert steps == {each * (epoch + 1) for epoch in range(epochs)}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    validated = [line for line in map(json.loads, lines) if "val/rsum" in line["metrics"]]
    assert len(validated) <= epochs + 1  # no more than the epoch that was interrupted is validated again
    expected = place / "runs" / f"{method}-undisturbed"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((expected / "metrics.json").read_text())
    found, same = (read_state(Checkpoints(run / "checkpoints").latest()) for run in (folder, expected))
    assert found.keys() == same.keys()
    for state in (found, same):
        state["optimizer"] = state["optimizer"]["state"]
    for part in found.keys() - {"seconds", "fingerprint"}:
        torch.testing.assert_close(found[part], same[part], rtol=0, atol=0, msg=part)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_driver(place, method):
    name = f"{method}-driver"
    process = training(place, name, method)
    wait_for_half(place, name, method)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    beside = undisturbed(place, method)
    finish(command(place, None, "train", "--resume", str(place / "runs" / name)))
    if beside is not None:
        finish(beside)
    check(place, name, method)


@pytest.mark.parametrize("method", ["less", "sede-vse"])
def test_a_killed_worker(place, method):
    name = f"{method}-worker"
    process = training(place, name, method, "--train.workers", "1")
    wait_for_half(place, name, method)
    ours = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    every = psutil.process_iter(["cmdline"])
    workers = [one for one in every if one.pid in ours and "RayTrainWorker" in "".join(one.info["cmdline"] or [])]
    assert len(workers) == 1
    workers[0].send_signal(signal.SIGKILL)
    finish(process)
    beside = undisturbed(place, method)
    if beside is not None:
        finish(beside)
    check(place, name, method)
