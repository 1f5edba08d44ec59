"""The one training loop: plain torch, the same with and without Ray, on one worker or many.

The loss is over the *global* batch and the order of an epoch depends on seed and epoch alone, so the number of workers
changes the speed and nothing else.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featurize.encoder import usable_precision
from featurize.shards import Array
from train.batches import Batch, FeatureReader, Inputs
from train.checkpoints import Checkpoints
from train.config import PLACEMENT, SettingsError, TrainConfig
from train.distributed import average_gradients, gather_embeddings, gather_erased, gather_rows, share_buffers, world
from train.embeddings import Embeddings, Pairs
from train.hosts import Host, build_host
from train.lexicon import BagOfLemmas
from train.losses.objective import Objective
from train.memory import EmbeddingShape
from train.mixup import Mixup, check_mixup, mix
from train.noise import Noise
from train.quantize import PartCodebook
from train.schedule import Draw, Schedule, prefetch, windows
from train.state import TrainState
from train.targets import Targets
from train.towers import Dims

LOG_EVERY = 10  # steps

Validate = Callable[[Host], Mapping[str, float]]
Log = Callable[[Mapping[str, float], int], None]


class DivergenceError(ArithmeticError):
    """The loss, whose terms the message holds, or a weight is not finite any more."""


class Progress(Protocol):
    """A progress bar."""

    def update(self, n: int = 1) -> object:
        """Count steps."""

    def set_description(self, desc: str) -> object:
        """Say what is going on."""

    def close(self) -> object:
        """The end."""


@dataclass(frozen=True)
class Work:
    """What a worker is asked to do; plain data and importable callables, so it travels.

    Attributes:
        config: towers, objective, optimisation.
        inputs: the columns.
        split: to learn on.
        validate: called on rank 0 after each epoch; must return "rsum", larger is better.
        log: called on rank 0 with metrics and the global step.
    """

    config: TrainConfig
    inputs: Inputs
    split: str
    validate: Validate
    log: Log


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _fingerprint(work: Work) -> dict[str, Any]:
    config = {key: value for key, value in asdict(work.config).items() if key not in PLACEMENT}
    return {**config, "cache": work.inputs.identities(), "split": work.split}


def _parameter_groups(modules: list[nn.Module], decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices of the towers only; centres of parts are points, and not to be drawn to the origin."""
    parameters = [p for module in modules for p in module.parameters()]
    points = {id(part.centres) for part in modules[0].modules() if isinstance(part, PartCodebook)}
    matrices = [p for p in modules[0].parameters() if p.ndim >= 2 and id(p) not in points]
    chosen = {id(p) for p in matrices}
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": 0.0},
    ]


def feature_dims(reader: FeatureReader, config: TrainConfig) -> tuple[Dims, Dims]:
    """Widths of image and of caption features."""
    words = (config.model.text.vocabulary,) * len(reader.inputs.text_bags)
    return Dims(*reader.image_dims), Dims(*reader.text_dims, words)


