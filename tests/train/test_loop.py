"""The loop: interrupted and resumed equals uninterrupted; two workers equal one; what goes wrong is said."""

import copy
import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evaluate.embed import embed_split
from evaluate.protocols import evaluate_host
from pipeline.recipes import RECIPES
from train.batches import FeatureReader, Inputs
from train.checkpoints import Checkpoints
from train.config import (
    BankConfig,
    CenterConfig,
    ErasingConfig,
    HingeConfig,
    InfoNCEConfig,
    LocalConfig,
    LocalLossConfig,
    MarginConfig,
    ObjectiveConfig,
    QuantizationConfig,
    ScanConfig,
    SettingsError,
    TowerConfig,
)
from train.fit import fit
from train.loop import DivergenceError, Work, _follow, _Trainer, learning_rate, start, train_worker
from train.models import ModelError, open_model
from train.state import StateError, read_state
from train.targets import Targets

LESS = ObjectiveConfig(
    ranking="hinge",
    hinge=HingeConfig(margin=MarginConfig(form="C")),
    center=CenterConfig(weight=0.1),
    quantization=QuantizationConfig(weight=0.1, start=0.1, subspaces=4, codewords=4, rank_codes=0.5),
    weighting="uncertainty",
)


TOWER = {"vectors": (), "width": 32, "input_dropout": 0.1, "dropout": 0.1, "heads": 2}
GRID = TowerConfig(parts=("one.grid",), **TOWER)
TOKENS = TowerConfig(parts=("tokens",), **TOWER)
SEDE = ObjectiveConfig(
    ranking="infonce",
    infonce=InfoNCEConfig(hardness=2.0),
    bank=BankConfig(size=30, momentum=0.9),  # neither a multiple of the batch nor a part of it
    erasing=ErasingConfig(weight=0.5),
)

METHODS = ["less", "hier", "sede-vse", "sede-scan", "sede-vsrn", "mixup", "window"]
FREE = "one codebook, free"  # quantization form A for both towers, margin B, kept centres of clusters, no unit sphere


def method_config(config, method):
    """A small run with all that the method adds to the state."""
    both = replace(config.model, image=GRID, text=TOKENS)
    match method:
        case "less":
            return replace(config, objective=LESS)
        case "hier":
            bags = replace(TOKENS, bags=("lemmas",), vocabulary=32)
            model = replace(both, text=bags, local=LocalConfig(dim=8, queries=2))
            center = CenterConfig(weight=0.1, concept="cluster", concepts=5, form="batch")
            objective = ObjectiveConfig(local=LocalLossConfig(weight=1.0, vocabulary=16), center=center)
            return replace(config, model=model, objective=objective)
        case "sede-vse":
            return replace(config, model=replace(both, blocks=2), objective=SEDE, captions_per_image=2)
        case "sede-scan":
            return replace(config, model=replace(both, host="scan", scan=ScanConfig(words=4)), objective=SEDE)
        case "sede-vsrn":
            reasoning = replace(GRID, context="graph", aggregator="memory")
            bigru = replace(TOKENS, context="bigru")
            center = CenterConfig(weight=0.1, concept="lexical")
            return replace(
                config, model=replace(both, image=reasoning, text=bigru), objective=replace(SEDE, center=center)
            )
    image, text = (replace(tower, aggregator="netvlad", clusters=4) for tower in (GRID, TOKENS))
    rest = {
        FREE: {
            "model": replace(config.model, image=image, text=text, shared_codebook=True, normalise=False),
            "objective": ObjectiveConfig(
                hinge=HingeConfig(margin=MarginConfig(form="B")),
                center=CenterConfig(weight=0.1, concept="cluster", concepts=5),
                weighting="uncertainty",
            ),
        },
        "window": {"window": 1, "captions_per_image": 2},
        "mixup": {"mixup": 0.5, "objective": ObjectiveConfig(ranking="siglip", bank=BankConfig(size=30))},
    }
    return replace(config, **rest[method])


