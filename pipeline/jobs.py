"""Runs as Ray Jobs: the sources and the resolved settings are sent, the data stays where it is.

python -m pipeline submit run less --dataset coco --root /shared/coco --address http://127.0.0.1:8265
"""

import asyncio
import dataclasses
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.tracking import COMMIT_VARIABLE, absolute_uri, code_version, first_line, without_password

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SOURCES = ("featurize", "train", "evaluate", "pipeline")
"""The packages that a job needs; nothing else of the repository is sent."""

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

_READY_SECONDS = 60.0  # that a head which has only just started may take until it accepts jobs
_POLL_SECONDS = 2.0
_MOST_ABSENCES = 30  # polls in a row that the head may leave unanswered: a minute


class JobError(RuntimeError):
    """The cluster cannot be used: what is wrong, and what to do."""


def absolute(config: RunConfig) -> RunConfig:
    """The config with paths that mean the same in a job's working directory; URIs stay as they are."""

    def path(text: str) -> str:
        return text if not text or "://" in text else str(Path(text).absolute())

    data = dataclasses.replace(config.data, root=path(config.data.root))
    runs = str(Path(config.runs).absolute())
    return dataclasses.replace(config, data=data, cache=path(config.cache), runs=runs)


def submit(
    argv: Sequence[str],
    address: str | None,
    *,
    files: Mapping[str, str],
    python: str = "python",
    wait: bool = True,
) -> int:
    """Send a command of this program to a Ray cluster as a job, and follow its log.

    Args:
        argv: the arguments behind `python -m pipeline`, as the job sees them.
        address: URL of the head's dashboard; None: the one that Ray's variables name, else `DEFAULT_ADDRESS`.
        files: text files that the job finds in its working directory, by name.
        python: the Python of the cluster.
        wait: whether to follow the log and wait for the end.

    Returns:
        0 if the job succeeded (without `wait`: was taken), else 1.

    Raises:
        JobError: no Ray head answers, it refuses, or it goes away while it is waited for.
        KeyboardInterrupt: the user stopped following; its text says how to follow and how to stop the job.
    """
    address = address or _address_of_environment()
    # The client lets Ray's variables win over its argument; here what the user types wins.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        with tempfile.TemporaryDirectory() as folder:
            copy_sources(Path(folder), files)
            client = JobSubmissionClient(address)
            job = _send(client, shlex.join([python, "-m", "pipeline", *argv]), folder)
    except ConnectionError as error:
        raise JobError(
            f"no Ray head answers at {address}. Start one (`ray start --head`), forward its port (`ray "
            "dashboard cluster.yaml`), or name another with --address"
        ) from error
    except AuthenticationError as error:
        raise JobError(
            f"the Ray head at {address} wants a token ({first_line(error)}): set RAY_AUTH_MODE=token and put "
            "the token into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise JobError(
            f"{address} does not take the job: {first_line(error)}. Is it the address of a Ray dashboard?"
        ) from error
    where = f"{job} --address {address}"
    print(
        f"job {job}\n  follow it: ray job logs --follow {where}\n  stop it:   ray job stop {where}",
        flush=True,
    )
    return _follow(client, job, where) if wait else 0


def _send(client: "JobSubmissionClient", entrypoint: str, folder: str) -> str:
    """The id of a new job; waits for a head that has only just started."""
    end = time.monotonic() + _READY_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint, runtime_env={"working_dir": folder, "env_vars": _variables()}
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(_POLL_SECONDS)


def _follow(client: "JobSubmissionClient", job: str, where: str) -> int:
    """Print the job's log until it ends; 0 if it succeeded, else 1."""
    try:
        asyncio.run(_print_log(client, job, where))
        return _outcome(client, job, where)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the job goes on; follow it: `ray job logs --follow {where}`, stop it: `ray job stop {where}`"
        ) from None


async def _print_log(client: "JobSubmissionClient", job: str, where: str) -> None:
    from aiohttp import ClientError

    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
    except (RuntimeError, OSError, ClientError) as error:
        print(
            f"the log broke off ({first_line(error)}); the job goes on: ray job logs --follow {where}",
            flush=True,
        )


def _outcome(client: "JobSubmissionClient", job: str, where: str) -> int:
    """Wait until the job has ended, through short absences of the head; 0 if it succeeded, else 1."""
    absences = 0
    while True:
        try:
            info = client.get_job_info(job)
        except (RuntimeError, OSError) as error:
            absences += 1
            if absences == _MOST_ABSENCES:
                raise JobError(
                    f"the head went away while job {job} ran ({first_line(error)}); when it is back: "
                    f"`ray job status {where}`"
                ) from error
        else:
            absences = 0
            if info.status.is_terminal():
                print(f"job {job} {info.status.value}" + (f": {info.message}" if info.message else ""))
                return 0 if info.status.value == "SUCCEEDED" else 1
        time.sleep(_POLL_SECONDS)


def copy_sources(folder: Path, files: Mapping[str, str]) -> None:
    """Lay out a working directory for workers: the packages, pyproject.toml and some text files."""
    root = Path(__file__).parents[1]
    for package in SOURCES:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", folder)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _variables() -> dict[str, str]:
    """The job's environment: where MLflow is, and which code this is. Secrets belong to the cluster."""
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1", COMMIT_VARIABLE: code_version()}
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        variables["MLFLOW_TRACKING_URI"] = without_password(absolute_uri(uri))
    if experiment := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        variables["MLFLOW_EXPERIMENT_NAME"] = experiment
    return variables


def _address_of_environment() -> str:
    if address := os.environ.get("RAY_API_SERVER_ADDRESS"):
        return address
    address = os.environ.get("RAY_ADDRESS", "")
    return address if address.startswith(("http://", "https://")) else DEFAULT_ADDRESS
