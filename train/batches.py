"""Batches: what towers and losses see, in which order, and how it comes from mapped columns."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from featurize.cache import Dataset, open_column, open_dataset, read_manifest
from featurize.config import View
from featurize.extract import PlannedColumn
from featurize.shards import Array, Column
from train.config import ObjectiveConfig, TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """Frozen features of N rows of one modality.

    Attributes:
        vectors: (N, V) float32, all vector columns side by side; V may be 0.
        parts: one (N, K_c, D_c) float32 tensor for each part column (grid, regions, tokens).
        masks: one (N, K_c) bool tensor for each part column; True where a part is real.
    """

    vectors: Tensor
    parts: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> "Features":
        """The same on a device; from pinned memory without waiting."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Features(move(self.vectors), tuple(map(move, self.parts)), tuple(map(move, self.masks)))


@dataclass(frozen=True)
class Pairs:
    """The global batch as losses see it: B embedded pairs, row i of one matching row i of the other.

    Attributes:
        image: (B, E) image embeddings.
        text: (B, E) caption embeddings.
        image_ids: (B,) int64; pairs with equal ids show the same image and are never negatives of each other.
        semantic: (B, S) frozen unit sentence vectors of the captions, no gradient; S = 0 where no loss reads them.
    """

    image: Tensor
    text: Tensor
    image_ids: Tensor
    semantic: Tensor


@dataclass(frozen=True)
class Batch:
    """One worker's slice of a step: b pairs.

    Attributes:
        image: features of the pairs' images.
        text: features of the pairs' captions.
        image_ids: (b,) int64 image rows.
        semantic: (b, S) unit sentence vectors, or S = 0.
    """

    image: Features
    text: Features
    image_ids: Tensor
    semantic: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(self.image.to(device), self.text.to(device), self.image_ids.to(device), self.semantic.to(device))


@dataclass(frozen=True)
class ColumnRef:
    """A column as it travels to a worker, and as a saved model remembers what to ask of a new picture or caption.

    Attributes:
        name: in the cache.
        id: its identity.
        encoder: reference that opens its encoder.
        weights: sha256 of that encoder's weights.
        output: which of the encoder's outputs.
        view: of the image.
    """

    name: str
    id: str
    encoder: str
    weights: str
    output: str
    view: View


@dataclass(frozen=True)
class Inputs:
    """The columns that a model reads: plain data, opened where it is used.

    Attributes:
        dataset: folder of the indexed data set.
        image_vectors: for each vector column its views.
        image_parts: for each part column its views.
        text_vectors: vector columns of captions.
        text_parts: part columns of captions.
        semantic: sentence vectors for losses that compare captions, if any does.
        precision: of the encoders' arithmetic.
    """

    dataset: Path
    image_vectors: tuple[tuple[ColumnRef, ...], ...]
    image_parts: tuple[tuple[ColumnRef, ...], ...]
    text_vectors: tuple[ColumnRef, ...]
    text_parts: tuple[ColumnRef, ...]
    semantic: ColumnRef | None
    precision: Literal["bfloat16", "float32"]

    @classmethod
    def of(
        cls,
        dataset: Path,
        columns: Sequence[PlannedColumn],
        config: TrainConfig,
        precision: Literal["bfloat16", "float32"],
    ) -> "Inputs":
        """Sort a run's columns by the tower and the branch that reads them."""
        model = config.model

        def views(modality: str, wanted: Sequence[str]) -> tuple[tuple[ColumnRef, ...], ...]:
            groups: dict[tuple[str, str], list[ColumnRef]] = {}
            for name in wanted:
                encoder, _, output = name.rpartition(".")
                for column in columns:
                    own = str(column.ingredients["encoder"])
                    if (column.modality, column.output.name) == (modality, output) and encoder in ("", own):
                        groups.setdefault((own, output), []).append(
                            ColumnRef(
                                column.name,
                                column.id,
                                column.encoder,
                                str(column.ingredients["weights"]),
                                output,
                                column.view,
                            )
                        )
            return tuple(map(tuple, groups.values()))

        sentences = [ref[0] for ref in views("text", ["sentence"])] if compares_captions(config.objective) else []
        return cls(
            dataset,
            views("image", model.image.vectors),
            views("image", model.image.parts),
            tuple(ref[0] for ref in views("text", model.text.vectors)),
            tuple(ref[0] for ref in views("text", model.text.parts)),
            sentences[0] if sentences else None,
            precision,
        )


