"""Filling the cache: which shards are missing, who makes them, and what is said when it is done.

One Ray task makes one shard (`featurize.extract`). A job may die at any point: what is finished stays, and the same
command goes on.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featurize.columns import column_folders
from featurize.config import FeaturizeConfig
from featurize.encoder import first_line
from featurize.extract import WORKER_ENV, ShardTask, Target, extract_shard
from featurize.imports import ImportedRows, is_import
from featurize.index import Dataset
from featurize.leases import clear_temporary, held
from featurize.manifest import (
    CacheError,
    Manifest,
    read_begun,
    read_manifest,
    read_record,
    shard_path,
    touch,
    write_record,
)
from featurize.places import Place
from featurize.plan import PlannedColumn, encoder_card, imported_rows
from featurize.quarantine import Quarantined, check_quarantine, write_quarantine
from featurize.resources import OWN, cluster_has, require_resources, room_for
from featurize.sharing import Donor, KnownRow, is_sound, known_rows, link, rows_of
from featurize.summary import lost_images, summary

_PATIENCE = 60.0
"""Seconds that shards have to be written to their end once the job has failed."""
_SUBMITTED = 64
"""Tasks that a cluster is given at least: enough to see that it should grow, few enough to stay in memory."""


@dataclass(frozen=True)
class _Shard:
    """A shard that is to be made, of one column."""

    column: PlannedColumn
    number: int
    images: slice
    known: tuple[KnownRow | None, ...]

    @property
    def together(self) -> tuple[object, ...]:
        """Shards for which this is equal are described by one task: one pass of the network serves all outputs."""
        everything = bool(self.known) and None not in self.known
        alone = self.column.name if everything else ""  # nothing to describe: no pass to share
        return self.column.modality, self.column.encoder, self.column.view, self.number, str(self.images), alone


def _missing_shards(
    dataset: Dataset, column: PlannedColumn, images_per_shard: int, *, retry: bool, thorough: bool
) -> tuple[list[_Shard], int]:
    """The shards of an unfinished column that are to be made.

    Returns:
        Those that are neither finished nor another shard under a new name; how many rows, in all that was not
        finished, stand elsewhere already.
    """
    known = [] if is_import(column.encoder) else known_rows(dataset, column)  # a file's rows may be told by position
    missing: list[_Shard] = []
    start, taken = 0, 0
    for number, first in enumerate(range(0, len(dataset.samples), images_per_shard)):
        images = slice(first, first + images_per_shard)
        samples = dataset.samples[images]
        rows = len(samples) if column.modality == "image" else sum(len(sample.captions) for sample in samples)
        record = read_record(column.folder, number)
        here = known[start : start + rows]
        start += rows
        if record is not None and record.rows == rows:
            if not (retry and record.quarantined):
                continue
            here = [
                *rows_of(Donor(shard_path(column.folder, number), record, column.output.ragged, column.output.dtype))
            ]
        if retry:
            here = [None if row is None or row.reason else row for row in here]
        if thorough or isinstance(column.folder, Path):  # what is in a store is compared when it is fetched
            here = [row if row and is_sound(row.donor) else None for row in here]
        taken += len(here) - here.count(None)
        found = link(shard_path(column.folder, number), here, column.output.dtype)
        if found is None:
            missing.append(_Shard(column, number, images, tuple(here)))
        else:
            write_record(column.folder, number, found)
    return missing, taken


def tasks_for(
    dataset: Dataset, config: FeaturizeConfig, columns: Sequence[PlannedColumn], *, thorough: bool = False
) -> tuple[list[ShardTask], int]:
    """What is to be done for columns that are not finished; they are begun, and shards that need no task are linked.

    Args:
        dataset: the index.
        config: batch and shard sizes, and whether quarantined rows are tried again.
        columns: to be made by this job alone.
        thorough: whether shards of a store, too, are compared before their rows count as known.

    Returns:
        One task for each shard that is missing, for all outputs of one network that miss it; and how many of the
        missing rows are known already.
    """
    by_encoder = {(column.modality, column.encoder): column for column in columns}
    imported = {key: imported_rows(dataset, column) for key, column in by_encoder.items()}  # before any is begun
    groups: dict[tuple[object, ...], list[_Shard]] = {}
    rows = 0
    for column in columns:
        begun = _begin(column, config.rows_per_shard)
        shards, known = _missing_shards(
            dataset, column, begun.images_per_shard, retry=config.retry_quarantined, thorough=thorough
        )
        rows += known
        for shard in shards:
            groups.setdefault(shard.together, []).append(shard)
    described = {first.column.name: first.column for first, *_ in groups.values()}
    cards = {name: encoder_card(column) for name, column in described.items()}
    tasks = [
        ShardTask(
            first.column.modality,
            first.column.encoder,
            cards[first.column.name],
            first.column.precision,
            first.column.view,
            first.number,
            dataset.samples[first.images],
            dataset.digests[first.images],
            tuple(Target(shard.column.output, shard.column.folder, shard.known) for shard in (first, *others)),
            config.image_batch if first.column.modality == "image" else config.text_batch,
            config.decode_timeout,
            _imported(dataset, first, imported[first.column.modality, first.column.encoder]),
        )
        for first, *others in groups.values()
    ]
    return tasks, rows


def _imported(dataset: Dataset, shard: _Shard, column: ImportedRows | None) -> ImportedRows | None:
    """Where a file holds the rows of a shard, from where it holds those of the column."""
    if column is None:
        return None
    images = range(len(dataset.samples))[shard.images]
    if shard.column.modality == "image":
        return column.part(images)
    return column.part(np.flatnonzero(np.isin(dataset.caption_image, images)).tolist())


def fill(
    dataset: Dataset, config: FeaturizeConfig, columns: Sequence[PlannedColumn], *, thorough: bool = False
) -> list[Manifest]:
    """Extract whatever of the planned columns is not in the cache yet, one Ray task a shard; Ray is initialised.

    Finished columns and finished shards of unfinished ones are left as they are; what another version of the data set
    holds is taken from there. Two jobs that need the same column take turns. Prints one line on what was found and
    shows one progress bar, in rows.

    Args:
        dataset: the index.
        config: how to extract.
        columns: that are needed.
        thorough: as in `tasks_for`.

    Raises:
        CacheError: too many images could not be decoded, the disk is full, or workers die; what was extracted stays.
    """

    def unfinished(column: PlannedColumn) -> bool:
        manifest = read_manifest(column.folder)
        return manifest is None or (config.retry_quarantined and bool(len(manifest.missing)))

    for column in columns:
        touch(column.folder)  # `gc` spares what is found while the rest is made
    with _locked([column.folder for column in columns if unfinished(column)]):
        missing = [column for column in columns if unfinished(column)]
        tasks, known = tasks_for(dataset, config, missing, thorough=thorough)
        rows = sum(len(task.unknown) for task in tasks)
        already = f", {known} rows are known already" if known else ""
        print(
            f"cache {dataset.folder}: {len(columns) - len(missing)} columns found, {rows} rows to extract{already}",
            flush=True,
        )
        if tasks:
            _run(tasks, config)
        for column in missing:
            _finish(dataset, column)
    return _checked(dataset, config, columns)


@contextmanager
def _locked(folders: Sequence[Place]) -> Iterator[None]:
    """The right to make columns, which is taken back from a process that dies; one job at a time has it."""
    with held(*folders):
        for folder in folders:
            clear_temporary(folder)
        yield


def _begin(column: PlannedColumn, images_per_shard: int) -> Manifest:
    """What an unfinished column is to become; one that was begun before keeps its shards' boundaries."""
    finished = read_manifest(column.folder)
    if finished is not None:  # with rows that are tried again
        finished.reopen(column.folder, sound=range(len(finished.shards)))
    begun = read_begun(column.folder) or column.manifest(images_per_shard)
    begun.begin(column.folder)
    return begun


