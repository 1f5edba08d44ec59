"""Extraction: one task describes one shard of images or captions and writes it for every output that is missing.

`extract_shard` is a plain function on plain records; `featurize.fill` decides what is missing and hands it to Ray.
"""

import collections
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featurize.config import View
from featurize.datasets.sample import Sample
from featurize.describe import describe_images, describe_texts, device, image_encoder, text_encoder
from featurize.encoder import Card, Output, first_line
from featurize.images.decode import DecodeError, decode
from featurize.images.decoder import Decoder, ends_after
from featurize.images.views import view
from featurize.imports import ImportedRows, open_import
from featurize.manifest import (
    CacheError,
    Modality,
    ShardRecord,
    read_manifest,
    shard_path,
    write_record,
)
from featurize.places import Place, found, is_full, publish, remove_file
from featurize.shards import Array, largest_number, row_key, to_int8, write_shard
from featurize.sharing import KnownRow, is_sound, read_row

# One core a worker, and an allocator that keeps the pages of large activations instead of giving them back to the
# system after every layer: 3 to 4 times as fast on a CPU (benchmarks/bench_extraction.py).
WORKER_ENV = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


_DECODING = 8  # threads beside a GPU
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """One tar that a task writes.

    Attributes:
        output: which of the encoder's outputs.
        folder: of the column.
        known: for each row where it stands already, or None; empty: no row does.
    """

    output: Output
    folder: Place
    known: tuple[KnownRow | None, ...] = ()

    def known_at(self, row: int) -> KnownRow | None:
        """Where a row stands already, or None."""
        return self.known[row] if self.known else None


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
        digests: sha256 of each image's bytes, as it was indexed.
        targets: what to write.
        batch: rows in a forward pass.
        decode_timeout: seconds that decoding one image may take.
        imported: where a file holds the rows; None: a network describes them.
    """

    modality: Modality
    encoder: str
    card: Card
    precision: Literal["bfloat16", "float32"]
    view: View
    number: int
    samples: tuple[Sample, ...]
    digests: tuple[str, ...]
    targets: tuple[Target, ...]
    batch: int
    decode_timeout: float
    imported: ImportedRows | None = None

    @property
    def keys(self) -> list[str]:
        """The tar key of each row."""
        if self.modality == "image":
            return [row_key(sample.image_id) for sample in self.samples]
        return [row_key(s.image_id, number) for s in self.samples for number in range(len(s.captions))]

    @property
    def unknown(self) -> list[int]:
        """The rows that some target has to be told."""
        return [row for row in range(len(self.keys)) if any(target.known_at(row) is None for target in self.targets)]


@dataclass(frozen=True)
class Described:
    """What an encoder said of some rows of a shard: values by output and row, and reasons where there are none."""

    values: Mapping[str, Mapping[int, Array]]
    failed: Mapping[int, str]


def extract_shard(task: ShardTask) -> dict[str, ShardRecord]:
    """Describe one shard's rows and publish a tar for each target; returns column folder -> record.

    A row whose image cannot be decoded, or is not in an imported file, is written as NaN (empty, where rows differ in
    length) and noted in the record: rows keep their places.

    Raises:
        CacheError: this machine opens another network under the same reference than the driver did, the disk is full,
            or a batch is too large for the GPU.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    targets = tuple(replace(target, known=tuple(map(_if_sound, target.known))) for target in task.targets)
    task = replace(task, targets=targets)
    begun = task.targets[0].folder / f".{task.number:06d}.begun.tmp"
    careful = bool(found(begun.parent, begun.name))  # a worker began here and did not live to say how it went
    try:
        publish(begun, b"")
        described = describe(task, task.unknown, careful=careful) if task.unknown else Described({}, {})
        return {str(target.folder): _write(task, target, described) for target in task.targets}
    except OSError as error:
        if not is_full(error):
            raise
        folder, room = task.targets[0].folder, "free some space (`python -m pipeline cache gc`)"
        if not isinstance(folder, Path):
            room = f"free some space in {tempfile.gettempdir()}, where a shard is written first, or set TMPDIR"
        raise CacheError(
            f"{folder}: no room for shard {task.number} ({error.strerror}); what is finished stays: {room} and run the "
            "same command again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise CacheError(
            f"{task.encoder}: a batch does not fit in the GPU's memory ({first_line(error)}); lower "
            f"--featurize.{task.modality}_batch, which is {task.batch}, and run the same command again"
        ) from error
    finally:
        remove_file(begun)


def describe(task: ShardTask, rows: Sequence[int], *, careful: bool) -> Described:
    """What a task's encoder says of some of its rows, on this process's device.

    Args:
        task: whose rows.
        rows: which of them.
        careful: decode in a process of its own, which costs a few per cent of extraction, so that an image that hangs
            or crashes its decoder costs its row alone; otherwise it ends this process.

    Raises:
        CacheError: this machine opens another network under the same reference than the task names.
        featurize.datasets.sample.DataError: an imported file holds values that cannot be stored.
    """
    if task.imported is not None:
        return _read_imported(task, rows, task.imported)
    if task.modality == "text":
        return _describe_texts(task, rows)
    return _describe_images(task, rows, _own_process(task.decode_timeout).decode if careful else _in_time(task))


def _if_sound(known: KnownRow | None) -> KnownRow | None:
    return known if known is not None and is_sound(known.donor) else None


