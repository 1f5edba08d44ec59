"""Ray Jobs: what is sent, what is said, and a job on a real head."""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import ray.job_submission
from mlflow import MlflowClient
from ray.job_submission import JobStatus

from pipeline import jobs
from pipeline.__main__ import main
from pipeline.config import RunConfig, absolute_encoders, merge
from pipeline.jobs import JobError, absolute, submit


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that what submit sets is undone
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)


class Client:
    """Stands for Ray's client; its job says what `answers` say, one for each question."""

    def __init__(self, answers=(), log=("one\n", "two\n"), log_error=None, refusals=()):
        self.refusals = iter(refusals)
        self.answers = iter(answers)
        self.log = log
        self.log_error = log_error
        self.sent = {}

    def __call__(self, address):
        self.sent["address"] = address
        return self

    def submit_job(self, entrypoint, runtime_env):
        for refusal in self.refusals:
            raise refusal
        folder = Path(runtime_env["working_dir"])
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        texts = {path.name: path.read_text() for path in folder.glob("*.yaml")}
        self.sent |= {"entrypoint": entrypoint, "env_vars": runtime_env["env_vars"], "files": files, "texts": texts}
        self.sent["folder"] = folder
        return "job_1"

    async def tail_job_logs(self, job):
        assert job == "job_1"
        for lines in self.log:
            yield lines
        if self.log_error:
            raise self.log_error

    def get_job_info(self, job):
        assert job == "job_1"
        answer = next(self.answers)
        if isinstance(answer, BaseException):
            raise answer
        return SimpleNamespace(status=answer, message="exit code 1" if answer == JobStatus.FAILED else None)


@pytest.fixture
def client(monkeypatch):
    def put(*args, **kwargs):
        fake = Client(*args, **kwargs)
        monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", fake)
        return fake

    return put


def test_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = merge(RunConfig(), {"data.root": "d", "cache": "s3://b/c", "runs": "/r"}, "")
    changed = absolute(config)
    assert (changed.data.root, changed.cache, changed.runs) == (str(tmp_path / "d"), "s3://b/c", "/r")
    assert absolute(RunConfig()).data.root == ""
    assert absolute(RunConfig()).cache == str(tmp_path / "cache")


def test_encoders_in_files_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dino").mkdir()
    (tmp_path / "resnet.pth").touch()
    images = (
        "torchvision:resnet50@resnet.pth",
        "torchvision:resnet50@default",
        "transformers:dino",
        "efficientnet-lite0",
        "regions:fasterrcnn_resnet50_fpn@resnet.pth",
        "regions:fasterrcnn_resnet50_fpn@resnet.pth+transformers:dino+k=10+score=0.3",
        "regions:ssd-mobilenet+torchvision:resnet50@resnet.pth+k=10",
        "regions:fasterrcnn_resnet50_fpn@gone.pth+torchvision:resnet50@random:7",
    )
    texts = ("transformers:dino", "transformers:BAAI/bge-small-en", "minilm")
    changed = absolute_encoders(
        merge(RunConfig(), {"featurize.images": images, "featurize.texts": texts}, "")
    ).featurize
    here = str(tmp_path)
    assert changed.images == (
        f"torchvision:resnet50@{here}/resnet.pth",
        images[1],
        f"transformers:{here}/dino",
        images[3],
        f"regions:fasterrcnn_resnet50_fpn@{here}/resnet.pth",
        f"regions:fasterrcnn_resnet50_fpn@{here}/resnet.pth+transformers:{here}/dino+k=10+score=0.3",
        f"regions:ssd-mobilenet+torchvision:resnet50@{here}/resnet.pth+k=10",
        images[7],
    )
    assert changed.texts == (f"transformers:{here}/dino", *texts[1:])


def test_what_is_sent(client, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "e")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("ISTHMUS_COMMIT", "abc")
    fake = client()
    argv = ["run", "two words.yaml"]
    assert submit(argv, "http://h:1", files={"two words.yaml": "a: ü\n"}, python="python3", wait=False) == 0
    assert fake.sent["address"] == "http://h:1"
    assert fake.sent["entrypoint"] == "python3 -m pipeline run 'two words.yaml'"
    assert fake.sent["env_vars"] == {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "ISTHMUS_COMMIT": "abc",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
        "MLFLOW_EXPERIMENT_NAME": "e",
    }
    assert fake.sent["texts"] == {"two words.yaml": "a: ü\n"}
    files = fake.sent["files"]
    assert {"pyproject.toml", "pipeline/__main__.py", "train/config.py", "evaluate/config.py"} <= set(files)
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"featurize", "train", "evaluate", "pipeline", "pyproject.toml", "two words.yaml"}
    assert not any("__pycache__" in name for name in files)
    assert sum(files.values()) < 5e6
    assert not fake.sent["folder"].exists()