def recipe_config(name):
    """A recipe as it is, but for its size and the columns that it reads."""
    config = RECIPES[name].config.train
    model, objective = config.model, config.objective
    image, text = (
        replace(tower, width=32, heads=2, vocabulary=32, parts=(parts,) if tower.parts else ())
        for tower, parts in ((model.image, "one.grid"), (model.text, "tokens"))
    )
    local, bank = replace(model.local, dim=min(8, model.local.dim)), replace(objective.bank, size=30)
    return replace(
        config,
        model=replace(model, dim=16, image=image, text=text, local=local, scan=replace(model.scan, words=4)),
        objective=replace(
            objective,
            bank=bank if objective.bank.size else objective.bank,
            quantization=replace(objective.quantization, start=0.1, subspaces=4, codewords=4),
        ),
        batch=24,
        lr=1e-2,
        ema=0.9,
        workers=0,
    )


@dataclass
class Validate:
    """rSum on the val part; travels to Ray workers."""

    inputs: Inputs

    def __call__(self, model):
        embedded = embed_split(model, FeatureReader(self.inputs), "val")
        return evaluate_host(model, *embedded, split="val", protocol="full", tile=1024).as_flat()


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
    train_worker(work, checkpoints or Checkpoints(folder), torch.device("cpu"), lambda _total, _done: NoBar())


def last_state(folder):
    """Of a folder of checkpoints, or of a run that has one."""
    inner = folder / "checkpoints"
    return read_state(Checkpoints(inner if inner.exists() else folder).latest())


