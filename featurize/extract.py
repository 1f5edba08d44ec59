"""Extraction: one Ray task describes one shard of images or captions and writes it for every output that is missing.

`extract_shard` is a plain function on plain records; `featurize` decides what is missing and hands it to Ray.
"""

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from featurize.cache import (
    FORMAT_VERSION,
    CacheError,
    Dataset,
    Manifest,
    ShardRecord,
    check_quarantine,
    column_folder,
    identity,
    make_manifest,
    read_manifest,
    read_record,
    write_quarantine,
)
from featurize.config import FeaturizeConfig, View
from featurize.datasets.sample import Sample
from featurize.encoder import Card, ImageEncoder, Output, TextEncoder
from featurize.images import open_image_encoder
from featurize.images.decode import DecodeError
from featurize.images.decoder import Decoder
from featurize.images.views import view
from featurize.quarantine import lost_images, summary
from featurize.shards import Array, publish, row_key, write_shard
from featurize.texts import open_text_encoder

# One core a worker, and an allocator that keeps the pages of large activations instead of giving them back to the
# system after every layer: 3 to 4 times as fast on a CPU (benchmarks/bench_extraction.py).
WORKER_ENV = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

Modality = Literal["image", "text"]


@dataclass(frozen=True)
class PlannedColumn:
    """A column that a run needs: what it is, whether or not it is there.

    Attributes:
        name: `<encoder>.<output>[.<view>]`.
        modality: image or text.
        encoder: the reference that opens it.
        output: which of the encoder's outputs.
        view: of the image; "plain" for captions.
        ingredients: of its identity.
        folder: where it belongs.
    """

    name: str
    modality: Modality
    encoder: str
    output: Output
    view: View
    ingredients: dict[str, Any]
    folder: Path

    @property
    def id(self) -> str:
        """The identity (sha256)."""
        return identity(self.ingredients)


@dataclass(frozen=True)
class ShardTask:
    """Everything one Ray task needs: no pixels, no features.

    Attributes:
        modality: image or text.
        encoder: reference of the frozen network.
        card: what that network must turn out to be.
        precision: of its arithmetic.
        view: of the images.
        number: of the shard.
        samples: its images, in order.
        targets: (output name, ragged, column folder) to write.
        batch: rows in a forward pass.
        rows: rows that each target gets.
        decode_timeout: seconds that decoding one image may take.
    """

    modality: Modality
    encoder: str
    card: Card
    precision: Literal["bfloat16", "float32"]
    view: View
    number: int
    samples: tuple[Sample, ...]
    targets: tuple[tuple[str, bool, Path], ...]
    batch: int
    rows: int
    decode_timeout: float = FeaturizeConfig.decode_timeout


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=8)
def image_encoder(reference: str, precision: Literal["bfloat16", "float32"]) -> ImageEncoder:
    """An image encoder on this process's device, opened once."""
    return open_image_encoder(reference, precision, _device())


@functools.lru_cache(maxsize=8)
def text_encoder(reference: str, precision: Literal["bfloat16", "float32"]) -> TextEncoder:
    """A text encoder on this process's device, opened once."""
    return open_text_encoder(reference, precision, _device())


@functools.lru_cache(maxsize=1)
def _decoder(timeout: float) -> Decoder:
    """This process's decoder; its children stay for the shards to come."""
    return Decoder(timeout)


def describe_images(encoder: ImageEncoder, prepared: Iterable[Tensor], batch: int) -> dict[str, Array]:
    """What an encoder says of prepared images: output name -> (N, *shape) float32."""
    answers: dict[str, list[Array]] = {}
    remaining = iter(prepared)
    while images := list(itertools.islice(remaining, batch)):
        for name, values in encoder.encode(torch.stack(images)).items():
            answers.setdefault(name, []).append(values.numpy())
    return {name: np.concatenate(values) for name, values in answers.items()}


def describe_texts(encoder: TextEncoder, captions: Sequence[str], batch: int) -> dict[str, list[Array]]:
    """What an encoder says of captions: output name -> one array a caption, float32 or int32.

    Captions of equal length share a forward pass, so that padding costs nothing.
    """
    tokens = encoder.prepare(captions)
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    answers: dict[str, list[Array]] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for name, values in encoder.encode([tokens[row] for row in rows]).items():
            places = answers.setdefault(name, [np.empty(0)] * len(order))
            for row, value in zip(rows, values, strict=True):
                places[row] = value.numpy()
    return answers


