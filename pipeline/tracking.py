"""MLflow tracking that never stands in training's way.

Everything is first written down in the run's folder and then sent by a background thread: metrics in
`metrics.jsonl` (one line for each call of `log`), everything else in `mlflow-outbox.jsonl`. Beside each file
stands how much of it was sent, so a tracking server that goes away in mid-run costs nothing: training goes
on, and what is missing is sent when the server is back, by `close`, by `resume` or by `sync`. Each line is
sent at least once; MLflow keeps one of equal points, so sending twice is harmless.

Only `start` insists on a server that answers: a wrong address is an error before training, not after.
"""

import contextlib
import json
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from filelock import FileLock

from pipeline.config import RunConfig, keys

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_FILE = "mlflow.json"
"""Which MLflow run a run's folder belongs to."""
METRICS_FILE = "metrics.jsonl"
OUTBOX_FILE = "mlflow-outbox.jsonl"
COMMIT_VARIABLE = "ISTHMUS_COMMIT"
"""Names the code's commit where the sources are no git checkout (a Ray job)."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

_SEND_SECONDS = 1.0  # between two deliveries
_LONGEST_PAUSE = 60.0  # between two attempts to reach a server that is away
_LAST_ATTEMPT_SECONDS = 5.0  # in close(), for a server that is away
_LAST_DELIVERY_SECONDS = 60.0  # in close(), for one that is there
_MOST_METRICS, _MOST_PARAMS = 1000, 100  # in one request, by MLflow's rules
_LONGEST_VALUE = 500  # characters of a parameter or tag that every MLflow version takes

_SQLITE = "sqlite:///"

_log = logging.getLogger(__name__)


class TrackingError(RuntimeError):
    """MLflow cannot be used: what is wrong, and what to do."""


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """What JSON lines say; half a line, which a killed process or a full disk left, is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, oldest first: `step`, `time` and `metrics` of each time that it did."""
    path = folder / METRICS_FILE
    return list(_records(path.read_bytes().splitlines())) if path.exists() else []


class _Journal:
    """A file of JSON lines that are written down now and sent later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sent_path = path.with_name(f"{path.name}.sent")
        self._lock = threading.Lock()
        self._checked = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line; it is out of this process's hands when this returns."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock, self.path.open("a+b") as file:
            if not self._checked and file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a killed process left half a line
            self._checked = True
            file.write(line)

    def complete(self) -> bool:
        """Whether everything was sent."""
        return not self.path.exists() or self._sent() == self.path.stat().st_size

    def unsent(self) -> Iterator[list[dict[str, Any]]]:
        """Lines that were not sent, oldest first, some 250 kB at a time.

        They count as sent when the next ones are asked for: not if the caller fails before.
        """
        while not self.complete():
            offset = self._sent()
            with self.path.open("rb") as file:
                file.seek(offset)
                lines = [line for line in file.readlines(250_000) if line.endswith(b"\n")]
            if not lines:
                return  # the only line is still being written
            yield list(_records(lines))  # the step of half a line is replayed anyway
            _write(self._sent_path, str(offset + sum(map(len, lines))))

    def _sent(self) -> int:
        """Bytes that were sent; 0 if the file was begun anew since."""
        sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0
        return sent if sent <= self.path.stat().st_size else 0