def assert_identical(one, two, where="state"):
    """Two checkpoints to the last bit, whatever they hold; only the time that they took may differ."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, where
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one.keys() - {"seconds"}:
            assert_identical(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for number, (value, other) in enumerate(zip(one, two, strict=True)):
            assert_identical(value, other, f"{where}[{number}]")
    else:
        assert one == two, where


def assert_same_state(one, two, tolerance):
    assert one["step"] == two["step"]
    assert one.keys() == two.keys()
    for part in {"model", "objective", "average", "momentum", "best_weights"} & one.keys():
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(value, two[part][name], atol=tolerance, rtol=tolerance, msg=f"{part}.{name}")


def untrained(work):
    """rSum before the first step."""
    reader = FeatureReader(work.inputs)
    targets = Targets.of(reader, "train", work.config.objective, work.config.seed)
    return work.validate(start(work, reader, targets, torch.device("cpu")).evaluated.eval())["rsum"]


def test_heads_learn(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, replace(tiny_config, epochs=8), tmp_path)
    before = untrained(work)
    train_here(work, tmp_path)
    assert last_state(tmp_path)["best"] > before + 100


class InterruptionError(Exception):
    pass


class InterruptedAfter(Checkpoints):
    """Dies right after its n-th checkpoint."""

    def __init__(self, folder, count):
        super().__init__(folder)
        self.left = count

    def save(self, write, step):
        super().save(write, step)
        self.left -= 1
        if not self.left:
            raise InterruptionError


@pytest.mark.parametrize("checkpoints", [1, 3, 4])
@pytest.mark.parametrize("method", [*METHODS, FREE])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny_cache, tiny_config, tmp_path, method, checkpoints
):
    config = replace(method_config(tiny_config, method), epochs=2, checkpoint_steps=2)
    train_here(make_work(tiny_cache, config, tmp_path / "a"), tmp_path / "a")
    work = make_work(tiny_cache, config, tmp_path / "b")
    with pytest.raises(InterruptionError):
        train_here(work, tmp_path / "b", InterruptedAfter(tmp_path / "b", checkpoints))
    train_here(work, tmp_path / "b")
    assert_identical(last_state(tmp_path / "a"), last_state(tmp_path / "b"))


def test_the_codebook_is_made_while_training(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, replace(tiny_config, objective=LESS, epochs=2), tmp_path)
    train_here(work, tmp_path)
    objective = last_state(tmp_path)["objective"]
    assert objective["quantization.codebook.ready"]
    assert not len(objective["quantization.sample"])
    assert min(work.log.read("train/codebook/perplexity").values()) > 3  # of 4 codewords


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
    *_, before, last = Checkpoints(tmp_path).folders()
    whole = (last / "state.pt").read_bytes()
    for damaged in (whole[:100], bytes(len(whole)), b"x" * 1000):
        (last / "state.pt").write_bytes(damaged)
        with pytest.raises(StateError, match=rf"not a readable checkpoint .*; remove {last} to go on from the one be"):
            train_here(work, tmp_path)
    shutil.rmtree(last)
    train_here(work, tmp_path)
    assert last_state(tmp_path)["stopped"]
    assert before.exists()


def test_what_a_killed_writer_left_half_done_is_no_checkpoint(tiny_cache, tiny_config, tmp_path):
    checkpoints = Checkpoints(tmp_path)

    def write(folder):
        (folder / "state.pt").write_bytes(b"half")
        raise InterruptionError

    with pytest.raises(InterruptionError):
        checkpoints.save(write, 99)
    assert list(tmp_path.iterdir())
    assert checkpoints.latest() is None
    train_here(make_work(tiny_cache, tiny_config, tmp_path), tmp_path)
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {path.name for path in checkpoints.folders()}


def test_a_step_that_a_lost_worker_saved_already_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for content in ("first", "second"):
        checkpoints.save(lambda folder, content=content: (folder / "state.pt").write_text(content), 7)
    assert (checkpoints.latest() / "state.pt").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_two_checkpoints_are_kept(tiny_cache, tiny_config, tmp_path):
    train_here(make_work(tiny_cache, replace(tiny_config, epochs=4), tmp_path), tmp_path)
    assert len(Checkpoints(tmp_path).folders()) == 2


def test_a_loss_that_is_not_finite_ends_the_run(tiny_cache, tiny_config, tmp_path):
    free = replace(tiny_config, lr=1e30, clip=0.0, model=replace(tiny_config.model, normalise=False))
    with pytest.raises(DivergenceError, match=r"lower --train\.lr"):
        train_here(make_work(tiny_cache, free, tmp_path), tmp_path)


def test_weights_that_are_not_finite_are_never_saved(tiny_cache, tiny_config, tmp_path):
    """Every step is saved, and the loss is looked at every tenth step only."""
    free = replace(tiny_config.model, normalise=False)
    config = replace(tiny_config, lr=1e30, clip=0.0, model=free, checkpoint_steps=1)
    with pytest.raises(DivergenceError, match=r"weights are not finite any more at step \d, .* lower --train\.lr"):
        train_here(make_work(tiny_cache, config, tmp_path), tmp_path)
    kept = last_state(tmp_path)
    assert kept["step"] >= 1
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_centres_of_parts_do_not_decay(tiny_cache, tiny_config, tmp_path):
    parts = TowerConfig(vectors=(), parts=("one.grid",), aggregator="netvlad", clusters=4)
    config = replace(tiny_config, model=replace(tiny_config.model, image=parts), weight_decay=0.5)
    work = make_work(tiny_cache, config, tmp_path)
    state = _Trainer(work, torch.device("cpu")).state
    centres = state.model.image.aggregator.codebook.centres
    decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    assert decay[id(centres)] == 0
    assert decay[id(state.model.image.aggregator.project.weight)] == 0.5


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (0, "--train.gpu true: torch finds no CUDA device on this machine; leave the option out"),
        (1, "found 2 CPU and 0 GPU, expected 1 CPU and 1 GPU; lower --train.workers or leave out --train.gpu"),
    ],
)
def test_a_gpu_that_is_not_there(tiny_cache, tiny_config, tmp_path, ray_local, monkeypatch, workers, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = replace(tiny_config, workers=workers, gpu=True, cpus_per_worker=1)
    with pytest.raises(SettingsError) as refused:
        fit(make_work(tiny_cache, config, tmp_path), tmp_path)
    assert message in str(refused.value)


def test_more_workers_than_cores_are_refused(tiny_cache, tiny_config, tmp_path, ray_local):
    with pytest.raises(SettingsError, match=r"found 2 CPU, expected 1 CPU for each of 3; lower --train\.workers"):
        fit(make_work(tiny_cache, replace(tiny_config, workers=3), tmp_path), tmp_path)


def test_more_workers_than_a_step_has_images_are_refused(tiny_cache, tiny_config, tmp_path, monkeypatch):
    """The 120 captions make 6 steps of at most 23, which are levelled at 20."""
    monkeypatch.setattr("train.loop.world", lambda: (0, 22))
    with pytest.raises(SettingsError, match="smallest step of an epoch has 20 images, too few for 22 workers; lower"):
        train_here(make_work(tiny_cache, replace(tiny_config, batch=23), tmp_path), tmp_path)


def test_two_bags_have_a_branch_each(tiny_cache, tiny_config, tmp_path):
    """As the lemmas of two lexica."""
    text = replace(tiny_config.model.text, bags=("lemmas",), min_frequency=1)
    work = make_work(tiny_cache, replace(tiny_config, model=replace(tiny_config.model, text=text)), tmp_path)
    work = replace(work, inputs=replace(work.inputs, text_bags=work.inputs.text_bags * 2))
    reader = FeatureReader(work.inputs)
    targets = Targets.of(reader, "train", work.config.objective, 0)
    assert len(start(work, reader, targets, torch.device("cpu")).model.text.bags) == 2


def test_erasing_without_parts_is_refused_before_a_step(tiny_cache, tiny_config, tmp_path):
    objective = replace(tiny_config.objective, erasing=ErasingConfig(weight=0.2))
    work = make_work(tiny_cache, replace(tiny_config, objective=objective), tmp_path)
    reader = FeatureReader(work.inputs)
    targets = Targets.of(reader, "train", work.config.objective, 0)
    with pytest.raises(SettingsError, match="erasing needs parts of images and of captions that are pooled"):
        start(work, reader, targets, torch.device("cpu"))


def test_an_encoder_that_is_typed_otherwise_is_the_same_run(tiny_cache, tiny_config, tmp_path):
    work = make_work(tiny_cache, tiny_config, tmp_path)
    train_here(work, tmp_path)
    columns = [replace(column, encoder=f"other:{column.encoder}") for column in tiny_cache.columns]
    train_here(make_work(replace(tiny_cache, columns=columns), tiny_config, tmp_path), tmp_path)


def test_more_workers_than_pairs_are_refused(tiny_cache, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.world", lambda: (0, 64))
    with pytest.raises(ValueError, match="a batch of 24 captions, 1 of an image, cannot be dealt to 64 workers"):
        train_here(make_work(tiny_cache, tiny_config, tmp_path), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"ema": 0.0}, {"clip": 0.0}, {"bf16": True}, {"weight_decay": 0.5}],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_optimisation_change_the_result(tiny_cache, tiny_config, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    train_here(make_work(tiny_cache, tiny_config, tmp_path / "a"), tmp_path / "a")
    train_here(make_work(tiny_cache, replace(tiny_config, **changes), tmp_path / "b"), tmp_path / "b")
    one, two = (last_state(tmp_path / name) for name in "ab")
    differing = [name for name, value in one["best_weights"].items() if not value.equal(two["best_weights"][name])]
    assert differing
    assert two["best"] > 150


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_only_where_the_device_computes_in_it(tiny_cache, tiny_config, tmp_path, monkeypatch, native):
    """Emulated it takes several times as long as float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native, "avx2": True})
    config = replace(tiny_config, epochs=1)
    for name, bf16 in (("wide", False), ("asked", True)):
        train_here(make_work(tiny_cache, replace(config, bf16=bf16), tmp_path / name), tmp_path / name)
    wide, asked = (last_state(tmp_path / name)["best_weights"] for name in ("wide", "asked"))
    assert all(value.equal(asked[name]) for name, value in wide.items()) != native
    for name, told in (("wide", False), ("asked", native)):
        assert set(LogFile(tmp_path / name / "log.jsonl").read("train/bf16").values()) == {float(told)}


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
    work = make_work(tiny_cache, replace(tiny_config, model=model, epochs=20), tmp_path)
    before = untrained(work)
    train_here(work, tmp_path)
    assert last_state(tmp_path)["best"] > before + 50


