"""Real processes, killed: the run goes on from its last checkpoint, in its MLflow run, to the same result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
SETTINGS = [
    *("--data.scenes.train", "40", "--data.scenes.val", "16", "--data.scenes.test", "8"),
    *("--featurize.images", "efficientnet-lite0", "--featurize.views", "plain"),
    *("--train.objective.quantization.codewords", "16", "--train.cpus_per_worker", "1"),
    *("--train.workers", "1", "--train.epochs", "20", "--train.batch", "32", "--train.model.dim", "64"),
]
EPOCHS, EACH = 20, 8  # of 40 images, two captions at once: 120 groups in batches of at most 16

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(place, name, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    where = ["--cache", str(place / "cache"), "--runs", str(place / "runs"), "--name", name] if name else []
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments, *where],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A complete cache, and a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("killed")
    process = command(folder, "undisturbed", "run", "less", *SETTINGS)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return folder


def wait_for_steps(place, name, steps):
    """Until training has taken so many steps."""
    progress = place / "runs" / name / "progress.json"
    end = time.monotonic() + 200
    while not progress.exists() or json.loads(progress.read_text())["done"] < steps:
        assert time.monotonic() < end
        time.sleep(0.05)


def check(place, name):
    """The run is finished, whole, one run in MLflow, and equal to the undisturbed one."""
    folder = place / "runs" / name
    client = MlflowClient(f"sqlite:///{place / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("isthmus")
    (run,) = [run for run in client.search_runs([experiment.experiment_id]) if run.data.tags["mlflow.runName"] == name]
    assert run.info.run_id == json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "val/rsum")}
    assert steps == {EACH * (epoch + 1) for epoch in range(EPOCHS)}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    validated = [line for line in map(json.loads, lines) if "val/rsum" in line["metrics"]]
    assert len(validated) <= EPOCHS + 1  # no more than the epoch that was interrupted is validated again
    undisturbed = place / "runs" / "undisturbed"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((undisturbed / "metrics.json").read_text())


def test_a_killed_worker(place):
    process = command(place, "worker", "train", "less", *SETTINGS)
    wait_for_steps(place, "worker", EPOCHS * EACH // 2)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("RayTrainWorker" in part for part in child.cmdline())
    ]
    assert len(workers) == 1
    workers[0].send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    check(place, "worker")


def test_a_killed_driver(place):
    process = command(place, "driver", "train", "less", *SETTINGS)
    wait_for_steps(place, "driver", EPOCHS * EACH // 2)
    process.kill()
    process.communicate()
    again = command(place, None, "train", "--resume", str(place / "runs" / "driver"))
    out, _ = again.communicate()
    assert again.returncode == 0, out
    check(place, "driver")