class Tracker:
    """The handle of one MLflow run: made by the driver, pickled into the worker that trains.

    Attributes:
        folder: the run's folder, on storage that driver and workers share.
        run_id: of the MLflow run.
        experiment: the name of the MLflow experiment.
    """

    def __init__(self, folder: Path, uri: str, run_id: str, experiment: str) -> None:
        self.folder = folder
        self.run_id = run_id
        self.experiment = experiment
        self._uri = uri
        self._metrics = _Journal(folder / METRICS_FILE)
        self._outbox = _Journal(folder / OUTBOX_FILE)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sender: threading.Thread | None = None
        self._away = False

    def __reduce__(self) -> tuple[type["Tracker"], tuple[Path, str, str, str]]:
        """Travels without its thread; another process starts its own."""
        return Tracker, (self.folder, self._uri, self.run_id, self.experiment)

    @property
    def uri(self) -> str:
        """Where MLflow is, without a password."""
        return without_password(self._uri)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers of a step. Takes well under a millisecond and never waits for MLflow.

        In MLflow, `@` in a name reads `_at_` and other characters that it does not allow read `_`.

        Args:
            metrics: name -> value; what `float` takes.
            step: optimiser steps so far.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.append({"step": step, "time": round(time.time(), 3), "metrics": values})
        self._start()

    def tag(self, key: str, value: str) -> None:
        """Set a tag; long values are shortened."""
        self._outbox.append({"tag": [key, _shortened(value)]})
        self._start()

    def dataset(
        self,
        name: str,
        source: str,
        digest: str,
        context: str,
        profile: Mapping[str, float | str] | None = None,
    ) -> None:
        """Say what the run learns on or is measured on.

        Args:
            name: of the data set, or of one of its splits.
            source: path or URI.
            digest: identity of the content; MLflow keeps 36 characters.
            context: what the run does with it: training, evaluation.
            profile: facts such as the number of images.
        """
        scheme = urlsplit(source).scheme
        if scheme in ("http", "https"):
            kind, key = "http", "url"
        else:
            kind, key = "local" if scheme in ("", "file") else scheme, "uri"
        fields = {
            "name": name,
            "digest": digest[:36],
            "source_type": kind,
            "source": json.dumps({key: source}),
            "profile": json.dumps(dict(profile or {})),
        }
        self._outbox.append({"dataset": fields, "context": context})
        self._start()

    def artifact(self, path: Path, under: str = "") -> None:
        """Keep a file, or a folder's files, as they are when they are sent.

        Args:
            path: of the file or folder.
            under: sub-folder of the run's artifacts; empty: their root.

        Raises:
            FileNotFoundError: there is nothing at `path`.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected a file or folder to keep as an artifact")
        inside = path.is_relative_to(self.folder)
        where = path.relative_to(self.folder) if inside else path.absolute()
        self._outbox.append({"artifact": str(where), "under": under})
        self._start()

    def reopen(self) -> None:
        """Say that an ended run goes on, and send what MLflow has not got."""
        self._outbox.append({"status": "RUNNING"})
        self._start()

    def deliver(self) -> None:
        """Send what MLflow has not got, now and in this thread; raises what MLflow raises."""
        _deliver(_client(self._uri), self.run_id, self._metrics, self._outbox)

    def close(self, status: Status = "FINISHED") -> None:
        """End the run and deliver what is left, within a bounded time.

        If MLflow stays away, a last message says what is missing and how it will get there.
        """
        self._outbox.append({"status": status})
        self._start()
        self._closing.set()
        assert self._sender is not None
        self._sender.join(_LAST_ATTEMPT_SECONDS if self._away else _LAST_DELIVERY_SECONDS)
        self._sender = None
        if not (self._metrics.complete() and self._outbox.complete()):
            _log.warning(
                "MLflow at %s did not get everything. Nothing is lost: it is kept in %s and sent by the next "
                "`python -m pipeline evaluate %s`.",
                self.uri,
                self.folder,
                self.folder,
            )

    def _start(self) -> None:
        with self._lock:
            if self._sender is None:
                self._closing.clear()
                self._sender = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)
                self._sender.start()

    def _send(self) -> None:
        """The thread: delivers every second, more rarely while MLflow is away, and a last time at the end."""
        client, pause, warned = None, _SEND_SECONDS, False
        errors = _errors()
        while True:
            closing = self._closing.wait(pause)
            try:
                client = client or _client(self._uri)
                _deliver(client, self.run_id, self._metrics, self._outbox)
            except errors as error:
                self._away = True
                pause = min(2 * pause, _LONGEST_PAUSE)
                if not warned:
                    _log.warning(
                        "MLflow at %s does not answer as it should (%s). The run goes on: its metrics are "
                        "kept in %s and sent when MLflow is back.",
                        self.uri,
                        _reason(error),
                        self._metrics.path,
                    )
                warned = True
            else:
                self._away = False
                pause = _SEND_SECONDS
            if closing:
                return


def start(config: RunConfig, folder: Path, tags: Mapping[str, str]) -> Tracker:
    """Create an MLflow run for a run's folder, with its parameters and tags.

    It goes to the server that `MLFLOW_TRACKING_URI` names, else to `mlflow.db` and `mlartifacts` beside the
    folder; into the experiment that `MLFLOW_EXPERIMENT_NAME` names, else into "isthmus".

    Args:
        config: its settings become parameters.
        folder: the run's folder; it exists, its name is the run's, and it will hold `mlflow.json`.
        tags: more tags, such as the identities of the cached columns.

    Raises:
        TrackingError: MLflow does not answer, or refuses.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    uri = absolute_uri(given) or _uri_beside(folder)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "isthmus")
    artifacts = None if given else (folder.parent / "mlartifacts").absolute().as_uri()
    errors = _errors()
    try:
        client = _client(uri)
        run_id = _create(client, config, folder.name, tags, _experiment(client, name, artifacts))
    except errors as error:
        raise TrackingError(
            f"MLflow at {without_password(uri)} does not take the run: {_reason(error)}. Start the "
            f"server, correct MLFLOW_TRACKING_URI, or unset it to track in {_uri_beside(folder)}"
        ) from error
    known = {"run_id": run_id, "experiment": name, "uri": without_password(absolute_uri(given))}
    _write(folder / RUN_FILE, json.dumps(known, indent=1))
    return Tracker(folder, uri, run_id, name)


def resume(folder: Path) -> Tracker:
    """The tracker of an earlier run, to go on with it; what was missing in MLflow is sent, without waiting.

    A run that was tracked beside its folder stays there; one on a server is looked for where
    `MLFLOW_TRACKING_URI` says, should the server have moved.

    Raises:
        TrackingError: the folder's `mlflow.json` is missing or broken.
    """
    tracker = _open(folder)
    tracker.reopen()
    return tracker