def _run(tasks: Sequence[ShardTask], config: FeaturizeConfig) -> None:
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    _require_room(config)
    remote = ray.remote(extract_shard).options(
        num_cpus=config.cpus_per_task, num_gpus=config.gpus_per_task, runtime_env={"env_vars": variables(config)}
    )
    waiting = iter(tasks)
    running: dict[Any, ShardTask] = {}
    with tqdm(total=sum(len(task.unknown) for task in tasks), unit="rows", desc="extract", smoothing=0.05) as bar:
        try:
            while True:
                free = max(0, _places(config) - len(running))
                running |= {remote.remote(task): task for task in itertools.islice(waiting, free)}
                if not running:
                    break
                (done,), _ = ray.wait(list(running), num_returns=1)
                task = running.pop(done)
                ray.get(done)
                bar.update(len(task.unknown))
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            raise CacheError(
                f"{task.targets[0].folder}: workers die while they make shard {task.number} ({first_line(error)}); if "
                "memory is short, lower --featurize.image_batch or raise --featurize.cpus_per_task. What is finished "
                "stays: the same command goes on"
            ) from error
        finally:
            if running:  # a driver that ends kills them in the midst of a file, and Ray's `cancel` may crash the driver
                bar.write(f"the job ends when begun shards are written, in {_PATIENCE:.0f} seconds at the latest")
                ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE)


