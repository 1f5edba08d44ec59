"""Settings: merging, every refusal, YAML there and back, names and folders of runs."""

import os
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import pytest

from pipeline.config import (
    ConfigError,
    RayConfig,
    RunConfig,
    did_you_mean,
    dump_yaml,
    find_run,
    keys,
    load_yaml,
    merge,
    run_name,
    to_dict,
)


def refusal(changes, where="here"):
    with pytest.raises(ConfigError) as error:
        merge(RunConfig(), changes, where)
    return str(error.value)


def yaml_file(folder, text):
    path = folder / "my.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("train.lr", "1e-3", 0.001),
        ("train.lr", 2, 2.0),
        ("train.epochs", "7", 7),
        ("train.bf16", "true", True),
        ("train.bf16", "no", False),
        ("data.root", "/data", "/data"),
        ("name", 2024, "2024"),
        ("featurize.images", "a, b", ("a", "b")),
        ("featurize.images", ["a", "b"], ("a", "b")),
        ("train.model.image.parts", "", ()),
        ("featurize.views", "plain,flip", ("plain", "flip")),
        ("train.objective.hinge.margin.form", "B", "B"),
    ],
)
def test_values_become_the_fields_type(key, given, expected):
    value = merge(RunConfig(), {key: given}, "here")
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_nested_and_dotted_changes_are_the_same_road():
    nested = merge(RunConfig(), {"train": {"objective": {"hinge": {"margin": {"form": "C"}}}, "lr": 0.5}}, "a")
    dotted = merge(RunConfig(), MappingProxyType({"train.objective.hinge.margin.form": "C", "train.lr": "0.5"}), "b")
    assert nested == dotted
    assert nested.train.objective.hinge.margin.form == "C"
    assert nested.train.lr == 0.5


def test_what_is_not_named_stays():
    changed = merge(RunConfig(), {"train.lr": 0.5}, "here")
    assert to_dict(changed) == to_dict(RunConfig()) | {"train": to_dict(RunConfig())["train"] | {"lr": 0.5}}
    assert merge(changed, {}, "here") == changed


def test_the_later_of_two_values_counts():
    assert merge(RunConfig(), {"train": {"lr": 1}, "train.lr": 2}, "here").train.lr == 2


