"""What Ray cannot give is said at once, where it would be waited for without a word."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from featurize import resources
from featurize.config import FeaturizeConfig
from featurize.fill import _run
from featurize.manifest import CacheError
from featurize.resources import require_resources

pytestmark = pytest.mark.usefixtures("ray_local")  # two cores, no GPU


class RefusedError(ValueError):
    pass


@pytest.mark.parametrize(
    ("bundle", "count"), [({"CPU": 2}, 1), ({"CPU": 1, "GPU": 0}, 2), ({"CPU": 0.5}, 4), ({"CPU": 0}, 9)]
)
def test_what_fits_says_nothing(bundle, count, capsys):
    require_resources(bundle, count, "ask for less", RefusedError)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("bundle", "count", "told"),
    [
        ({"CPU": 3}, 1, "found 2 CPU, expected 3 CPU"),
        ({"CPU": 1}, 3, "found 2 CPU, expected 1 CPU for each of 3"),
        ({"CPU": 1, "GPU": 0.5}, 1, "found 2 CPU and 0 GPU, expected 1 CPU and 0.5 GPU"),
    ],
)
def test_what_does_not_fit(bundle, count, told, capsys, monkeypatch):
    with pytest.raises(RefusedError) as refused:
        require_resources(bundle, count, "ask for less", RefusedError)
    assert str(refused.value) == f"Ray has too little on this machine: {told}; ask for less"
    monkeypatch.setattr(resources, "OWN", "a Ray that others started")
    require_resources(bundle, count, "ask for less", RefusedError)
    line = f"waiting for the cluster to grow: {told}; if it does not grow, ask for less\n"
    assert capsys.readouterr().out == line


def test_two_halves_on_two_nodes_are_no_whole(monkeypatch, capsys):
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": True, "Resources": {"CPU": 1.0}}]
    monkeypatch.setattr(resources, "OWN", "a Ray that others started")
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 8.0}}])
    require_resources({"CPU": 1}, 2, "", RefusedError)
    assert capsys.readouterr().out == ""
    require_resources({"CPU": 2}, 1, "ask for less", RefusedError)
    assert "waiting for the cluster" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("cpus_per_task", 3.0), ("gpus_per_task", 1.0)])
def test_extraction_asks_before_it_waits(option, value):
    with pytest.raises(CacheError, match=r"lower --featurize\.cpus_per_task or --featurize\.gpus_per_task"):
        _run([], replace(FeaturizeConfig(), **{option: value}))


def test_gpus_that_lie_idle_are_told(monkeypatch, capsys):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 4.0})
    _run([], FeaturizeConfig())
    assert "Ray has 4 GPUs, and extraction uses none; --featurize.gpus_per_task 1 uses them" in capsys.readouterr().out


def test_a_task_without_a_gpu_sees_none(monkeypatch, tmp_path):
    """Ray leaves all devices in sight of a task that asks for none, so each would take the first one."""
    from featurize import fill

    def look(task: Path) -> None:
        import os

        task.write_text(repr(os.environ.get("CUDA_VISIBLE_DEVICES")))

    class Task:
        unknown = ()
        targets = ()

        def __init__(self, path):
            self.path = path

    monkeypatch.setattr(fill, "extract_shard", lambda task: look(task.path))
    _run([Task(tmp_path / "seen")], FeaturizeConfig())
    assert (tmp_path / "seen").read_text() == "''"