def sync(folder: Path) -> None:
    """Send what MLflow has not got of an earlier run; returns when it has everything.

    Raises:
        TrackingError: the folder's `mlflow.json` is missing or broken, or MLflow does not answer.
    """
    tracker = _open(folder)
    errors = _errors()
    try:
        tracker.deliver()
    except errors as error:
        raise TrackingError(
            f"MLflow at {tracker.uri} does not take the rest of {folder}: {_reason(error)}. Start the "
            "server or correct MLFLOW_TRACKING_URI"
        ) from error


def code_version() -> str:
    """The commit of this code, `-dirty` if files differ from it; "" where the sources are no git checkout."""
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - fixed

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout, or no commit yet
        return ""


def absolute_uri(uri: str) -> str:
    """A tracking URI that means the same in every working directory."""
    path = uri.removeprefix(_SQLITE)
    return uri if path == uri else f"{_SQLITE}{Path(path).absolute()}"


def _uri_beside(folder: Path) -> str:
    return f"{_SQLITE}{(folder.parent / 'mlflow.db').absolute()}"


def _open(folder: Path) -> Tracker:
    path = folder / RUN_FILE
    try:
        known = json.loads(path.read_text())
        run_id, experiment, stored = known["run_id"], known["experiment"], known["uri"]
    except (OSError, ValueError, KeyError) as error:
        raise TrackingError(
            f"{path}: expected the MLflow run of this folder, found {error!r}; a run that ended before "
            "it was tracked has none: start it again"
        ) from error
    moved = absolute_uri(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return Tracker(folder, (moved or stored) if stored else _uri_beside(folder), run_id, experiment)


def _client(uri: str) -> "MlflowClient":
    """A client that gives up soon, reports nothing to anybody, and is quiet about retries and new databases."""
    for variable, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    }.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a word for every retry
    from mlflow import MlflowClient

    if not uri.startswith(_SQLITE):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    database = Path(uri.removeprefix(_SQLITE))
    with FileLock(database.with_name(f".{database.name}.lock")):  # two runs that start at once would both make tables
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


def _errors() -> tuple[type[Exception], ...]:
    """What MLflow raises when it cannot be reached or refuses; those of `requests` are OSErrors."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError
    from urllib3.exceptions import HTTPError

    return MlflowException, SQLAlchemyError, HTTPError, OSError


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """The id of an experiment that is made if it is new, perhaps by another run at this moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _create(client: "MlflowClient", config: RunConfig, name: str, tags: Mapping[str, str], experiment_id: str) -> str:
    """The id of a new run with its tags and parameters."""
    from mlflow.entities import Param

    commit = code_version()
    known = {"recipe": config.method, "dataset": config.data.dataset, **tags}
    if commit:
        known |= {"commit": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")}
    shortened = {key: _shortened(value) for key, value in known.items()}
    run_id = str(client.create_run(experiment_id, run_name=name, tags=shortened).info.run_id)
    params = [Param(key.name, _shortened(key.value)) for key in keys(config)]
    for some in _chunks(params, _MOST_PARAMS):
        client.log_batch(run_id, params=some)
    return run_id


def _deliver(client: "MlflowClient", run_id: str, metrics: _Journal, outbox: _Journal) -> None:
    """Send everything that is written down, metrics first: a status comes after the numbers before it."""
    from mlflow.entities import Metric

    for records in metrics.unsent():
        points = [
            Metric(_allowed(name), value, int(record["time"] * 1000), record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        for some in _chunks(points, _MOST_METRICS):
            client.log_batch(run_id, metrics=some)
    for records in outbox.unsent():
        for record in records:
            _perform(client, run_id, record, outbox.path.parent)


def _perform(client: "MlflowClient", run_id: str, record: dict[str, Any], folder: Path) -> None:
    """Do what a line of the outbox says; doing it twice is harmless."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    match record:
        case {"tag": [key, value]}:
            client.set_tag(run_id, key, value)
        case {"dataset": fields, "context": context}:
            given = DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", context)])
            client.log_inputs(run_id, datasets=[given])
        case {"artifact": where, "under": under}:
            path = folder / where
            if path.is_dir():
                client.log_artifacts(run_id, str(path), under or None)
            elif path.exists():
                client.log_artifact(run_id, str(path), under or None)
            else:
                _log.warning("%s is gone and could not be kept as an artifact", path)
        case {"status": "RUNNING"}:
            client.update_run(run_id, status="RUNNING")
        case {"status": status}:
            client.set_terminated(run_id, status)


def _chunks(items: list[Any], most: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _allowed(name: str) -> str:
    """A metric's name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 3]}..."


def without_password(uri: str) -> str:
    """A URI without the user and password that it may hold."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def _reason(error: Exception) -> str:
    """Why MLflow failed: behind its long texts about requests stands what the network said."""
    root: BaseException = error
    while root.__context__ is not None:
        root = root.__context__
    return first_line(root if isinstance(root, OSError) else error)


def first_line(error: BaseException) -> str:
    """What an error says, without the details that libraries put below."""
    return str(error).partition("\n")[0]


def _write(path: Path, text: str) -> None:
    """Write a file that other processes read, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    part.write_text(text)
    part.replace(path)