def extract_shard(task: ShardTask) -> dict[str, ShardRecord]:
    """Describe one shard's rows and publish a tar for each target; returns column folder -> record.

    A row whose image cannot be decoded is written as NaN and noted in the record: rows keep their places.

    Raises:
        CacheError: this machine opens another network under the same reference than the driver did.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if task.modality == "image":
        keys = [row_key(sample.image_id) for sample in task.samples]
        answers, failed = _describe_image_samples(task)
    else:
        keys = [row_key(s.image_id, number) for s in task.samples for number in range(len(s.captions))]
        encoder = text_encoder(task.encoder, task.precision)
        _check_card(task, encoder.card)
        answers = {**describe_texts(encoder, [c for s in task.samples for c in s.captions], task.batch)}
        failed = {}
    dtypes = {output.name: output.dtype for output in task.card.outputs}
    records = {}
    for name, ragged, folder in task.targets:
        rows = (np.asarray(row, dtypes[name]) for row in answers[name])
        file = write_shard(folder / f"{task.number:06d}.tar", keys, rows, ragged=ragged)
        record = ShardRecord(file.rows, file.size, file.sha256, tuple(failed), tuple(failed.values()))
        publish(folder / f"{task.number:06d}.json", json.dumps(asdict(record)).encode())
        records[str(folder)] = record
    return records


def _check_card(task: ShardTask, card: Card) -> None:
    if card != task.card:
        raise CacheError(
            f"{task.encoder}: this worker opens {card}, the driver opened {task.card}; every machine must hold the "
            "same weights and support the same precision (--featurize.precision float32 is supported by all)"
        )


def _describe_image_samples(task: ShardTask) -> tuple[dict[str, Sequence[Array]], dict[int, str]]:
    encoder = image_encoder(task.encoder, task.precision)
    _check_card(task, encoder.card)
    decoder = _decoder(task.decode_timeout)
    failed: dict[int, str] = {}

    def prepare(numbered: tuple[int, Sample]) -> Tensor | None:
        number, sample = numbered
        try:
            return encoder.prepare(view(decoder.decode(sample.read()), task.view, sample.image_id))
        except (DecodeError, OSError) as error:
            failed[number] = f"{type(error).__name__}: {error}"
            return None

    with ThreadPoolExecutor(1 if _device() == "cpu" else 8) as pool:
        mapper: Callable[..., Iterable[Tensor | None]] = map if _device() == "cpu" else pool.map
        prepared = mapper(prepare, enumerate(task.samples))
        described = describe_images(encoder, (image for image in prepared if image is not None), task.batch)
    answers: dict[str, Sequence[Array]] = {}
    good = [number for number in range(len(task.samples)) if number not in failed]
    for output in encoder.card.outputs:
        rows = np.full((len(task.samples), *output.shape), np.nan, np.float32)
        if good:
            rows[good] = described[output.name]
        answers[output.name] = list(rows)
    return answers, dict(sorted(failed.items()))


def _outputs(card: Card, reference: str, wanted: Sequence[str]) -> list[Output]:
    """The outputs that a run wants of this encoder: named plainly, or as `<encoder>.<output>` for this one alone.

    A plain name is for every encoder that has such an output: sentences come from a network, lemmas from a lexicon.
    """
    own = {output.name: output for output in card.outputs}
    chosen = []
    for name in wanted:
        encoder, _, output = name.rpartition(".")
        if encoder and encoder != card.name:
            continue
        if output in own:
            chosen.append(own[output])
        elif encoder:
            raise CacheError(f"encoder {reference!r} has no output {output!r}; it has {', '.join(own)}")
    return list(dict.fromkeys(chosen))


def plan(
    dataset: Dataset, config: FeaturizeConfig, image_outputs: Sequence[str], text_outputs: Sequence[str]
) -> list[PlannedColumn]:
    """The columns that a run needs, with their identities (opens every encoder on this machine).

    Raises:
        CacheError: an encoder lacks an output that is wanted, or no encoder has it.
    """
    planned: list[PlannedColumn] = []
    encoders: list[tuple[Modality, str, Card, tuple[View, ...], Sequence[str]]] = [
        *(
            ("image", ref, image_encoder(ref, config.precision).card, config.views, image_outputs)
            for ref in config.images
        ),
        *(("text", ref, text_encoder(ref, config.precision).card, ("plain",), text_outputs) for ref in config.texts),
    ]
    for modality, reference, card, views, wanted in encoders:
        safe = re.sub(r"[^A-Za-z0-9_-]", "-", card.name)
        for output, which in itertools.product(_outputs(card, reference, wanted), views):
            name = f"{safe}.{output.name}" + ("" if which == "plain" else f".{which}")
            ingredients = {
                "format": FORMAT_VERSION,
                "dataset": dataset.id,
                "encoder": card.name,
                "weights": card.weights,
                "preprocessing": card.preprocessing,
                "output": output.name,
                "view": which,
                "dtype": output.dtype,
            }
            folder = column_folder(dataset, name, identity(ingredients))
            planned.append(PlannedColumn(name, modality, reference, output, which, ingredients, folder))
    for wanted, modality in ((image_outputs, "image"), (text_outputs, "text")):
        for name in wanted:
            encoder, _, output_name = name.rpartition(".")
            found = (c for c in planned if c.modality == modality and c.output.name == output_name)
            if not any(not encoder or c.ingredients["encoder"] == encoder for c in found):
                given = ", ".join(
                    f"{card.name} ({', '.join(output.name for output in card.outputs)})"
                    for kind, _, card, _, _ in encoders
                    if kind == modality
                )
                raise CacheError(f"no {modality} encoder gives {name!r}; the run has {given}")
    return planned


def _finished(column: PlannedColumn, number: int, rows: int) -> ShardRecord | None:
    """The record of a shard that an earlier job finished; one of other boundaries does not count."""
    record = read_record(column.folder / f"{number:06d}.json")
    return record if record is not None and record.rows == rows else None


def _shard_tasks(dataset: Dataset, config: FeaturizeConfig, missing: Sequence[PlannedColumn]) -> Iterator[ShardTask]:
    def group(column: PlannedColumn) -> tuple[str, str, str]:
        return column.modality, column.encoder, column.view

    for _, columns in itertools.groupby(sorted(missing, key=group), key=group):
        together = list(columns)
        first = together[0]
        opener = image_encoder if first.modality == "image" else text_encoder
        for number, start in enumerate(range(0, len(dataset.samples), config.rows_per_shard)):
            samples = dataset.samples[start : start + config.rows_per_shard]
            rows = len(samples) if first.modality == "image" else sum(len(s.captions) for s in samples)
            targets = tuple(
                (column.output.name, column.output.ragged, column.folder)
                for column in together
                if _finished(column, number, rows) is None
            )
            if targets:
                yield ShardTask(
                    first.modality,
                    first.encoder,
                    opener(first.encoder, config.precision).card,
                    config.precision,
                    first.view,
                    number,
                    samples,
                    targets,
                    config.image_batch if first.modality == "image" else config.text_batch,
                    rows,
                    config.decode_timeout,
                )


def featurize(dataset: Dataset, config: FeaturizeConfig, columns: Sequence[PlannedColumn]) -> list[Manifest]:
    """Extract whatever of the planned columns is not in the cache yet, one Ray task a shard; Ray is initialised.

    Finished columns and finished shards of unfinished ones are left as they are. Prints one line on what was found,
    shows one progress bar, in rows, and sums up at the end what could not be used.

    Raises:
        CacheError: too many images could not be decoded; what was extracted stays.
    """
    import ray

    manifests = {column.name: read_manifest(column.folder) for column in columns}
    missing = [column for column in columns if manifests[column.name] is None]
    for column in missing:
        column.folder.mkdir(parents=True, exist_ok=True)
    tasks = list(_shard_tasks(dataset, config, missing))
    total = sum(task.rows for task in tasks)
    print(
        f"cache {dataset.folder}: {len(columns) - len(missing)} columns found, {total} rows to extract",
        flush=True,
    )
    if tasks:
        remote = ray.remote(extract_shard).options(
            num_cpus=config.cpus_per_task, num_gpus=config.gpus_per_task, runtime_env={"env_vars": WORKER_ENV}
        )
        running = {remote.remote(task): task for task in tasks}
        with tqdm(total=total, unit="rows", desc="extract", smoothing=0.05) as bar:
            while running:
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    ray.get(reference)
                    bar.update(running.pop(reference).rows)
    for column in missing:
        count = -(-len(dataset.samples) // config.rows_per_shard)
        records = [read_record(column.folder / f"{number:06d}.json") for number in range(count)]
        manifest = make_manifest(
            column.name,
            column.modality,
            column.ingredients,
            {"dtype": column.output.dtype, "shape": column.output.shape, "ragged": column.output.ragged},
            [record for record in records if record is not None],
        )
        if len(manifest.shards) != count:
            raise CacheError(f"{column.folder}: {count - len(manifest.shards)} of {count} shards vanished; run again")
        manifest.write(column.folder)
        manifests[column.name] = manifest
    finished = [manifest for manifest in manifests.values() if manifest is not None]
    undecoded = write_quarantine(dataset, finished)
    problems = [*dataset.quarantine, *undecoded]
    if problems:
        print(summary(dataset, problems, config.max_quarantined), flush=True)
    lost = lost_images(dataset)
    check_quarantine(problems, len(undecoded) + lost, len(dataset.samples) + lost, config.max_quarantined)
    return finished