@pytest.mark.parametrize("form", ["fixed", "A", "B", "C"])
@pytest.mark.parametrize("mining", ["hardest", "sum", "mean", "weighted"])
def test_heads_learn_with_every_hinge(tiny_cache, tiny_config, tmp_path, form, mining):
    objective = ObjectiveConfig(ranking="hinge", hinge=HingeConfig(mining=mining, margin=MarginConfig(form=form)))
    train_here(make_work(tiny_cache, replace(tiny_config, objective=objective), tmp_path), tmp_path)
    assert last_state(tmp_path)["best"] > 150


@pytest.mark.parametrize("ranking", ["hinge", "infonce", "siglip"])
def test_heads_learn_in_free_euclidean_space(tiny_cache, tiny_config, tmp_path, ranking):
    """Without the unit sphere, and with all that LESS adds; lengths stay free to the end."""
    objective = replace(LESS, ranking=ranking, hinge=HingeConfig(margin=MarginConfig(form="A")))
    model = replace(tiny_config.model, normalise=False)
    work = make_work(tiny_cache, replace(tiny_config, model=model, objective=objective), tmp_path)
    fit(work, tmp_path)
    assert last_state(tmp_path)["best"] > 150
    trained, _ = open_model(tmp_path / "model")
    lengths = embed_split(trained, FeatureReader(work.inputs), "val").images.vector.norm(dim=1)
    assert lengths.max() > 1.05 * lengths.min()