def compares_captions(config: ObjectiveConfig) -> bool:
    """Whether a loss reads the frozen similarity of captions."""
    return config.ranking == "hinge" and config.hinge.margin.form in ("B", "C")


def wanted_outputs(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The encoder outputs that a training run reads: of images, of captions."""
    image, text = config.model.image, config.model.text
    sentence = ("sentence",) if compares_captions(config.objective) else ()
    return image.vectors + image.parts, tuple(dict.fromkeys(text.vectors + text.parts + sentence))


class FeatureReader:
    """Rows of the cache as tensors.

    Attributes:
        dataset: the index.
        views: number of views of each image.
        missing: (n,) image rows without features in some column.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.dataset: Dataset = open_dataset(inputs.dataset)

        def opened(ref: ColumnRef) -> Column:
            return open_column(self.dataset, ref.name, ref.id)

        self._image_vectors = [[opened(ref) for ref in views] for views in inputs.image_vectors]
        self._image_parts = [[opened(ref) for ref in views] for views in inputs.image_parts]
        self._text_vectors = [opened(ref) for ref in inputs.text_vectors]
        self._text_parts = [opened(ref) for ref in inputs.text_parts]
        self._semantic = opened(inputs.semantic) if inputs.semantic else None
        self.views = len((self._image_vectors or self._image_parts)[0])
        image_columns = [column for views in self._image_vectors + self._image_parts for column in views]
        manifests = [read_manifest(column.folder) for column in image_columns]
        self.missing = np.unique(np.concatenate([manifest.missing for manifest in manifests if manifest]))

    @cached_property
    def caption_image(self) -> Array:
        """(captions,) int64 image row of each caption row."""
        return self.dataset.caption_image

    @property
    def image_dims(self) -> tuple[int, tuple[int, ...]]:
        """Width of the image vectors, widths of the image parts."""
        return _dims([views[0] for views in self._image_vectors], [views[0] for views in self._image_parts])

    @property
    def text_dims(self) -> tuple[int, tuple[int, ...]]:
        """Width of the caption vectors, widths of the caption parts."""
        return _dims(self._text_vectors, self._text_parts)

    def split(self, name: str) -> tuple[Array, Array]:
        """Image rows (n,) and caption rows (m,) of a split, without images that could not be decoded."""
        images = np.setdiff1d(self.dataset.rows_of(name), self.missing)
        return images, np.flatnonzero(np.isin(self.caption_image, images))

    def images(self, rows: Array, views: Array) -> Features:
        """Features of image rows (N,), each in the view (N,) that is asked for."""

        def pick(columns: list[Column], gather: Callable[[Column, Array], Array]) -> Array:
            if not views.any():
                return gather(columns[0], rows)
            out = np.empty((len(rows), *columns[0].shape), columns[0].dtype)
            for number, column in enumerate(columns):
                places = np.flatnonzero(views == number)
                if len(places):
                    out[places] = gather(column, rows[places])
            return out

        parts = tuple(_tensor(pick(columns, Column.gather)) for columns in self._image_parts)
        return Features(
            _side_by_side([pick(columns, Column.gather) for columns in self._image_vectors], len(rows)),
            parts,
            tuple(torch.ones(part.shape[:2], dtype=torch.bool) for part in parts),
        )

    def texts(self, rows: Array) -> Features:
        """Features of caption rows (N,)."""
        padded = [column.gather_padded(rows) for column in self._text_parts]
        return Features(
            _side_by_side([column.gather(rows) for column in self._text_vectors], len(rows)),
            tuple(_tensor(values) for values, _ in padded),
            tuple(torch.from_numpy(mask) for _, mask in padded),
        )

    def batch(self, captions: Array, views: Array) -> Batch:
        """Pairs of caption rows (b,) and their images in the views (b,) asked for."""
        images = self.caption_image[captions]
        semantic = self._semantic.gather(captions) if self._semantic else np.empty((len(captions), 0), np.float16)
        return Batch(self.images(images, views), self.texts(captions), torch.from_numpy(images), _tensor(semantic))


def _dims(vectors: Sequence[Column], parts: Sequence[Column]) -> tuple[int, tuple[int, ...]]:
    return sum(column.shape[-1] for column in vectors), tuple(column.shape[-1] for column in parts)


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values).float()