def test_an_empty_section_changes_nothing():
    assert merge(RunConfig(), {"train": None, "data": {}}, "here") == RunConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1}, "here: unknown key lr; did you mean train.lr?"),
        ({"train": {"learnrate": 1}}, "here: unknown key train.learnrate; `python -m pipeline run --help` lists"),
        ({"train.epoch": 1}, "here: unknown key train.epoch; did you mean train.epochs?"),
        ({"train.margin.form": "A"}, "here: unknown key train.margin.form; did you mean train.objective.hinge"),
        ({"train": {"lr": {"x": 1}}}, "here: unknown key train.lr.x; "),
        ({"data.datset": "x"}, "here: unknown key data.datset; did you mean data.dataset?"),
        ({"train.lr": "fast"}, "here: train.lr: found 'fast', expected number"),
        ({"train.lr": "nan"}, "here: train.lr: found 'nan', expected number"),
        ({"train.lr": True}, "here: train.lr: found True, expected number"),
        ({"train.lr": None}, "here: train.lr: found None, expected number"),
        ({"train.epochs": "1.5"}, "here: train.epochs: found '1.5', expected integer"),
        ({"train.gpu": "maybe"}, "here: train.gpu: found 'maybe', expected true|false"),
        ({"data.root": False}, "here: data.root: found False, expected text"),
        ({"data.root": {}}, "here: data.root: found {}, expected text"),
        (
            {"featurize.precision": "float8"},
            "here: featurize.precision: found 'float8', expected bfloat16|float32",
        ),
        (
            {"featurize.views": "flop"},
            "here: featurize.views: found 'flop', expected plain|flip|crop|crop2|crop3|crop4,...",
        ),
        ({"featurize.images": 3}, "here: featurize.images: found 3, expected text,text,..."),
        ({"ray": "auto"}, "here: ray: found 'auto', expected keys below it (ray.address, ray.cpus, "),
        ({"ray.cpus": -1}, "here: ray.cpus: found -1, expected 0 (all) or more"),
        ({"ray": {"object_store_mb": 1}}, "here: ray.object_store_mb: found 1, expected 80 or more"),
        ({"featurize.rows_per_shard": 0}, "here: featurize.rows_per_shard: found 0, expected 1 or more"),
        ({"featurize.image_batch": 0}, "here: featurize.image_batch: found 0, expected 1 or more"),
        ({"featurize.text_batch": -1}, "here: featurize.text_batch: found -1, expected 1 or more"),
        ({"featurize.cpus_per_task": -1}, "here: featurize.cpus_per_task: found -1.0, expected 0 or more"),
        ({"featurize.gpus_per_task": -1}, "here: featurize.gpus_per_task: found -1.0, expected 0 or more"),
        ({"train.epochs": 0}, "here: train.epochs: found 0, expected 1 or more"),
        ({"train.cpus_per_worker": 0}, "here: train.cpus_per_worker: found 0, expected 1 or more"),
        ({"train.lr": 0}, "here: train.lr: found 0.0, expected more than 0"),
        ({"train.weight_decay": -1}, "here: train.weight_decay: found -1.0, expected 0 or more"),
        ({"train.seed": -1}, "here: train.seed: found -1, expected 0 or more"),
        ({"train.workers": -1}, "here: train.workers: found -1, expected 0 or more"),
        ({"train.max_failures": -1}, "here: train.max_failures: found -1, expected 0 or more"),
        ({"train.clip": -1}, "here: train.clip: found -1.0, expected 0 (no clipping) or more"),
        ({"train.patience": -1}, "here: train.patience: found -1, expected 0 (never) or more"),
        ({"train.checkpoint_steps": -1}, "here: train.checkpoint_steps: found -1, expected 0 (after each epoch only)"),
        ({"train.window": -1}, "here: train.window: found -1, expected 0 (all shards) or more"),
        ({"train.warmup": 2}, "here: train.warmup: found 2.0, expected a share, 0 to 1"),
        ({"train.ema": 1}, "here: train.ema: found 1.0, expected 0 (no average) or more, below 1"),
        ({"train.model.dim": 0}, "here: train.model.dim: found 0, expected 1 or more"),
        ({"train.model.image.width": -1}, "here: train.model.image.width: found -1, expected 0 (one linear layer) or"),
        ({"train.model.text.part_width": -1}, "here: train.model.text.part_width: found -1, expected 0 (one linear"),
        ({"train.model.text.vocabulary": 0}, "here: train.model.text.vocabulary: found 0, expected 1 or more"),
        ({"train.model.text.min_frequency": 0}, "here: train.model.text.min_frequency: found 0, expected 1 or more"),
        ({"train.model.image.heads": 0}, "here: train.model.image.heads: found 0, expected 1 or more"),
        (
            {"train.model.image.dropout": 1},
            "here: train.model.image.dropout: found 1.0, expected 0 (none) or more, b",
        ),
        ({"train.model.text.bag_dropout": -0.1}, "here: train.model.text.bag_dropout: found -0.1, expected 0 (none)"),
        ({"train.model.text.input_dropout": 2}, "here: train.model.text.input_dropout: found 2.0, expected 0 (none)"),
        ({"evaluate.hubness.queries": -1}, "here: evaluate.hubness.queries: found -1, expected 0 (no correction) or"),
        ({"evaluate.hubness.strength": -0.1}, "here: evaluate.hubness.strength: found -0.1, expected 0 (changes noth"),
        ({"evaluate.hubness.sharpness": 0}, "here: evaluate.hubness.sharpness: found 0.0, expected more than 0; quer"),
        ({"evaluate.tile": 0}, "here: evaluate.tile: found 0, expected 1 or more"),
        ({"evaluate": {"tile": -1}}, "here: evaluate.tile: found -1, expected 1 or more"),
        ({"runs": "s3://b/runs"}, "here: runs: found the URI s3://b/runs, expected a folder"),
        ({"name": "a/b"}, "here: name: found 'a/b', expected letters, digits and"),
        ({"name": "latest"}, "here: name: found 'latest', expected"),
        ({"method": ""}, "here: method: found '', expected"),
    ],
)
def test_refusals_name_the_key_what_was_found_and_what_was_expected(changes, message):
    assert message in refusal(changes)


def test_advice_prefers_the_place_in_the_tree():
    names = [key.name for key in keys(RunConfig())]
    assert did_you_mean("lr", names, "--") == "did you mean --train.lr?"
    assert did_you_mean("center.rate", names) == "did you mean train.objective.center.rate?"
    assert did_you_mean("zzz", names) == ""
    assert did_you_mean("warmup", names) == "did you mean train.warmup or train.objective.hinge.warmup?"


def test_ray_sizes_that_are_the_smallest_allowed():
    assert RayConfig(cpus=0, object_store_mb=80).object_store_mb == 80