def test_keys_come_from_a_network_that_follows_by_its_formula(tiny_cache, tiny_config, tmp_path):
    """After each step theta_k becomes mu theta_k + (1 - mu) theta, beginning with theta after the first step."""
    trainer = _Trainer(make_work(tiny_cache, method_config(tiny_config, "sede-vse"), tmp_path), torch.device("cpu"))
    bank, place, momentum, expected = trainer.state.objective.bank, 0, None, {}
    for draw, _ in zip(trainer.schedule.epoch(0), trainer.epoch(), strict=True):
        places = (place + torch.arange(len(draw.captions))) % 30
        place = int(bank.pointer)
        if momentum is not None:  # as it was before this step
            batch = trainer.reader.batch(draw)
            image, text, _ = momentum(batch.image, batch.text, batch.owner)
            torch.testing.assert_close(bank.image.vector[places], image.vector[batch.owner])
            torch.testing.assert_close(bank.text.vector[places], text.vector)
        weights = {name: value.detach().clone() for name, value in trainer.state.model.named_parameters()}
        expected = {name: 0.9 * expected.get(name, value) + 0.1 * value for name, value in weights.items()}
        momentum = copy.deepcopy(trainer.state.momentum.module).requires_grad_(requires_grad=False)
        torch.testing.assert_close(dict(momentum.named_parameters()), expected, atol=1e-6, rtol=1e-5)
    assert any((weights[name] - expected[name]).abs().max() > 1e-3 for name in weights)


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
    state = last_state(tmp_path)
    assert work.validate(model)["rsum"] == pytest.approx(state["best"])


def test_no_model_is_said_to_be_none(tmp_path):
    with pytest.raises(ModelError, match="no finished model"):
        open_model(tmp_path)


def join_group(rank, folder):
    """Become one of two workers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder / 'group'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )


def train_rank(work, folder, name, last=None):
    """This worker's side of a run; its whole state after every epoch stays in `<folder>/<name>-<epoch>-<rank>`.

    It is interrupted after so many steps, if `last` is given, on every worker, as when a node goes.
    """

    class Kept(_Trainer):
        def epoch(self):
            for step in super().epoch():
                yield step
                if step == last:
                    raise InterruptionError

        def validate(self, epoch):
            metrics = super().validate(epoch)
            kept = folder / f"{name}-{epoch}-{self.rank}"
            kept.mkdir()
            self.state.save(kept)
            return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop._Trainer", Kept)
        patch.setattr("train.loop.share_buffers", lambda _: None)  # or a checkpoint would hide what differs
        try:
            train_here(work, folder / name)
        except InterruptionError:
            assert last is not None
        dist.barrier()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Two processes that are one group; gives a function that lets both do the same."""
    folder = tmp_path_factory.mktemp("group")
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, initializer=join_group, initargs=(rank, folder)) for rank in range(2)]

    def run(function, *arguments):
        for answer in [pool.submit(function, *arguments) for pool in pools]:
            answer.result()

    yield run
    for pool in pools:
        pool.shutdown()


