"""The tracker on a real MLflow store (SQLite), and what it does when MLflow is away."""

import json
import logging
import math
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import tracking
from pipeline.config import RunConfig, keys, merge
from pipeline.tracking import TrackingError, resume, start, sync

# MLflow 3.17's own use of SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

ROOT = Path(__file__).parents[2]
CONFIG = merge(
    RunConfig(method="less"),
    {"data.dataset": "flickr8k", "train.lr": 0.5, "featurize.views": "plain,flip", "data.root": "/" + "x" * 600},
    "",
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", tracking.COMMIT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "_SEND_SECONDS", 0.05)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty MLflow database, made once: making one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracking._client(f"sqlite:///{folder}/mlflow.db")
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def runs(tmp_path, database):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(database)
    return folder


@pytest.fixture
def folder(runs):
    (runs / "one").mkdir()
    return runs / "one"


@pytest.fixture
def client(runs):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{runs}/mlflow.db")


class Away:
    """A client of a server that is away: every call fails as MLflow's do."""

    def __getattr__(self, name):
        from mlflow.exceptions import MlflowException

        def call(*args, **kwargs):
            raise MlflowException("no route to host\nmore")

        return call


def history(client, tracker, name):
    return [(point.step, point.value) for point in client.get_metric_history(tracker.run_id, name)]


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_can_be_read_in_mlflow(folder, client, monkeypatch):
    monkeypatch.setattr(tracking, "code_version", lambda: "abc-dirty")
    tracker = start(CONFIG, folder, {"cache.pooled": "0123", "long": "y" * 600})
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "one"
    assert run.info.status == "RUNNING"
    assert client.get_experiment(run.info.experiment_id).name == tracker.experiment == "isthmus"
    assert run.data.params.keys() == {key.name for key in keys(CONFIG)}
    assert run.data.params["train.lr"] == "0.5"
    assert run.data.params["featurize.views"] == "plain,flip"
    assert run.data.params["name"] == ""
    assert run.data.params["data.root"] == "/" + "x" * 496 + "..."
    tags = run.data.tags
    assert (tags["recipe"], tags["dataset"], tags["cache.pooled"]) == ("less", "flickr8k", "0123")
    assert (tags["commit"], tags["mlflow.source.git.commit"]) == ("abc-dirty", "abc")
    assert tags["long"] == "y" * 497 + "..."
    assert tracker.uri == f"sqlite:///{folder.parent}/mlflow.db"
    assert run.info.artifact_uri.startswith((folder.parent / "mlartifacts").as_uri())


def test_everything_that_is_logged_arrives(folder, client):
    tracker = start(CONFIG, folder, {})
    for step in range(5):
        tracker.log({"loss": 1 / (1 + step), "val R@1": np.float32(step)}, step)
    tracker.log({"odd name, (d#)": np.array(2.0)}, 5)
    tracker.tag("note", "z" * 600)
    tracker.dataset("flickr8k-train", "/data/flickr8k", "d" * 64, "training", {"images": 6000})
    tracker.dataset("flickr8k-val", "s3://bucket/val", "e", "evaluation")
    (folder / "report.html").write_text("<p>")
    (folder / "pages").mkdir()
    (folder / "pages" / "a.txt").write_text("a")
    tracker.artifact(folder / "report.html")
    tracker.artifact(folder / "pages", "under/this")
    tracker.close()
    assert history(client, tracker, "loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25), (4, 0.2)]
    assert history(client, tracker, "val R_at_1") == [(step, float(step)) for step in range(5)]
    assert history(client, tracker, "odd name_ _d__") == [(5, 2.0)]
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["note"] == "z" * 497 + "..."
    train, val = sorted(run.inputs.dataset_inputs, key=lambda one: one.dataset.name)
    assert (train.dataset.name, train.dataset.digest) == ("flickr8k-train", "d" * 36)
    assert json.loads(train.dataset.profile) == {"images": 6000}
    assert [(tag.key, tag.value) for tag in train.tags] == [("mlflow.data.context", "training")]
    assert [(tag.key, tag.value) for tag in val.tags] == [("mlflow.data.context", "evaluation")]
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["report.html", "under"]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "under/this")] == ["under/this/a.txt"]
    kept = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in kept] == [0, 1, 2, 3, 4, 5]
    assert kept[1]["metrics"] == {"loss": 0.5, "val R@1": 1.0}


