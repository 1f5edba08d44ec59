"""The cluster launcher's file is one that Ray takes."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

PATH = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def cluster():
    return yaml.safe_load(PATH.read_text())


def test_ray_s_own_schema_takes_it(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["gpu"]["min_workers"] == 0
    assert prepared["available_node_types"]["gpu"]["max_workers"] > 0


def test_ray_s_schema_would_refuse_a_slip(cluster):
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster["dokcer"] = cluster.pop("docker")
    with pytest.raises(ValidationError):
        validate_config(prepare_config(cluster))


def test_the_image_has_the_ray_and_python_of_this_project(cluster):
    ray = importlib.metadata.version("ray")
    assert cluster["docker"]["image"] == f"rayproject/ray:{ray}-py311-gpu"


def test_every_place_to_change_is_marked(cluster):
    assert {"FILE_SYSTEM", "IMAGE"} <= set(re.findall(r"\b[A-Z_]{5,}\b", PATH.read_text()))
    for line in PATH.read_text().splitlines():
        if "ImageId" in line or "region:" in line:
            assert "# CHANGE" in line


def test_the_submit_command_in_its_comment_is_one_that_parses():
    from pipeline.__main__ import build_parser

    text = PATH.read_text().replace("\\\n#", " ")
    (command,) = re.findall(r"python -m pipeline (submit .*)", text)
    args, rest = build_parser().parse_known_args(command.split())
    task, unknown = build_parser().parse_known_args(rest)
    assert unknown == []
    assert vars(task)["cache"] == "/shared/cache"
    assert args.address is None


def test_what_ray_leaves_out_of_a_working_directory():
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    root = PATH.parent
    leaves_out = get_excludes_from_ignore_files(root, include_gitignore=False)
    for left_out in (".venv/lib/x.py", ".git/config", "cache/a/000000.tar", "runs/x/config.yaml", "data/x.jpg"):
        assert any(rule(root / left_out) for rule in leaves_out), left_out
    for sent in ("train/loop.py", "featurize/fill.py", "pyproject.toml", "pipeline/__main__.py"):
        assert not any(rule(root / sent) for rule in leaves_out), sent