def test_keys_describe_every_setting():
    found = {key.name: key for key in keys(RunConfig())}
    assert found["train.lr"].type == "number"
    assert found["train.lr"].value == "0.001"
    assert found["train.lr"].help == "peak learning rate"
    assert found["train.lr"].section == "train: How heads are fitted on the cache"
    assert found["cache"].section == "run: What is run, and where its files go"
    assert found["train.gpu"].value == "false"
    assert found["featurize.images"].value == "efficientnet-lite0"
    assert found["featurize.precision"].type == "bfloat16|float32"
    flat = []

    def walk(values, prefix):
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                flat.append(prefix + name)

    walk(to_dict(RunConfig()), "")
    assert sorted(found) == sorted(flat)
    assert all(key.help for key in found.values())


def test_a_key_s_value_is_what_may_be_typed():
    config = merge(RunConfig(), {"featurize.views": "plain,flip", "train.gpu": "true", "name": "x"}, "here")
    again = merge(RunConfig(), {key.name: key.value for key in keys(config)}, "here")
    assert again == config


def test_yaml_round_trip(tmp_path):
    config = merge(
        RunConfig(),
        {"featurize.views": "plain,flip", "train.lr": "1e-5", "data.root": "/tmp/ü: #1", "name": "2024"},
        "here",
    )
    path = yaml_file(tmp_path, dump_yaml(config))
    assert merge(RunConfig(), load_yaml(path), str(path)) == config


def test_yaml_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = yaml_file(tmp_path, "train:\n  lr: 1e-4\n")
    assert merge(RunConfig(), load_yaml(path), "here").train.lr == 1e-4


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    assert load_yaml(yaml_file(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: 3\n  lr: fast\n", "{}:3: train.lr: found 'fast', expected number"),
        ("data:\n  root: x\n\ntrian:\n  lr: 1\n", "{}:5: unknown key trian.lr; did you mean train.lr?"),
    ],
)
def test_errors_of_a_yaml_file_name_the_line(tmp_path, text, message):
    path = yaml_file(tmp_path, text)
    assert message.format(path) in refusal(load_yaml(path), str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1,\n", "this is not YAML: while parsing a flow node"),
        ("- a\n", "{}: found list, expected `key: value` lines"),
        ("name: a\nname: b\n", "{}:2: found the key 'name' that already stands in line 1, expected it once"),
        ("train:\n  on: 1\n", "{}:2: found the key True, expected text"),
        ("? [a]\n: 1\n", "{}:1: found the key ['a'], expected text"),
        ("train:\n  <<: {a: 1}\n", "this is not YAML: could not determine a constructor"),
        ("a: !!python/object:os.system x\n", "this is not YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_mapping_of_text_is_refused(tmp_path, text, message):
    path = yaml_file(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_yaml(path)
    assert message.format(path) in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_or_unreadable_yaml_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: expected a YAML file; .*No such file"):
        load_yaml(tmp_path / "gone.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: expected a YAML file; .*utf-8"):
        load_yaml(path)


def test_run_names():
    now = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
    assert run_name(merge(RunConfig(), {"method": "less"}, ""), now) == "less-scenes-20260203-040506"
    assert run_name(merge(RunConfig(), {"data.dataset": "a/../b c"}, ""), now) == "plain-a_.._b_c-20260203-040506"
    assert run_name(merge(RunConfig(), {"name": "mine"}, ""), now) == "mine"


@pytest.fixture
def runs(tmp_path):
    for age, name in enumerate(["old", "new"]):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "config.yaml"
        path.write_text("")
        os.utime(path, (1000 + age, 1000 + age))
    (tmp_path / "no-run").mkdir()
    return tmp_path


def test_runs_are_found_by_folder_name_or_age(runs):
    assert find_run("latest", runs) == runs / "new"
    assert find_run("old", runs) == runs / "old"
    assert find_run(str(runs / "old"), "elsewhere") == runs / "old"


def test_a_run_that_is_not_there(runs):
    with pytest.raises(ConfigError, match=r"found no run 'no-run': .* below .*; the latest runs there are new, old "):
        find_run("no-run", runs)
    with pytest.raises(ConfigError, match=r"found no run 'latest': .*there are no runs there"):
        find_run("latest", runs / "no-run")


def test_the_packages_are_those_of_this_repository():
    import evaluate
    import featurize
    import pipeline
    import train

    root = Path(__file__).parents[2]
    for package in (evaluate, featurize, pipeline, train):
        assert Path(package.__file__).parent.parent == root
