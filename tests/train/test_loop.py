"""The loop: interrupted and resumed equals uninterrupted; two workers equal one; what goes wrong is said."""

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from evaluate.embed import embed_split
from evaluate.protocols import evaluate_full
from train.batches import FeatureReader, Inputs
from train.config import (
    CenterConfig,
    HingeConfig,
    MarginConfig,
    ObjectiveConfig,
    QuantizationConfig,
    TowerConfig,
)
from train.fit import LocalCheckpoints, fit
from train.loop import DivergenceError, Work, learning_rate, start, train_worker
from train.state import StateError, open_model, read_state

LESS = ObjectiveConfig(
    ranking="hinge",
    hinge=HingeConfig(margin=MarginConfig(form="C")),
    center=CenterConfig(weight=0.1),
    quantization=QuantizationConfig(weight=0.1, subspaces=4, codewords=8),
    weighting="uncertainty",
)


@dataclass
class Validate:
    """rSum on the val part; travels to Ray workers."""

    inputs: Inputs

    def __call__(self, model):
        return evaluate_full(*embed_split(model, FeatureReader(self.inputs), "val"), split="val").as_flat()


@dataclass
class LogFile:
    """Keeps what is logged, from whichever process."""

    path: Path

    def __call__(self, metrics, step):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def read(self, name):
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {line["step"]: line[name] for line in lines if name in line}


class NoBar:
    def update(self, n=1):
        pass

    def set_description(self, desc):
        pass

    def close(self):
        pass


def make_work(tiny_cache, config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    inputs = tiny_cache.inputs(config)
    return Work(config, inputs, "train", Validate(inputs), LogFile(folder / "log.jsonl"))


def train_here(work, folder, checkpoints=None):
    train_worker(work, checkpoints or LocalCheckpoints(folder), torch.device("cpu"), lambda _total, _done: NoBar())


def last_state(folder):
    return read_state(LocalCheckpoints(folder).folders()[-1])


def assert_same_state(one, two, tolerance=0.0):
    assert one["step"] == two["step"]
    for part in ("model", "objective", "average", "best_weights"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(value, two[part][name], atol=tolerance, rtol=tolerance, msg=f"{part}.{name}")


def test_heads_learn(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, replace(tiny_config, epochs=8), tmp_path)
    untrained = work.validate(start(work, FeatureReader(work.inputs), torch.device("cpu")).evaluated.eval())
    train_here(work, tmp_path)
    assert last_state(tmp_path)["best"] > untrained["rsum"] + 100


class InterruptionError(Exception):
    pass


class InterruptedAfter(LocalCheckpoints):
    """Dies right after its n-th checkpoint."""

    def __init__(self, folder, count):
        super().__init__(folder)
        self.left = count

    def save(self, write, metrics, step):
        super().save(write, metrics, step)
        self.left -= 1
        if not self.left:
            raise InterruptionError


@pytest.mark.parametrize("checkpoints", [1, 3, 4])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tiny_cache, tiny_config, tmp_path, checkpoints):
    config = replace(tiny_config, objective=LESS, checkpoint_steps=2)
    train_here(make_work(tiny_cache, config, tmp_path / "a"), tmp_path / "a")
    work = make_work(tiny_cache, config, tmp_path / "b")
    with pytest.raises(InterruptionError):
        train_here(work, tmp_path / "b", InterruptedAfter(tmp_path / "b", checkpoints))
    train_here(work, tmp_path / "b")
    assert_same_state(last_state(tmp_path / "a"), last_state(tmp_path / "b"))


def test_a_finished_run_is_not_trained_further(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, tiny_config, tmp_path)
    train_here(work, tmp_path)
    step = last_state(tmp_path)["step"]
    train_here(work, tmp_path)
    assert last_state(tmp_path)["step"] == step


def test_early_stopping_keeps_the_best_weights(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, replace(tiny_config, epochs=20, patience=2), tmp_path)
    answers = iter([10.0, 30.0, 20.0, 30.0, 40.0])
    seen = []

    def validate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"rsum": next(answers)}

    train_here(replace(work, validate=validate), tmp_path)
    state = last_state(tmp_path)
    assert (len(seen), state["best"], state["best_epoch"]) == (4, 30.0, 1)
    for name, value in state["best_weights"].items():
        torch.testing.assert_close(value, seen[1][name])


def test_a_checkpoint_of_other_settings_is_refused(tiny_cache, tiny_config, tmp_path):
    train_here(make_work(tiny_cache, tiny_config, tmp_path), tmp_path)
    other = make_work(tiny_cache, replace(tiny_config, lr=0.5, seed=1), tmp_path)
    with pytest.raises(StateError, match="differs in lr, seed"):
        train_here(other, tmp_path)


def test_a_damaged_checkpoint_is_refused(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, tiny_config, tmp_path)
    train_here(work, tmp_path)
    path = LocalCheckpoints(tmp_path).folders()[-1] / "state.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StateError, match="not a readable checkpoint"):
        train_here(work, tmp_path)


def test_two_checkpoints_are_kept(tiny_cache, tiny_config, tmp_path):
    train_here(make_work(tiny_cache, replace(tiny_config, epochs=4), tmp_path), tmp_path)
    assert len(LocalCheckpoints(tmp_path).folders()) == 2


def test_a_loss_that_is_not_finite_ends_the_run(tiny_cache, tiny_config, tmp_path):
    free = replace(tiny_config, lr=1e30, clip=0.0, model=replace(tiny_config.model, normalise=False))
    with pytest.raises(DivergenceError, match=r"lower --train\.lr"):
        train_here(make_work(tiny_cache, free, tmp_path), tmp_path)