def start(work: Work, reader: FeatureReader, targets: Targets, device: torch.device) -> TrainState:
    """The state before the first step: seeded weights, statistics and words of training rows, centres by k-means."""
    config = work.config
    check_mixup(config)
    if bool(config.model.local.dim) != bool(config.objective.local.weight):
        raise SettingsError(
            f"found a local space of {config.model.local.dim} dimensions and a local loss of weight "
            f"{config.objective.local.weight}; expected both above 0, or both 0"
        )
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 2])
    images, captions = _near(config, reader, *reader.split(work.split))
    model = build_host(config.model, *feature_dims(reader, config))
    bags = config.model.text
    vocabularies = reader.vocabularies(work.split, bags.vocabulary, bags.min_frequency)
    for bag, vocabulary in zip(model.text.bags, vocabularies, strict=True):
        assert isinstance(bag, BagOfLemmas)
        bag.fit(vocabulary)
    image_rows = np.sort(rng.permutation(images)[: 1024 if reader.image_dims[1] else 16384])
    text_rows = np.sort(rng.permutation(captions)[: 4096 if reader.text_dims[1] else 16384])
    image_sample = reader.images(image_rows, rng.integers(0, reader.views, len(image_rows)))
    text_sample = reader.texts(text_rows)
    if config.objective.erasing.weight:
        model.require_guidance()
    with torch.no_grad():
        model.fit_inputs(image_sample, text_sample)
        embedded = model.embed_images(image_sample), model.embed_texts(text_sample)
    image, text = (EmbeddingShape(e.vector.shape[1], e.local.shape[1], *e.parts.shape[1:]) for e in embedded)
    objective = Objective(config.objective, image, text, targets.count, targets.labels.shape[1])
    if objective.local is not None:
        objective.local.fit(targets.idf)
    model.to(device)
    objective.to(device)
    groups = _parameter_groups([model, objective], config.weight_decay)
    optimizer = AdamW(groups, lr=config.lr, fused=True)
    average = AveragedModel(model, multi_avg_fn=partial(_follow, config.ema)) if config.ema else None
    momentum = None
    if objective.bank is not None:
        moving = get_ema_multi_avg_fn(config.objective.bank.momentum)  # type: ignore[no-untyped-call]  # torch's
        momentum = AveragedModel(model, multi_avg_fn=moving)
    for follower in filter(None, (average, momentum)):
        for module in follower.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # a copy's weights lie apart, and cuDNN would gather them in every call
    return TrainState(model, objective, optimizer, average, momentum, _fingerprint(work))


def _near(config: TrainConfig, reader: FeatureReader, images: Array, captions: Array) -> tuple[Array, Array]:
    """Of image and caption rows those of the first window, which is read anyway; all where there are no windows."""
    if not config.window:
        return images, captions
    first = images[windows(images // reader.images_per_shard, config.window, config.seed, 0) == 0]
    return first, captions[np.isin(reader.caption_image[captions], first)]


def _follow(decay: float, averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
    """A moving average that begins short: after n updates its decay is at most (1 + n) / (10 + n), as TensorFlow's.

    A short training then keeps little of the weights that it began with.
    """
    count = int(updates)
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + count) / (10 + count)))


def train_worker(
    work: Work, checkpoints: Checkpoints, device: torch.device, progress: Callable[[int, int], Progress]
) -> None:
    """Train until the last epoch, early stopping or an error; continue from the last checkpoint if there is one.

    Args:
        work: what to do.
        checkpoints: where state goes.
        device: this worker's.
        progress: (total steps, steps done) -> a bar, asked for on rank 0.

    Raises:
        SettingsError: the global batch, or a step that the data has rows for, is smaller than the number of workers.
        DivergenceError: the loss or a weight is not finite.
    """
    trainer = _Trainer(work, device)
    state, epochs = trainer.state, work.config.epochs
    if (folder := checkpoints.latest()) is not None:
        state.load(folder)
    bar = progress(trainer.total, state.step) if trainer.rank == 0 else None
    begun = time.monotonic() - state.seconds

    def save() -> None:
        trainer.require_finite()
        state.seconds = time.monotonic() - begun
        share_buffers(state.objective)  # so that every worker goes on from what is saved
        if trainer.rank == 0:
            checkpoints.save(state.save, state.step)

    try:
        while not state.stopped:
            epoch = state.step // trainer.schedule.steps
            for step in trainer.epoch():
                if bar is not None:
                    bar.update(1)
                between = step % trainer.schedule.steps and work.config.checkpoint_steps
                if between and step % between == 0:
                    save()
            metrics = trainer.validate(epoch)
            if bar is not None:
                bar.set_description(
                    f"train: epoch {epoch + 1}/{epochs}, val rSum {metrics['rsum']:.1f} (best {state.best:.1f})"
                )
            save()
    finally:
        if bar is not None:
            bar.close()


