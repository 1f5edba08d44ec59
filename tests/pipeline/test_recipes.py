"""Recipes: complete, findable, and replaceable by a YAML file."""

import re

import pytest

from pipeline.config import ConfigError, RunConfig, dump_yaml, merge
from pipeline.recipes import RECIPES, resolve


def test_the_methods_are_what_their_papers_name():
    less, infonce = RECIPES["less"].config, RECIPES["infonce"].config
    assert less.train.objective.ranking == "hinge"
    assert less.train.objective.hinge.margin.form == "A"
    assert less.train.objective.center.weight > 0
    assert less.train.objective.quantization.weight > 0
    assert infonce.train.objective.ranking == "infonce"
    assert infonce.train.objective.center.weight == infonce.train.objective.quantization.weight == 0


def test_isthmus_is_more_than_infonce():
    best, plain = RECIPES["isthmus"].config, RECIPES["infonce"].config
    assert best.train.objective.margin.form == "A"
    assert best.train.model.blocks > plain.train.model.blocks == 1
    assert {"mpnet", "minilm"} <= set(best.featurize.texts)
    assert "crop" in best.featurize.views


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_name_and_a_source(name):
    assert RECIPES[name].config.method == name
    assert re.search(r"(19|20)\d\d", RECIPES[name].description)


def test_a_name_resolves_to_its_recipe():
    assert resolve("less") is RECIPES["less"].config


def test_a_yaml_file_changes_a_recipe(tmp_path):
    path = tmp_path / "my.yml"
    path.write_text("recipe: infonce\ntrain:\n  lr: 0.5\n")
    assert resolve(str(path)) == merge(RECIPES["infonce"].config, {"train.lr": 0.5}, "")


def test_a_yaml_file_without_a_recipe_changes_the_defaults(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("method: mine\n")
    assert resolve(str(path)) == RunConfig(method="mine")


def test_the_config_of_a_run_repeats_it(tmp_path):
    config = merge(RECIPES["less"].config, {"train.seed": 3, "data.dataset": "flickr8k"}, "")
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert resolve(str(path)) == config


def test_an_unknown_method_names_the_known_and_the_nearest(tmp_path):
    known = ", ".join(RECIPES)
    with pytest.raises(ConfigError) as error:
        resolve("les")
    assert str(error.value) == f"found no method 'les', expected {known} or a .yaml file; did you mean less?"
    with pytest.raises(ConfigError) as error:
        resolve("zzz")
    assert str(error.value) == f"found no method 'zzz', expected {known} or a .yaml file"
    path = tmp_path / "my.yaml"
    path.write_text("recipe: [less]\n")
    with pytest.raises(ConfigError, match=r"my\.yaml: found no method \"\['less'\]\""):
        resolve(str(path))