@pytest.mark.parametrize(
    ("source", "attribute"),
    [
        ("/data/flickr8k", "uri"),
        ("file:///data/flickr8k", "uri"),
        ("s3://bucket/flickr8k", "uri"),
        ("gs://bucket/flickr8k", "uri"),
        ("https://example.org/flickr8k.zip", "url"),
    ],
)
def test_mlflow_can_resolve_a_dataset_s_source(folder, client, source, attribute):
    import mlflow.data

    tracker = start(CONFIG, folder, {})
    tracker.dataset("d", source, "1", "training")
    tracker.close()
    (logged,) = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert getattr(mlflow.data.get_source(logged.dataset), attribute) == source


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_end_s_status(folder, client, status):
    tracker = start(CONFIG, folder, {})
    tracker.close(status)
    info = client.get_run(tracker.run_id).info
    assert info.status == status
    assert info.end_time is not None


def test_metrics_arrive_while_the_run_goes_on(folder, client):
    tracker = start(CONFIG, folder, {})
    tracker.log({"loss": 1.0}, 0)
    wait_for(lambda: history(client, tracker, "loss"))
    tracker.log({"loss": 2.0}, 1)
    wait_for(lambda: len(history(client, tracker, "loss")) == 2)
    tracker.close()


def test_numbers_that_are_none(folder, client):
    tracker = start(CONFIG, folder, {})
    tracker.log({"a": math.nan, "b": math.inf}, 0)
    tracker.close()
    data = client.get_run(tracker.run_id).data.metrics
    assert math.isnan(data["a"])
    assert data["b"] > 1e300
    assert tracking._Journal(folder / "metrics.jsonl").complete()


def test_many_metrics_go_in_several_requests(folder, client):
    tracker = start(CONFIG, folder, {})
    tracker.log({f"m{number}": number for number in range(2100)}, 0)
    tracker.close()
    assert len(client.get_run(tracker.run_id).data.metrics) == 2100


def test_a_long_history_is_sent_in_pieces(folder, client):
    tracker = start(CONFIG, folder, {})
    journal = tracking._Journal(folder / "metrics.jsonl")
    for step in range(4000):
        journal.append({"step": step, "time": step, "metrics": {"some long name to fill the line with": step}})
    assert (folder / "metrics.jsonl").stat().st_size > 250_000
    tracker.close()
    assert len(client.get_metric_history(tracker.run_id, "some long name to fill the line with")) == 4000


def test_another_process_goes_on_with_the_same_run(folder, client):
    tracker = start(CONFIG, folder, {})
    there = pickle.loads(pickle.dumps(tracker.log))  # as Ray hands it to a worker
    there({"loss": 1.0}, 0)
    tracker.log({"loss": 2.0}, 1)
    tracker.close()  # the worker may be gone by now, and sends nothing itself
    assert history(client, tracker, "loss") == [(0, 1.0), (1, 2.0)]


def test_a_restart_continues_the_run_and_may_repeat_steps(folder, client):
    first = start(CONFIG, folder, {})
    first.log({"loss": 1.0}, 0)
    first.log({"loss": 0.9}, 1)
    first.close("FAILED")
    second = resume(folder)
    assert (second.run_id, second.experiment, second.uri) == (first.run_id, first.experiment, first.uri)
    second.log({"loss": 0.9}, 1)
    second.log({"loss": 0.8}, 2)
    wait_for(lambda: client.get_run(first.run_id).info.status == "RUNNING")
    second.close()
    assert [value for _, value in history(client, second, "loss")] == [1.0, 0.9, 0.9, 0.8]
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert len(client.search_runs([client.get_run(first.run_id).info.experiment_id])) == 1


def test_equal_points_are_kept_once(folder, client):
    tracker = start(CONFIG, folder, {})
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    (folder / "metrics.jsonl.sent").unlink()
    (folder / "mlflow-outbox.jsonl.sent").unlink()
    sync(folder)
    assert history(client, tracker, "loss") == [(0, 1.0)]


def test_a_moved_folder_of_runs_keeps_its_tracking(folder, client, tmp_path):
    start(CONFIG, folder, {}).close()
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = resume(tmp_path / "moved" / "one")
    assert moved.uri == f"sqlite:///{tmp_path}/moved/mlflow.db"
    moved.close()