@pytest.mark.parametrize("method", [*METHODS, FREE, *(f"recipe {name}" for name in RECIPES)])
def test_every_worker_holds_the_same_state_to_the_last_bit(tiny_cache, tiny_config, tmp_path, two_ranks, method):
    """Weights, momentum, bank, centres, margin, codebook, optimiser: alike on both, and after an interruption too."""
    recipe = method.removeprefix("recipe ")
    config = method_config(tiny_config, method) if recipe == method else recipe_config(recipe)
    config = replace(config, epochs=2, batch=23, checkpoint_steps=2)
    work = make_work(tiny_cache, config, tmp_path / "two")
    two_ranks(train_rank, work, tmp_path, "two")
    two_ranks(train_rank, work, tmp_path, "again", 3)
    assert not (tmp_path / "again-0-0").exists()
    two_ranks(train_rank, work, tmp_path, "again")
    for epoch in range(2):
        whole = read_state(tmp_path / f"two-{epoch}-0")
        for other in (f"two-{epoch}-1", f"again-{epoch}-0", f"again-{epoch}-1"):
            assert_identical(whole, read_state(tmp_path / other), other)
    if recipe == method:
        train_here(make_work(tiny_cache, config, tmp_path / "one"), tmp_path / "one")
        assert_same_state(last_state(tmp_path / "one"), whole, tolerance=1e-4)


def train_apart(work, folder):
    """Train an epoch, after which rounding has driven the second worker's buffers apart; keep what both go on with."""
    trainers = []

    class Apart(_Trainer):
        def epoch(self):
            trainers.append(self)
            yield from super().epoch()
            for buffer in self.state.objective.buffers() if self.rank == 1 else ():
                buffer.copy_(~buffer if buffer.dtype == torch.bool else buffer + 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop._Trainer", Apart)
        train_here(work, folder / "run")
    kept = folder / str(trainers[0].rank)
    kept.mkdir()
    trainers[0].state.save(kept)


@pytest.mark.parametrize("method", ["less", "sede-scan"])
def test_what_rounding_drives_apart_meets_again_at_a_checkpoint(tiny_cache, tiny_config, tmp_path, two_ranks, method):
    config = replace(method_config(tiny_config, method), epochs=1)
    two_ranks(train_apart, make_work(tiny_cache, config, tmp_path / "run"), tmp_path)
    saved = last_state(tmp_path / "run")["objective"]
    for rank in "01":
        assert_identical(saved, read_state(tmp_path / rank)["objective"], rank)


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])])
def test_two_ray_workers_follow_the_curve_of_one_process(tiny_cache, tiny_config, tmp_path, ray_local, method):
    """Half the batch each, all that a method remembers, dropout included; a batch of odd size is dealt unevenly."""
    config = replace(method_config(tiny_config, method), batch=23, epochs=2, cpus_per_worker=1)
    one = make_work(tiny_cache, config, tmp_path / "one")
    fit(one, tmp_path / "one")
    two = make_work(tiny_cache, replace(config, workers=2), tmp_path / "two")
    fit(two, tmp_path / "two")
    losses = [work.log.read("train/loss") for work in (one, two)]
    assert losses[0].keys() == losses[1].keys()
    for step, value in losses[0].items():
        assert losses[1][step] == pytest.approx(value, abs=1e-4)
    assert_same_state(last_state(tmp_path / "one"), last_state(tmp_path / "two"), tolerance=1e-4)


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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_ray_worker_loses_no_more_than_the_last_epoch(tiny_cache, tiny_config, tmp_path, ray_local, workers):
    """One worker, or one of two: the other waits for it in vain, and both begin again from the checkpoint."""
    method = method_config(tiny_config, "sede-vse")
    config = replace(method, epochs=3, workers=workers, cpus_per_worker=1, max_failures=1)
    work = make_work(tiny_cache, config, tmp_path / "killed")
    killing = replace(work, validate=KillOnce(work.validate, tmp_path / "marker"))
    fit(killing, tmp_path / "killed")
    assert (tmp_path / "marker").exists()
    undisturbed = make_work(tiny_cache, replace(config, workers=0), tmp_path / "undisturbed")
    fit(undisturbed, tmp_path / "undisturbed")
    tolerance = {1: 1e-6, 2: 1e-4}[workers]
    assert_same_state(last_state(tmp_path / "undisturbed"), last_state(tmp_path / "killed"), tolerance)