def test_more_workers_than_pairs_are_refused(tiny_cache, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.world", lambda: (0, 64))
    with pytest.raises(ValueError, match=r"a batch of 24 pairs cannot be dealt to 64 workers; raise --train.batch"):
        train_here(make_work(tiny_cache, tiny_config, tmp_path), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"ema": 0.0}, {"clip": 0.0}, {"bf16": True}, {"weight_decay": 0.5}],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_optimisation_change_the_result(tiny_cache, tiny_config, tmp_path, changes):
    train_here(make_work(tiny_cache, tiny_config, tmp_path / "a"), tmp_path / "a")
    train_here(make_work(tiny_cache, replace(tiny_config, **changes), tmp_path / "b"), tmp_path / "b")
    one, two = (last_state(tmp_path / name) for name in "ab")
    differing = [name for name, value in one["best_weights"].items() if not value.equal(two["best_weights"][name])]
    assert differing
    assert two["best"] > 150


@pytest.mark.parametrize("aggregator", ["mean", "max", "attention", "gpo", "netvlad"])
def test_heads_learn_from_parts_with_every_aggregator(tiny_cache, tiny_config, tmp_path, aggregator):
    shared = aggregator == "netvlad"
    settings = {"aggregator": aggregator, "clusters": 4, "heads": 2, "width": 32, "input_dropout": 0.0, "dropout": 0.0}
    model = replace(
        tiny_config.model,
        shared_codebook=shared,
        image=TowerConfig(vectors=(), parts=("one.grid",), **settings),
        text=TowerConfig(vectors=(), parts=("tokens",), **settings),
    )
    work = make_work(tiny_cache, replace(tiny_config, model=model, epochs=6), tmp_path)
    train_here(work, tmp_path)
    assert last_state(tmp_path)["best"] > 150


@pytest.mark.parametrize("form", ["fixed", "A", "B", "C"])
@pytest.mark.parametrize("mining", ["hardest", "all", "weighted"])
def test_heads_learn_with_every_hinge(tiny_cache, tiny_config, tmp_path, form, mining):
    objective = ObjectiveConfig(ranking="hinge", hinge=HingeConfig(mining=mining, margin=MarginConfig(form=form)))
    train_here(make_work(tiny_cache, replace(tiny_config, objective=objective), tmp_path), tmp_path)
    assert last_state(tmp_path)["best"] > 150


def test_learning_rate_rises_then_falls_to_zero(tiny_config):
    config = replace(tiny_config, lr=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_fit_leaves_a_model_that_opens(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, tiny_config, tmp_path)
    fit(work, tmp_path)
    model, inputs = open_model(tmp_path / "model")
    assert inputs == work.inputs
    state = last_state(tmp_path / "checkpoints")
    assert work.validate(model)["rsum"] == pytest.approx(state["best"])


def test_no_model_is_said_to_be_none(tmp_path):
    with pytest.raises(StateError, match="no finished model"):
        open_model(tmp_path)


def ray_state(folder):
    return read_state(max((folder / "ray").glob("checkpoint_*/")))


def test_two_ray_workers_follow_the_curve_of_one_process(tiny_cache, tiny_config, tmp_path, ray_local):
    """Half the batch each, every term of LESS, dropout included; a batch of odd size is dealt unevenly."""
    config = replace(tiny_config, objective=LESS, batch=23, epochs=2, cpus_per_worker=1)
    one = make_work(tiny_cache, config, tmp_path / "one")
    fit(one, tmp_path / "one")
    two = make_work(tiny_cache, replace(config, workers=2), tmp_path / "two")
    fit(two, tmp_path / "two")
    losses = [work.log.read("train/loss") for work in (one, two)]
    assert losses[0].keys() == losses[1].keys()
    for step, value in losses[0].items():
        assert losses[1][step] == pytest.approx(value, abs=1e-4)
    assert_same_state(last_state(tmp_path / "one" / "checkpoints"), ray_state(tmp_path / "two"), tolerance=1e-4)


@dataclass
class KillOnce:
    """Kills its own process, hard, the first time it validates the second epoch."""

    validate: Validate
    marker: Path

    def __call__(self, model):
        calls = self.marker.with_suffix(".calls")
        count = int(calls.read_text()) + 1 if calls.exists() else 1
        calls.write_text(str(count))
        if count == 2 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.validate(model)


def test_a_killed_ray_worker_loses_no_more_than_the_last_epoch(tiny_cache, tiny_config, tmp_path, ray_local):
    config = replace(tiny_config, workers=1, max_failures=1)
    work = make_work(tiny_cache, config, tmp_path / "killed")
    killing = replace(work, validate=KillOnce(work.validate, tmp_path / "marker"))
    fit(killing, tmp_path / "killed")
    assert (tmp_path / "marker").exists()
    undisturbed = make_work(tiny_cache, replace(config, workers=0), tmp_path / "undisturbed")
    fit(undisturbed, tmp_path / "undisturbed")
    assert_same_state(last_state(tmp_path / "undisturbed" / "checkpoints"), ray_state(tmp_path / "killed"), 1e-6)


def test_what_goes_wrong_in_a_ray_worker_is_told_as_it_is(tiny_cache, tiny_config, tmp_path, ray_local):
    free = replace(tiny_config.model, normalise=False)
    config = replace(tiny_config, lr=1e30, clip=0.0, model=free, workers=1, max_failures=0)
    with pytest.raises(DivergenceError, match=r"lower --train\.lr"):
        fit(make_work(tiny_cache, config, tmp_path), tmp_path)