def variables(config: FeaturizeConfig) -> dict[str, str]:
    """The environment of a task: a thread for each core, and no GPU unless it asks for one, as Ray hides none then."""
    gpu = {} if config.gpus_per_task else {"CUDA_VISIBLE_DEVICES": ""}
    return {**WORKER_ENV, **gpu, "OMP_NUM_THREADS": str(max(1, int(config.cpus_per_task)))}


def _asked(config: FeaturizeConfig) -> dict[str, float]:
    return {"CPU": config.cpus_per_task, "GPU": config.gpus_per_task}


def _places(config: FeaturizeConfig) -> int:
    """How many tasks Ray is given: as many as run at once, so that none waits where nothing will grow."""
    at_once = room_for(_asked(config), most=1024)
    return max(1, at_once) if cluster_has(OWN) else max(_SUBMITTED, 2 * at_once)


def _require_room(config: FeaturizeConfig) -> None:
    require_resources(_asked(config), 1, "lower --featurize.cpus_per_task or --featurize.gpus_per_task", CacheError)
    if not config.gpus_per_task and (gpus := cluster_has("GPU")):
        print(f"Ray has {gpus:g} GPUs, and extraction uses none; --featurize.gpus_per_task 1 uses them", flush=True)


def _finish(dataset: Dataset, column: PlannedColumn) -> None:
    """Publish a column whose shards are all there, unless another job did: one that took this one's lease over."""
    begun = read_begun(column.folder)
    count = -(-len(dataset.samples) // begun.images_per_shard) if begun else 0
    records = [read_record(column.folder, number) for number in range(count)]
    whole = [record for record in records if record is not None]
    if begun is not None and len(whole) == count:
        replace(begun, shards=tuple(whole)).write(column.folder)
    elif read_manifest(column.folder) is None:
        raise CacheError(f"{column.folder}: {count - len(whole)} of {count} shards vanished; run again")


def _checked(dataset: Dataset, config: FeaturizeConfig, columns: Sequence[PlannedColumn]) -> list[Manifest]:
    """The finished columns, if not too much of them is missing; writes what is into the quarantine, and sums it up."""
    manifests = [manifest for column in columns if (manifest := read_manifest(column.folder)) is not None]
    everything = [manifest for folder in column_folders(dataset.folder) if (manifest := _if_readable(folder))]
    write_quarantine(dataset.folder, [*dataset.quarantine, *left_out(dataset, everything)])
    undescribed = {problem.image_id: problem for problem in left_out(dataset, manifests)}
    problems = [*dataset.quarantine, *undescribed.values()]
    if problems:
        print(summary(dataset, problems, config.max_quarantined), flush=True)
    lost = lost_images(dataset)
    total = len(dataset.samples) + lost
    check_quarantine(dataset.folder, problems, len(undescribed) + lost, total, config.max_quarantined)
    return manifests


def _if_readable(folder: Place) -> Manifest | None:
    """A finished column's manifest; a damaged one is the business of those who want that column."""
    try:
        return read_manifest(folder)
    except CacheError:
        return None


_STAGES = {"DecodeError": "decode", "EncoderError": "describe"}
"""At what an image failed, by the error that its row has for a reason."""


def left_out(dataset: Dataset, manifests: Iterable[Manifest]) -> list[Quarantined]:
    """What columns lack, in row order: one entry for an image and a reason, with the columns that lack it."""
    failed: dict[tuple[int, str, str], list[str]] = {}
    for manifest in manifests:
        images = manifest.missing if manifest.modality == "image" else dataset.caption_image[manifest.missing]
        for row, reason in zip(images.tolist(), manifest.reasons, strict=True):
            stage = "import" if is_import(manifest.reference) else _STAGES.get(reason.partition(":")[0], "read")
            failed.setdefault((row, stage, reason), []).append(manifest.name)
    return [
        Quarantined(dataset.samples[row].image_id, stage, reason, dataset.digests[row], tuple(sorted(names)))
        for (row, stage, reason), names in sorted(failed.items())
    ]