def _write(task: ShardTask, target: Target, described: Described) -> ShardRecord:
    """Publish one target's shard, then its record; an older record goes first, so that it never lies."""
    if not isinstance(target.folder, Path) and (finished := read_manifest(target.folder)) is not None:
        return finished.shards[task.number]  # by a job that took this one's lease over: its bytes are promised now
    path, keys = shard_path(target.folder, task.number), task.keys
    failed: dict[int, str] = {}

    def row_values(row: int) -> Array:
        known = target.known_at(row)
        if row in described.failed or (known and known.reason):
            failed[row] = known.reason if known and known.reason else described.failed[row]
            return _as_stored(_absent(target.output), target.output)
        if known:
            return _as_stored(read_row(known), target.output)
        values = described.values[target.output.name][row]
        if task.imported is None and (problem := _not_finite(task, keys[row], values, target.output)):
            failed[row] = problem
            values = _absent(target.output)
        return _as_stored(values, target.output)

    remove_file(path.with_suffix(".json"))
    file = write_shard(path, keys, map(row_values, range(len(keys))), ragged=target.output.ragged)
    record = ShardRecord(file.rows, file.size, file.sha256, tuple(failed), tuple(failed.values()))
    write_record(target.folder, task.number, record)
    return record


def _not_finite(task: ShardTask, key: str, values: Array, output: Output) -> str:
    """Why a network's answer for an image cannot be stored; "" if it can.

    Raises:
        CacheError: it is beyond the type, as others will be; or it is a caption's, and every caption must have values.
    """
    if output.dtype == "int32":
        return ""
    largest = float(np.abs(values).max(initial=0.0))  # NaN if one is
    limit = largest_number(output.dtype)
    if largest <= limit:
        return ""
    who = f"{task.encoder} says"
    if np.isfinite(largest):
        raise CacheError(
            f"{who} {largest:g} in {output.name!r} of {key}, beyond the {limit:g} that can be stored as "
            f"{output.dtype}; store its features with --featurize.storage float32"
        )
    problem = f"EncoderError: {who} {'NaN' if np.isnan(largest) else 'infinity'} in {output.name!r}"
    if task.modality == "text":
        raise CacheError(
            f"{problem} of the caption {key}, and every caption must have values; try --featurize.precision float32, "
            "or leave the caption out"
        )
    return problem


def _absent(output: Output) -> Array:
    """What stands for a row that could not be described: nothing in a ragged column, NaN in a fixed one."""
    return np.full((0, *output.shape) if output.ragged else output.shape, np.nan, np.float16)


def _as_stored(values: Array, output: Output) -> Array:
    """As a column holds them; int8 is made of float16, so that it does not matter whether that was cached before."""
    return to_int8(values.astype(np.float16)) if output.dtype == "int8" else values.astype(output.dtype)


def _check_card(task: ShardTask, card: Card) -> None:
    if card != task.card:
        raise CacheError(
            f"{task.encoder}: this worker opens {card}, the driver opened {task.card}; every machine must hold the "
            "same weights and support the same precision (--featurize.precision float32 is supported by all)"
        )


def _describe_texts(task: ShardTask, rows: Sequence[int]) -> Described:
    encoder = text_encoder(task.encoder, task.precision)
    _check_card(task, encoder.card)
    captions = [caption for sample in task.samples for caption in sample.captions]
    answers = describe_texts(encoder, [captions[row] for row in rows], task.batch)
    return Described({name: dict(zip(rows, values, strict=True)) for name, values in answers.items()}, {})


def _read_imported(task: ShardTask, rows: Sequence[int], imported: ImportedRows) -> Described:
    features = open_import(task.encoder, task.modality, imported.cache)
    _check_card(task, features.card)
    outputs = [target.output for target in task.targets] or task.card.outputs
    answers, failed = features.read(outputs, [imported.places[row] for row in rows])
    values = {name: dict(zip(rows, found, strict=True)) for name, found in answers.items()}
    return Described(values, {rows[place]: reason for place, reason in failed.items()})


def _read_indexed(sample: Sample, digest: str) -> bytes:
    data = sample.read()
    if hashlib.sha256(data).hexdigest() != digest:
        raise OSError(f"{sample.image} changed after it was indexed; run `featurize` again for another version")
    return data


@functools.lru_cache(maxsize=1)
def _own_process(timeout: float) -> Decoder:
    """This process's decoder; its children stay for the shards to come."""
    return Decoder(timeout)


def _in_time(task: ShardTask) -> Callable[[bytes], Image.Image]:
    def opened(data: bytes) -> Image.Image:
        with ends_after(task.decode_timeout):
            return decode(data)

    return opened


def _ahead(pool: Executor, make: Callable[[int], T], rows: Sequence[int], most: int) -> Iterator[T]:
    """What is made of each row, in order, by other threads; no more than `most` are made before they are asked for."""
    begun = collections.deque(pool.submit(make, row) for row in rows[:most])
    for row in rows[most:]:
        yield begun.popleft().result()
        begun.append(pool.submit(make, row))
    yield from (one.result() for one in begun)


def _describe_images(task: ShardTask, rows: Sequence[int], opened: Callable[[bytes], Image.Image]) -> Described:
    encoder = image_encoder(task.encoder, task.precision)
    _check_card(task, encoder.card)
    failed: dict[int, str] = {}

    def prepare(row: int) -> Tensor | None:
        sample = task.samples[row]
        try:
            picture = opened(_read_indexed(sample, task.digests[row]))
            return encoder.prepare(view(picture, task.view, sample.image_id))
        except (DecodeError, OSError) as error:
            failed[row] = f"{type(error).__name__}: {error}"
            return None

    with ThreadPoolExecutor(_DECODING) as pool:
        prepared = map(prepare, rows) if device() == "cpu" else _ahead(pool, prepare, rows, 2 * task.batch)
        answers = describe_images(encoder, (image for image in prepared if image is not None), task.batch)
    good = [row for row in rows if row not in failed]
    return Described({name: dict(zip(good, values, strict=True)) for name, values in answers.items()}, failed)