def test_what_goes_wrong_in_a_ray_worker_is_told_as_it_is(tiny_cache, tiny_config, tmp_path, ray_local):
    free = replace(tiny_config.model, normalise=False)
    config = replace(tiny_config, lr=1e30, clip=0.0, model=free, workers=1, max_failures=0)
    with pytest.raises(DivergenceError, match=r"lower --train\.lr"):
        fit(make_work(tiny_cache, config, tmp_path), tmp_path)


HOSTS = {"vse": ("vse", {}), "scan": ("scan", {}), "vsrn": ("vse", {"context": "graph", "aggregator": "memory"})}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("erasing", [0.0, 0.5])
@pytest.mark.parametrize("bank", [0, 30])
@pytest.mark.parametrize(("ranking", "hardness"), [("hinge", 0.0), ("infonce", 0.0), ("infonce", 2.0)])
def test_every_module_of_sede_learns_on_every_host(
    tiny_cache, tiny_config, tmp_path, host, erasing, bank, ranking, hardness
):
    name, reasoning = HOSTS[host]
    image = replace(GRID, **reasoning)
    objective = ObjectiveConfig(
        ranking=ranking,
        hinge=HingeConfig(mining="mean", margin=MarginConfig(form="fixed")),
        infonce=InfoNCEConfig(hardness=hardness, temperature=0.1),
        erasing=ErasingConfig(weight=erasing),
        bank=BankConfig(size=bank, momentum=0.9),
    )
    model = replace(tiny_config.model, host=name, scan=ScanConfig(words=6), image=image, text=TOKENS)
    work = make_work(tiny_cache, replace(tiny_config, model=model, objective=objective, epochs=4), tmp_path)
    train_here(work, tmp_path)
    gaps = list(work.log.read("train/gap").values())
    assert gaps[-1] > gaps[0]
    state = last_state(tmp_path)
    assert ("momentum" in state) == bool(bank)
    assert bool(work.log.read("train/loss/erasing")) == bool(erasing)


@pytest.mark.parametrize(("dim", "weight"), [(8, 0.0), (0, 1.0)])
def test_a_local_space_and_its_loss_belong_together(tiny_cache, tiny_config, tmp_path, dim, weight):
    hier = method_config(tiny_config, "hier")
    objective = replace(hier.objective, local=LocalLossConfig(weight=weight))
    config = replace(hier, model=replace(hier.model, local=LocalConfig(dim=dim)), objective=objective)
    with pytest.raises(SettingsError, match="expected both above 0, or both 0"):
        train_here(make_work(tiny_cache, config, tmp_path), tmp_path)


def test_the_average_begins_short_and_ends_at_its_decay():
    averages, weights = [torch.zeros(1)], [torch.ones(1)]
    _follow(0.5, averages, weights, 1)
    assert float(averages[0]) == pytest.approx(1 - 2 / 11)
    averages = [torch.zeros(1)]
    _follow(0.5, averages, weights, torch.tensor(100))
    assert float(averages[0]) == pytest.approx(0.5)