@dataclass(frozen=True)
class _Step:
    """What a step takes.

    Attributes:
        draw: the global batch: B captions of G images.
        mixed: (B,) caption rows that they are mixed with; the captions themselves without mixup.
        slices: of the images and of the captions, that each worker has.
        batch: this worker's part.
    """

    draw: Draw
    mixed: Array
    slices: list[tuple[slice, slice]]
    batch: Batch


class _Trainer:
    """One worker's side of the loop: data, state, and what a step does."""

    def __init__(self, work: Work, device: torch.device) -> None:
        config = work.config
        self.work = work
        self.device = device
        self.bf16 = config.bf16 and usable_precision("bfloat16", device) == "bfloat16"
        self.rank, workers = world()
        together = config.captions_per_image
        if together < 1 or config.batch // together < workers:
            raise SettingsError(
                f"a batch of {config.batch} captions, {together} of an image, cannot be dealt to {workers} workers; "
                "raise --train.batch, or set --train.captions_per_image 1"
            )
        self.reader = FeatureReader(work.inputs)
        _, captions = self.reader.split(work.split)
        owner = self.reader.caption_image[captions]
        shards = owner // self.reader.images_per_shard
        self.schedule = Schedule(
            captions, owner, config.batch, self.reader.views, config.seed, together, shards, config.window
        )
        if self.schedule.smallest < workers:
            raise SettingsError(
                f"the smallest step of an epoch has {self.schedule.smallest} images, too few for {workers} workers; "
                "lower --train.workers, or train on more data"
            )
        self.total = config.epochs * self.schedule.steps
        self.targets = Targets.of(self.reader, work.split, config.objective, config.seed)
        self.mixup = Mixup(config.mixup, config.seed) if config.mixup else None
        self.state = start(work, self.reader, self.targets, device)
        self.model: nn.Module = self.state.model
        if workers > 1:
            self.model = DistributedDataParallel(
                self.state.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def epoch(self) -> Iterator[int]:
        """Take the steps that are left of the current epoch; yields the global step after each."""
        state = self.state
        epoch, first_step = divmod(state.step, self.schedule.steps)
        self.model.train()
        state.objective.train()
        for step in prefetch(self._steps(epoch, self._fetched(epoch, first_step), first_step)):
            terms = self._step(step)
            if state.step % LOG_EVERY == 0 or state.step % self.schedule.steps == 0:
                self._report(terms)
            yield state.step

    def _fetched(self, epoch: int, first_step: int) -> Iterator[Draw]:
        """The draws of an epoch; while those of a window are used, the shards of the next are fetched."""
        turns, captions = self.schedule.turns(epoch), self.schedule.captions
        if turns is None:
            yield from self.schedule.epoch(epoch, first_step)
            return
        reached = -1
        with ThreadPoolExecutor(1) as pool:
            for draw in self.schedule.epoch(epoch, first_step):
                now = int(turns[np.searchsorted(captions, draw.captions)].max())
                if now > reached:
                    reached = now
                    pool.submit(self.reader.prepare, captions[turns == now + 1])  # what fails is met again by a step
                yield draw

    def _steps(self, epoch: int, draws: Iterator[Draw], first_step: int) -> "Iterator[_Step]":
        number = epoch * self.schedule.steps + first_step
        for draw in draws:
            slices = draw.slices(world()[1])
            own = slices[self.rank]
            batch, mixed = self.reader.batch(draw.part(*own)), draw.captions
            if self.mixup is not None:
                partner, share = self.mixup.draw(number, len(mixed))
                others = draw.permuted(partner)
                mixed = others.captions
                batch = mix(batch, self.reader.batch(others.part(*own)), share)
            # pinned in the thread that prefetches, so that the step's own copies wait for nothing
            yield _Step(draw, mixed, slices, batch.map(Tensor.pin_memory) if self.device.type == "cuda" else batch)
            number += 1

    def _pairs(self, step: "_Step") -> Pairs:
        """The embedded global batch."""
        state, config, draw = self.state, self.work.config, step.draw
        images, captions = ([part.stop - part.start for part in parts] for parts in zip(*step.slices, strict=True))
        own_images, own_captions = step.slices[self.rank]
        noise = Noise(config.seed, state.step, len(draw.views), own_images)
        batch = step.batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        owner = torch.from_numpy(draw.owner).to(self.device)
        keep = config.objective.erasing.keep if config.objective.erasing.weight else None

        def gathered(image: Embeddings, text: Embeddings) -> tuple[Embeddings, Embeddings]:
            return gather_embeddings(image, images)[owner], gather_embeddings(text, captions)

        keys: tuple[Embeddings, Embeddings] | None = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            noises = noise, noise.over(len(draw.captions), own_captions)
            image, text, erased = self.model(batch.image, batch.text, batch.owner, noises, keep)
            if state.momentum is not None:
                with torch.no_grad():
                    one, other, _ = state.momentum(batch.image, batch.text, batch.owner)
                    keys = gathered(one, other)
        image_ids = torch.from_numpy(self.targets.image_ids[draw.captions])
        return Pairs(
            *gathered(image, text),
            image_ids.to(self.device),
            gather_rows(batch.semantic, captions),
            self.targets.concepts[image_ids].to(self.device),
            self.targets.labels[image_ids].to(self.device),
            torch.from_numpy(self.targets.image_ids[step.mixed]).to(self.device),
            keys,
            None if erased is None else gather_erased(erased, captions),
        )

    def _step(self, step: "_Step") -> dict[str, Tensor]:
        """One optimiser step on a global batch; returns what to log."""
        state, config = self.state, self.work.config
        loss, terms = state.objective(self._pairs(step), state.step / self.total, state.model.spaces())
        state.optimizer.zero_grad()
        loss.backward()
        average_gradients(state.objective.parameters())
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        rate = learning_rate(config, state.step, self.total)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        for follower in state.followers().values():
            follower.update_parameters(state.model)
        state.step += 1
        return {"loss": loss.detach(), **terms, "gradient_norm": norm, "lr": torch.tensor(rate)}

    def _report(self, terms: Mapping[str, Tensor]) -> None:
        values = {f"train/{name}": float(value) for name, value in terms.items()}
        if not math.isfinite(values["train/loss"]):
            raise DivergenceError(
                f"the loss is {values['train/loss']} at step {self.state.step}; "
                f"lower --train.lr, or look at the terms: {values}"
            )
        if self.rank == 0:
            self.work.log({**values, "train/bf16": float(self.bf16)}, self.state.step)

    def require_finite(self) -> None:
        """Refuse to keep weights that nothing can go on from.

        Raises:
            DivergenceError: one of them is not finite.
        """
        if not all(bool(weight.isfinite().all()) for weight in self.state.model.parameters()):
            raise DivergenceError(
                f"weights are not finite any more at step {self.state.step}, which is not saved; lower --train.lr"
            )

    def validate(self, epoch: int) -> dict[str, float]:
        """Validate on rank 0, tell the others, and note what it means for the run."""
        state, work = self.state, self.work
        metrics: dict[str, float] = {}
        if self.rank == 0:
            evaluated = state.evaluated.eval()
            with torch.inference_mode():
                metrics = dict(work.validate(evaluated))
            work.log({f"val/{name}": value for name, value in metrics.items()}, state.step)
        if world()[1] > 1:
            told = torch.tensor([metrics.get("rsum", 0.0)], dtype=torch.float64, device=self.device)
            dist.broadcast(told, 0)
            metrics["rsum"] = float(told)
        if metrics["rsum"] > state.best:
            state.best, state.best_epoch = metrics["rsum"], epoch
            weights = state.evaluated.state_dict()
            state.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
        patience = work.config.patience
        state.stopped = epoch + 1 >= work.config.epochs or bool(patience and epoch - state.best_epoch >= patience)
        return metrics