def test_passwords_are_not_sent(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow:5000/x")
    fake = client()
    submit(["run", "a"], "http://h:1", files={}, wait=False)
    assert fake.sent["env_vars"]["MLFLOW_TRACKING_URI"] == "https://mlflow:5000/x"
    assert "secret" not in json.dumps(fake.sent["env_vars"])


def test_without_waiting_the_job_and_the_command_that_follows_it_are_named(client, capsys):
    client()
    assert submit(["run", "a"], "http://h:1", files={}, wait=False) == 0
    assert capsys.readouterr().out == (
        "job job_1\n"
        "  follow it: ray job logs --follow job_1 --address http://h:1\n"
        "  stop it:   ray job stop job_1 --address http://h:1\n"
    )


@pytest.mark.parametrize(
    ("status", "code", "last"),
    [
        (JobStatus.SUCCEEDED, 0, "job job_1 SUCCEEDED"),
        (JobStatus.FAILED, 1, "job job_1 FAILED: exit code 1"),
        (JobStatus.STOPPED, 1, "job job_1 STOPPED"),
    ],
)
def test_the_log_is_followed_to_the_end(client, capsys, status, code, last):
    client([JobStatus.RUNNING, OSError("a short absence"), status])
    assert submit(["run", "a"], "http://h:1", files={}) == code
    assert capsys.readouterr().out.splitlines()[3:] == ["one", "two", last]


@pytest.mark.parametrize("error", [RuntimeError("WebSocket connection closed"), OSError("reset")])
def test_a_log_that_breaks_off_does_not_end_the_waiting(client, capsys, error):
    client([JobStatus.RUNNING, JobStatus.SUCCEEDED], log_error=error)
    assert submit(["run", "a"], "http://h:1", files={}) == 0
    expected = f"the log broke off ({error}); the job goes on: ray job logs --follow job_1 --address http://h:1"
    assert expected in capsys.readouterr().out


def test_a_head_that_stays_away_is_an_error_that_says_how_to_look_later(client):
    client([OSError("gone\nmore")] * 30)
    with pytest.raises(JobError) as error:
        submit(["run", "a"], "http://h:1", files={})
    assert str(error.value) == (
        "the head went away while job job_1 ran (gone); when it is back: `ray job status job_1 --address http://h:1`"
    )


def test_a_head_that_has_only_just_started_is_waited_for(client, monkeypatch):
    not_yet = RuntimeError("Request failed with status code 500: No available agent to submit job, try again")
    client(refusals=[not_yet] * 5)
    assert submit(["run", "a"], "http://h:1", files={}, wait=False) == 0
    monkeypatch.setattr(jobs, "_READY_SECONDS", 0.05)
    client(refusals=[not_yet] * 1000)
    with pytest.raises(JobError, match=r"^http://h:1 does not take the job: .*No available agent"):
        submit(["run", "a"], "http://h:1", files={}, wait=False)


def test_other_refusals_are_final(client):
    client(refusals=[RuntimeError("the package is too large")])
    with pytest.raises(JobError, match=r"^http://h:1 does not take the job: the package is too large"):
        submit(["run", "a"], "http://h:1", files={}, wait=False)


def test_ctrl_c_leaves_the_job_running_and_says_so(client):
    client([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt) as stop:
        submit(["run", "a"], "http://h:1", files={})
    assert str(stop.value) == (
        "the job goes on; follow it: `ray job logs --follow job_1 --address http://h:1`, "
        "stop it: `ray job stop job_1 --address http://h:1`"
    )


@pytest.mark.parametrize(
    ("environment", "typed", "expected"),
    [
        ({}, None, "http://127.0.0.1:8265"),
        ({"RAY_ADDRESS": "auto"}, None, "http://127.0.0.1:8265"),
        ({"RAY_ADDRESS": "https://a:1"}, None, "https://a:1"),
        ({"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, None, "http://b:2"),
        ({"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://c:3", "http://c:3"),
    ],
)
def test_the_address(client, monkeypatch, environment, typed, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fake = client()
    submit(["run", "a"], typed, files={}, wait=False)
    assert fake.sent["address"] == expected
    assert os.environ["RAY_API_SERVER_ADDRESS"] == expected  # Ray's client reads it before its argument


@contextmanager
def answering(status, body):
    """An HTTP server that answers every request alike, and its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_address_where_nobody_answers():
    with pytest.raises(JobError) as error:
        submit(["run", "a"], "http://127.0.0.1:9", files={})
    assert str(error.value) == (
        "no Ray head answers at http://127.0.0.1:9. Start one (`ray start --head`), forward its port "
        "(`ray dashboard cluster.yaml`), or name another with --address"
    )


@pytest.mark.parametrize(
    ("status", "body"), [(404, b""), (500, b""), (200, b"<html>"), (200, b"{}"), (200, b'{"ray_version": "1.0"}')]
)
def test_an_address_of_something_else(status, body):
    with answering(status, body) as address, pytest.raises(JobError) as error:
        submit(["run", "a"], address, files={})
    assert str(error.value).startswith(f"{address} does not take the job: ")
    assert str(error.value).endswith("Is it the address of a Ray dashboard?")


def test_a_head_that_wants_a_token():
    with answering(401, b"no token") as address, pytest.raises(JobError) as error:
        submit(["run", "a"], address, files={})
    assert str(error.value).startswith(f"the Ray head at {address} wants a token (")
    assert "set RAY_AUTH_MODE=token and put the token into RAY_AUTH_TOKEN or ~/.ray/auth_token" in str(error.value)


def test_an_address_of_no_kind():
    with pytest.raises(JobError, match=r"^gopher://x does not take the job: Module: gopher does not exist"):
        submit(["run", "a"], "gopher://x", files={})


def free_ports(count):
    """Ports that neither Ray's workers (10002-19999) nor anybody else here takes."""
    found = []
    for port in range(20500, 30000, 7):
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError


class Head(NamedTuple):
    """Where jobs go, and where drivers attach."""

    jobs: str
    ray: str


@pytest.fixture
def head(tmp_path, monkeypatch):
    """A Ray head with a dashboard, started by hand."""
    port, dashboard, client_port, agent, agent_grpc, environments = free_ports(6)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "1"),
                *("--port", str(port), "--dashboard-port", str(dashboard)),
                *("--ray-client-server-port", str(client_port), "--object-store-memory", str(200 * 2**20)),
                *("--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(agent_grpc)),
                *("--runtime-env-agent-port", str(environments)),
            ],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=log,
            stderr=log,
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        end = time.monotonic() + 90
        while True:
            with socket.socket() as candidate:
                if candidate.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < end, (tmp_path / "head.log").read_text()
            time.sleep(0.3)
        yield Head(address, f"127.0.0.1:{port}")
    finally:
        process.terminate()  # the head drains, then ends what it started
        process.wait(60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # Ray 2.60 and aiohttp
def test_jobs_on_a_real_head(head, capsys, tmp_path):
    assert submit(["run", "--help"], head.jobs, files={}, python=sys.executable) == 0
    out = capsys.readouterr().out
    assert "usage: python -m pipeline run METHOD" in out
    assert "SUCCEEDED" in out

    files = {"mine.yaml": "recipe: less\ntrain: {lr: fast}\n"}
    assert submit(["run", "mine.yaml"], head.jobs, files=files, python=sys.executable) == 1
    out = capsys.readouterr().out
    assert "error: mine.yaml:2: train.lr: found 'fast', expected number" in out
    assert "FAILED" in out

    assert submit(["run", "--help"], head.jobs, files={}, python=sys.executable, wait=False) == 0
    job = capsys.readouterr().out.split()[1]
    command = f"ray job logs --follow {job} --address {head.jobs}"
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), *shlex.split(command)[1:]],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "RAY_API_SERVER_ADDRESS": ""},
    )
    assert "usage: python -m pipeline run METHOD" in done.stdout


SMALL = [
    *("--data.scenes.train", "40", "--data.scenes.val", "16", "--data.scenes.test", "8"),
    *("--featurize.images", "efficientnet-lite0", "--featurize.views", "plain"),
    *("--train.epochs", "2", "--train.batch", "32", "--train.model.dim", "64", "--train.cpus_per_worker", "1"),
    *("--train.objective.quantization.codewords", "16"),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # Ray 2.60 and aiohttp
def test_the_scenes_job_and_its_mlflow_run(head, capsys, tmp_path, monkeypatch):
    """Submitted from another folder, with relative paths; the run, its cache and its MLflow run are found here."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--cache", "cache", "--runs", "runs", "--name", "job", *SMALL]
    code = main(["submit", "run", "less", *arguments, "--address", head.jobs, "--python", sys.executable])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "SUCCEEDED" in out
    assert "val, full: rSum" in out
    metrics = json.loads((tmp_path / "runs" / "job" / "metrics.json").read_text())
    known = json.loads((tmp_path / "runs" / "job" / "mlflow.json").read_text())
    run = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").get_run(known["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["rsum"] == pytest.approx(metrics["rsum"])

    # the same features, by a driver that attaches to the cluster: nothing is extracted, and a worker trains
    arguments = ["--cache", "cache", "--runs", "runs", "--name", "attached", *SMALL]
    assert main(["run", "less", *arguments, "--ray.address", head.ray]) == 0
    assert "0 rows to extract" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "attached" / "metrics.json").read_text()) == metrics

    code = main(["submit", "run", "less", *arguments, "--address", head.jobs, "--python", sys.executable])
    assert code == 1  # the name is taken: the job fails, and so does the command
    assert "exists; give another --name" in capsys.readouterr().out