def _side_by_side(values: Sequence[Array], rows: int) -> Tensor:
    return torch.cat([_tensor(value) for value in values], 1) if values else torch.empty(rows, 0)


def epoch_order(caption_image: Array, seed: int, epoch: int) -> Array:
    """The order of an epoch over captions: a permutation of range(M) that depends on (seed, epoch) alone.

    Round r takes every image's r-th caption (in an order of the image's own), images shuffled anew in each round, so
    that nearly every batch shows each image once, whatever the number of captions an image has.

    Args:
        caption_image: (M,) image row of each caption.
        seed: of the run.
        epoch: from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    count = len(caption_image)
    by_image = np.lexsort((rng.random(count), caption_image))
    sorted_images = caption_image[by_image]
    firsts = np.searchsorted(sorted_images, sorted_images)
    rounds = np.arange(count) - firsts
    return by_image[np.lexsort((rng.random(count), rounds))]


@dataclass(frozen=True)
class Schedule:
    """Which rows each step of each epoch takes; the same on every worker, for any number of workers.

    Attributes:
        captions: (M,) caption rows of the train split.
        caption_image: (M,) their image rows.
        batch: pairs in the global batch.
        views: number of views to choose from.
        seed: of the run.
    """

    captions: Array
    caption_image: Array
    batch: int
    views: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps in an epoch; batches differ in size by at most one pair, so that every caption is used once."""
        return -(-len(self.captions) // self.batch)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Array, Array]]:
        """Caption rows (b,) and image views (b,) of each global batch."""
        order = epoch_order(self.caption_image, self.seed, epoch)
        views = np.random.default_rng([self.seed, epoch, 1]).integers(0, self.views, len(order))
        chunks = zip(np.array_split(order, self.steps), np.array_split(views, self.steps), strict=True)
        for step, (rows, chosen) in enumerate(chunks):
            if step >= first_step:
                yield self.captions[rows], chosen


def worker_slices(total: int, workers: int) -> list[slice]:
    """How a global batch of `total` pairs is dealt to workers: contiguous, sizes differing by at most one."""
    bounds = [len(part) for part in np.array_split(np.arange(total), workers)]
    starts = np.cumsum([0, *bounds])
    return [slice(int(start), int(end)) for start, end in itertools.pairwise(starts)]


class _End:
    """What follows the last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterator[T], depth: int = 4) -> Iterator[T]:
    """Make items in a thread, up to `depth` ahead; an error there is raised here."""
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    unwanted = threading.Event()

    def produce() -> None:
        end = _End(None)
        try:
            for item in items:
                _put(ready, item, unwanted)
                if unwanted.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - it is raised again in the consumer's thread
            end = _End(error)
        _put(ready, end, unwanted)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        unwanted.set()
        thread.join()


def _put(ready: "queue.Queue[T | _End]", item: T | _End, unwanted: threading.Event) -> None:
    """Wait for room, but not for a consumer that has gone."""
    while not unwanted.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return
