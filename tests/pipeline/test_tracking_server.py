"""A real MLflow server that is killed in mid-run and comes back."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from pipeline import tracking
from pipeline.config import RunConfig
from pipeline.tracking import TrackingError, resume, start, sync

pytestmark = pytest.mark.slow


def free_port():
    """A port that Ray's workers (10002-19999) do not take."""
    for port in range(20100, 30000):
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError


@contextmanager
def server(folder, port):
    """An MLflow server with one worker, as a process group of its own."""
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)),
                *("--backend-store-uri", f"sqlite:///{folder}/server.db"),
                *("--artifacts-destination", str(folder / "artifacts")),
            ],
            cwd=folder,
            env={
                **os.environ,
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                    break
            except requests.ConnectionError:
                pass
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < end, (folder / "server.log").read_text()
            time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_dies_costs_nothing_and_gets_everything_later(tmp_path, monkeypatch, caplog, capfd):
    from mlflow import MlflowClient

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    spent, steps = 0.0, 0

    def train(seconds):
        nonlocal spent, steps
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.perf_counter()
            tracker.log({"loss": 1 / (1 + steps), "val R@1": steps}, steps)
            spent += time.perf_counter() - begun
            steps += 1
            time.sleep(0.02)

    with server(tmp_path, port):
        tracker = start(RunConfig(), folder, {"a": "b"})
        tracker.dataset("scenes-train", "/data", "d", "training")
        train(2.5)
        client = MlflowClient(uri)
        assert 0 < len(client.get_metric_history(tracker.run_id, "loss")) <= steps
        assert caplog.messages == []
    train(4)
    (folder / "report.html").write_text("<p>")
    tracker.artifact(folder / "report.html", "pages")
    begun = time.perf_counter()
    tracker.close("FINISHED")
    assert time.perf_counter() - begun < 15
    assert spent < 1
    away, unsent = caplog.messages
    assert away.startswith(f"MLflow at {uri} does not answer as it should ([Errno 111] Connection refused). ")
    assert unsent.startswith(f"MLflow at {uri} did not get everything. Nothing is lost")
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == list(range(steps))

    with pytest.raises(TrackingError, match="does not take the rest of "):
        sync(folder)
    with server(tmp_path, port):
        sync(folder)
        history = client.get_metric_history(tracker.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [(n, 1 / (1 + n)) for n in range(steps)]
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["val R_at_1"] == steps - 1
        assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["scenes-train"]
        assert [one.path for one in client.list_artifacts(tracker.run_id, "pages")] == ["pages/report.html"]

        again = resume(folder)
        again.log({"loss": 0.0}, steps)
        again.close()
        assert len(client.get_metric_history(tracker.run_id, "loss")) == steps + 1
    assert tracking._open(folder).uri == uri
    assert "View run" not in capfd.readouterr().out
