"""Ray for the length of a command: started here, or a cluster that is already there."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featurize.resources import OWN
from pipeline.config import ConfigError, RayConfig
from pipeline.jobs import copy_sources

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the process of a submitted job, whose sources are already where workers find them."""


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to Ray and let go of it at the end; a session that is open already is used as it is.

    What workers print stays in Ray's logs: their errors are raised here, their progress is drawn here.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences its warning
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # each checkpoint waits for the next check
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves log files to the garbage collector
            if address:
                _attach(address)
            else:
                ray.init(
                    address="local",
                    num_cpus=config.cpus or None,
                    resources={OWN: 1},
                    object_store_memory=config.object_store_mb * 1024**2,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
    except (ConnectionError, AuthenticationError, RuntimeError) as error:
        if not address:
            raise
        raise ConfigError(
            f"no Ray cluster takes us at --ray.address {address} ({error}); start one with `ray start --head`, "
            "send the run as a job with `submit` if this machine is not in the cluster, or leave the option out to run "
            "on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _attach(address: str) -> None:
    """Connect to a cluster; its workers get the sources, unless a job has brought them already."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        environment = {}
        if IN_JOB not in os.environ:
            copy_sources(Path(folder), {})
            environment = {"working_dir": folder}
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
