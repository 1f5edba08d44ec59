"""Columns of a data set, opened only if they are what they must be."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from featurize.index import Dataset
from featurize.manifest import CacheError, Manifest, Modality, read_manifest
from featurize.places import Place, folders, found
from featurize.remote import RemoteShards
from featurize.shards import Column, Shard, ShardError, row_key


def column_folder(dataset: Dataset, name: str, column_id: str) -> Place:
    """Where a column lives."""
    return dataset.folder / f"{name}@{column_id[:8]}"


def column_folders(dataset_folder: Place) -> list[Place]:
    """Every column of a data set, finished or not."""
    return [folder for folder in folders(dataset_folder) if "@" in folder.name]


def open_column(dataset: Dataset, name: str, column_id: str) -> Column:
    """Open a finished column by what it must be.

    Raises:
        CacheError: it is missing, was made for another data set or by another encoder, or is damaged.
    """
    folder = column_folder(dataset, name, column_id)
    manifest = read_manifest(folder)
    if manifest is None:
        others = [path.name for path in found(dataset.folder, f"{name}@*") if path != folder]
        also = f" (there is {', '.join(others)}, of another identity)" if others else ""
        raise CacheError(f"{folder}: not in the cache{also}; run `python -m pipeline featurize` first")
    if manifest.id != column_id:
        raise CacheError(
            f"{folder}: holds identity {manifest.id}, expected {column_id}: two columns whose identities begin "
            "alike; remove this one and run `featurize` again"
        )
    of = str(manifest.ingredients.get("dataset"))
    if of != dataset.id:
        raise CacheError(f"{folder}: was made for the data set {of[:8]}, but stands in {dataset.id[:8]}; remove it")
    expected = dataset.rows(manifest.modality)
    if manifest.rows != expected:
        raise CacheError(f"{folder}: {manifest.rows} rows, but the data set has {expected}; run `featurize` again")
    keys = row_keys(dataset, manifest.modality)
    starts = manifest.starts

    def check(number: int, shard: Shard) -> None:
        if problem := misplaced(shard, keys[starts[number] : starts[number + 1]], [0, shard.rows - 1]):
            raise CacheError(problem)

    try:
        return mapped(folder, manifest, check)
    except ShardError as error:
        raise CacheError(str(error)) from error


def mapped(folder: Place, manifest: Manifest, check: Callable[[int, Shard], None] | None = None) -> Column:
    """A finished column's shards as arrays: local ones are opened now, remote ones when their rows are asked for.

    Args:
        folder: of the column.
        manifest: of the column.
        check: called with the number of a shard and the shard when it is opened; raises if it is not the one.

    Raises:
        ShardError: a local shard is not what the manifest says.
    """
    rows = [shard.rows for shard in manifest.shards]
    if not isinstance(folder, Path):
        shards = RemoteShards(folder, manifest, check)
        return Column(manifest.name, folder, rows, ragged=manifest.ragged, shards=shards)
    column = Column(manifest.name, folder, rows, ragged=manifest.ragged)
    if check is not None:
        for number in range(len(rows)):
            check(number, column.shards[number])
    return column


def row_keys(dataset: Dataset, modality: Modality) -> list[str]:
    """The tar key of every row of a column."""
    if modality == "image":
        return [row_key(sample.image_id) for sample in dataset.samples]
    return [row_key(s.image_id, number) for s in dataset.samples for number in range(len(s.captions))]


def misplaced(shard: Shard, keys: Sequence[str], rows: Iterable[int]) -> str:
    """What is wrong with the order of a shard's rows, "" if nothing is.

    Args:
        shard: of a column.
        keys: what its rows should be called.
        rows: those to look at.
    """
    for row in rows:
        if shard.key(row) != keys[row]:
            return (
                f"{shard.path}: row {row} belongs to {shard.key(row)!r}, expected {keys[row]!r}; the shard is another "
                "data set's or out of order: `python -m pipeline cache repair` makes it again"
            )
    return ""