def test_two_runs_share_an_experiment_named_by_the_environment(runs, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ablation")
    trackers = []
    for name in ("a", "b"):
        (runs / name).mkdir()
        trackers.append(start(CONFIG, runs / name, {}))
    ids = {client.get_run(tracker.run_id).info.experiment_id for tracker in trackers}
    assert len(ids) == 1
    assert client.get_experiment(ids.pop()).name == trackers[0].experiment == "ablation"


@pytest.mark.slow
def test_runs_that_start_at_once_in_a_new_place(tmp_path):
    """MLflow makes its tables at the first use, and not for several processes at a time."""
    code = (
        "import sys; from pathlib import Path; from pipeline.config import RunConfig;"
        "from pipeline.tracking import start;"
        "folder = Path(sys.argv[1]); folder.mkdir(); start(RunConfig(), folder, {}).close('FINISHED')"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / f"run{number}")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0, out
    client = tracking._client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("isthmus")
    assert len(client.search_runs([experiment.experiment_id])) == 3


def test_an_experiment_that_another_run_makes_at_this_moment():
    from mlflow.exceptions import MlflowException

    answers = iter([None, SimpleNamespace(experiment_id="7")])

    def exists(*_, **__):
        raise MlflowException("exists")

    racing = SimpleNamespace(get_experiment_by_name=lambda _: next(answers), create_experiment=exists)
    assert tracking._experiment(racing, "isthmus", None) == "7"
    refusing = SimpleNamespace(get_experiment_by_name=lambda _: None, create_experiment=exists)
    with pytest.raises(MlflowException, match="exists"):
        tracking._experiment(refusing, "isthmus", None)


def test_logging_while_mlflow_is_away_costs_nothing_and_warns_once(folder, client, monkeypatch, caplog):
    tracker = start(CONFIG, folder, {})
    real = tracking._client
    monkeypatch.setattr(tracking, "_client", lambda _: Away())
    caplog.set_level(logging.WARNING)
    spent = 0.0
    for step in range(100):
        begun = time.perf_counter()
        tracker.log({"loss": float(step)}, step)
        spent += time.perf_counter() - begun
        time.sleep(0.005)
    assert spent < 1
    wait_for(lambda: caplog.records)
    (warning,) = caplog.messages
    assert warning == (
        f"MLflow at {tracker.uri} does not answer as it should (no route to host). The run goes on: its metrics "
        f"are kept in {folder / 'metrics.jsonl'} and sent when MLflow is back."
    )
    begun = time.perf_counter()
    tracker.close()
    assert time.perf_counter() - begun < 6
    (last,) = caplog.messages[1:]
    assert last == (
        f"MLflow at {tracker.uri} did not get everything. Nothing is lost: it is kept in {folder} and sent by "
        f"the next `python -m pipeline evaluate {folder}`."
    )
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(100))
    assert history(client, tracker, "loss") == []
    with pytest.raises(TrackingError, match=r"does not take the rest of .*: no route to host. Start the server or"):
        sync(folder)
    monkeypatch.setattr(tracking, "_client", real)
    sync(folder)
    assert history(client, tracker, "loss") == [(step, float(step)) for step in range(100)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_mlflow_that_comes_back_gets_everything(folder, client, monkeypatch, caplog):
    tracker = start(CONFIG, folder, {})
    real = tracking._client
    monkeypatch.setattr(tracking, "_client", lambda _: Away())
    tracker.log({"loss": 1.0}, 0)
    wait_for(lambda: caplog.records)
    monkeypatch.setattr(tracking, "_client", real)
    monkeypatch.setattr(tracker, "_sender", None)  # the old thread holds the client that is away
    tracker.log({"loss": 2.0}, 1)
    tracker.close()
    assert history(client, tracker, "loss") == [(0, 1.0), (1, 2.0)]
    assert len(caplog.messages) == 1


def test_close_does_not_wait_for_a_server_that_hangs(folder, monkeypatch, caplog):
    tracker = start(CONFIG, folder, {})
    released = threading.Event()

    def hang(uri):
        released.wait(20)
        return Away()

    monkeypatch.setattr(tracking, "_client", hang)
    monkeypatch.setattr(tracking, "_LAST_DELIVERY_SECONDS", 0.3)
    begun = time.perf_counter()
    tracker.close()
    assert time.perf_counter() - begun < 2
    assert "did not get everything" in caplog.messages[0]
    released.set()


def test_half_a_line_of_a_killed_process_is_passed_over(folder, client):
    tracker = start(CONFIG, folder, {})
    (folder / "metrics.jsonl").write_text('{"step": 0, "time": 1, "metrics": {"loss": 1.0}}\n{"step": 1, "ti')
    assert not tracking._Journal(folder / "metrics.jsonl").complete()
    tracker.log({"loss": 3.0}, 2)
    tracker.close()
    assert history(client, tracker, "loss") == [(0, 1.0), (2, 3.0)]


def test_a_line_that_is_still_being_written_waits(tmp_path):
    journal = tracking._Journal(tmp_path / "x.jsonl")
    journal.append({"a": 1})
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"a": ')
    assert list(journal.unsent()) == [[{"a": 1}]]
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write("2}\n")
    assert list(journal.unsent()) == [[{"a": 2}]]
    assert journal.complete()


def test_lines_count_as_sent_only_when_their_delivery_did_not_fail(tmp_path):
    journal = tracking._Journal(tmp_path / "x.jsonl")
    journal.append({"a": 1})
    deliveries = journal.unsent()
    next(deliveries)
    deliveries.close()
    assert not journal.complete()
    assert list(journal.unsent()) == [[{"a": 1}]]


def test_a_journal_that_was_begun_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    journal = tracking._Journal(path)
    journal.append({"a": "long" * 10})
    list(journal.unsent())
    path.unlink()
    journal.append({"a": 1})
    assert list(journal.unsent()) == [[{"a": 1}]]


def test_an_artifact_that_is_missing(folder, client, caplog):
    tracker = start(CONFIG, folder, {})
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: expected a file or folder to keep as an artifact"):
        tracker.artifact(folder / "gone.txt")
    path = folder / "soon-gone.txt"
    tracking._Journal(folder / "mlflow-outbox.jsonl").append({"artifact": str(path), "under": ""})
    tracker.close()
    assert caplog.messages == [f"{path} is gone and could not be kept as an artifact"]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_an_artifact_from_elsewhere(folder, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_text("b")
    tracker = start(CONFIG, folder, {})
    tracker.artifact(tracking.Path("b.txt"))
    tracker.close()
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["b.txt"]


def test_a_server_that_does_not_answer_is_an_error_at_the_start(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    with pytest.raises(TrackingError) as error:
        start(CONFIG, folder, {})
    message = str(error.value)
    assert message == (
        "MLflow at http://127.0.0.1:9 does not take the run: [Errno 111] Connection refused. Start the "
        "server, correct MLFLOW_TRACKING_URI, or unset it to track in "
        f"sqlite:///{folder.parent}/mlflow.db"
    )
    assert not (folder / "mlflow.json").exists()


def test_a_tracking_uri_of_no_kind_is_an_error_at_the_start(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://x")
    with pytest.raises(TrackingError, match=r"^MLflow at gopher://x does not take the run: "):
        start(CONFIG, folder, {})


@pytest.mark.parametrize("text", [None, "{", '{"run_id": "1"}'])
def test_a_folder_without_its_mlflow_run(folder, text):
    if text is not None:
        (folder / "mlflow.json").write_text(text)
    for road in (resume, sync):
        with pytest.raises(TrackingError, match=r"mlflow\.json: expected the MLflow run of this folder, found "):
            road(folder)


def test_a_run_on_a_server_is_looked_for_where_the_environment_says(folder, monkeypatch):
    known = {"run_id": "1", "experiment": "e", "uri": "http://old:5000"}
    (folder / "mlflow.json").write_text(json.dumps(known))
    assert tracking._open(folder).uri == "http://old:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@new:5000")
    opened = tracking._open(folder)
    assert opened.uri == "http://new:5000"
    assert opened._uri == "http://me:secret@new:5000"
    (folder / "mlflow.json").write_text(json.dumps(known | {"uri": ""}))
    assert tracking._open(folder).uri == f"sqlite:///{folder.parent}/mlflow.db"


def test_passwords_are_not_written_down(folder, database, tmp_path, monkeypatch):
    real = tracking._client
    monkeypatch.setattr(tracking, "_client", lambda _: real(f"sqlite:///{folder.parent}/mlflow.db"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    tracker = start(CONFIG, folder, {})
    assert tracker.uri == "http://host:5000"
    assert lines_of_files_with(folder, "secret") == []


def lines_of_files_with(folder, word):
    return [path.name for path in folder.rglob("*") if path.is_file() and word in path.read_text()]


def test_relative_sqlite_uris_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.absolute_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert tracking.absolute_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert tracking.absolute_uri("http://h:1/x") == "http://h:1/x"
    assert tracking.absolute_uri("") == ""


def test_the_code_s_version(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    assert tracking.code_version() == ""

    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True
        )

    git("init", "-q")
    assert tracking.code_version() == ""
    git("commit", "-q", "--allow-empty", "-m", "x")
    commit = tracking.code_version()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "new.py").touch()
    assert tracking.code_version() == commit + "-dirty"
    monkeypatch.setenv(tracking.COMMIT_VARIABLE, "from-the-job")
    assert tracking.code_version() == "from-the-job"


def test_nothing_is_reported_to_anybody(runs):
    import os

    tracking._client(f"sqlite:///{runs}/mlflow.db")
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
    assert is_telemetry_disabled()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 10
