"""Models on the disk, alone and joined."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from train.batches import FeatureReader
from train.config import LocalConfig, MarginConfig, TowerConfig
from train.hosts import build_host
from train.models import ModelError, open_model, save_ensemble, save_model
from train.towers import Dims


def saved(folder, tiny_cache, config, seed):
    """A model with fresh weights, and what it reads."""
    inputs = tiny_cache.inputs(config)
    reader = FeatureReader(inputs)
    dims = Dims(*reader.image_dims), Dims(*reader.text_dims)
    torch.manual_seed(seed)
    model = build_host(config.model, *dims).eval()
    save_model(folder, model.state_dict(), config.model, dims, inputs)
    return model, reader


def test_models_are_joined_and_opened_as_one(tiny_cache, tiny_config, tmp_path):
    one, reader = saved(tmp_path / "one", tiny_cache, tiny_config, 0)
    other, _ = saved(tmp_path / "other", tiny_cache, tiny_config, 1)
    save_ensemble(tmp_path / "both", [tmp_path / "one", tmp_path / "other"])
    both, inputs = open_model(tmp_path / "both")
    assert inputs == replace(reader.inputs, lemmas=None)
    texts = reader.texts(reader.split("val")[1])
    with torch.no_grad():
        expected = torch.cat([one.embed_texts(texts).vector, other.embed_texts(texts).vector], 1) / 2**0.5
        torch.testing.assert_close(both.index_vectors(both.embed_texts(texts)), expected)


def test_weights_that_both_towers_hold_are_saved(tiny_cache, tiny_config, tmp_path):
    """As one codebook of a model that has a local space, which is saved once more when its share is tuned."""
    tower = {"aggregator": "netvlad", "clusters": 4, "width": 8}
    model = replace(
        tiny_config.model,
        shared_codebook=True,
        local=LocalConfig(dim=8, queries=2),
        image=TowerConfig(vectors=(), parts=("one.grid",), **tower),
        text=TowerConfig(vectors=(), parts=("tokens",), **tower),
    )
    made, reader = saved(tmp_path, tiny_cache, replace(tiny_config, model=model), 0)
    opened, _ = open_model(tmp_path)
    texts = reader.texts(reader.split("val")[1])
    with torch.no_grad():
        torch.testing.assert_close(opened.embed_texts(texts).vector, made.embed_texts(texts).vector)


def test_models_are_joined_however_their_encoders_were_typed(tiny_cache, tiny_config, tmp_path):
    columns = [replace(column, encoder=f"other:{column.encoder}") for column in tiny_cache.columns]
    saved(tmp_path / "one", tiny_cache, tiny_config, 0)
    saved(tmp_path / "other", replace(tiny_cache, columns=columns), tiny_config, 1)
    save_ensemble(tmp_path / "both", [tmp_path / "one", tmp_path / "other"])
    assert open_model(tmp_path / "both")[1].text_vectors[0].encoder == "words"


def test_models_of_other_columns_are_not_joined(tiny_cache, tiny_config, tmp_path):
    saved(tmp_path / "one", tiny_cache, tiny_config, 0)
    tower = replace(tiny_config.model.image, vectors=("one.pooled",))
    saved(tmp_path / "other", tiny_cache, replace(tiny_config, model=replace(tiny_config.model, image=tower)), 0)
    with pytest.raises(ModelError, match=r"other reads other columns than .*one: they differ in two\.pooled"):
        save_ensemble(tmp_path / "both", [tmp_path / "one", tmp_path / "other"])
    assert not (tmp_path / "both").exists()


def test_models_whose_losses_compared_other_columns_are_joined(tiny_cache, tiny_config, tmp_path):
    one, _ = saved(tmp_path / "one", tiny_cache, tiny_config, 0)
    margin = MarginConfig(form="B")
    objective = replace(tiny_config.objective, hinge=replace(tiny_config.objective.hinge, margin=margin))
    _, reader = saved(tmp_path / "other", tiny_cache, replace(tiny_config, objective=objective), 1)
    assert reader.inputs.semantic is not None
    wordless = replace(tiny_cache, columns=[c for c in tiny_cache.columns if c.name != "lexicon-en.lemmas"])
    saved(tmp_path / "third", wordless, tiny_config, 2)
    for first, *others in permutations(["one", "other", "third"]):
        save_ensemble(tmp_path / first / "joined", [tmp_path / name for name in (first, *others)])
        joined, inputs = open_model(tmp_path / first / "joined")
        assert (inputs.semantic, inputs.lemmas) == (None, None)
        assert inputs.columns() == reader.inputs.columns()
        assert sum(p.numel() for p in joined.parameters()) == 3 * sum(p.numel() for p in one.parameters())


def test_an_ensemble_is_no_member(tiny_cache, tiny_config, tmp_path):
    saved(tmp_path / "one", tiny_cache, tiny_config, 0)
    save_ensemble(tmp_path / "both", [tmp_path / "one", tmp_path / "one"])
    with pytest.raises(ModelError, match="is an ensemble, and ensembles are not joined"):
        save_ensemble(tmp_path / "more", [tmp_path / "one", tmp_path / "both"])


def test_a_model_without_its_weights_is_none(tiny_cache, tiny_config, tmp_path):
    saved(tmp_path / "one", tiny_cache, tiny_config, 0)
    path = tmp_path / "one" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match=r"weights\.safetensors: not readable .* train the model again"):
        open_model(tmp_path / "one")
    path.unlink()
    with pytest.raises(ModelError, match="not readable"):
        open_model(tmp_path / "one")
    with pytest.raises(ModelError, match=r"no finished model .*`train --resume RUN`"):
        open_model(tmp_path / "two")
