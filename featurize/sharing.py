"""What versions of a data set have in common is not described again.

A row is known if a data set of the same cache holds a finished column of the same making with a row of the same key and
content: image bytes, or caption. Its values are copied; int8 columns are made of float16 ones too. A shard of which all
rows are known and stand in one shard, in the same order, is that shard: it becomes a second name (hard link) of the
same file.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from featurize.columns import row_keys
from featurize.copies import Node
from featurize.encoder import DType
from featurize.index import Dataset, open_dataset
from featurize.manifest import CacheError, Manifest, Modality, ShardRecord, identity, read_manifest, shard_path
from featurize.places import Place, found, fsync_folder
from featurize.places import link as second_name
from featurize.plan import PlannedColumn
from featurize.remote import open_remote
from featurize.shards import Array, Shard, ShardError

Stamp: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Donor:
    """A finished shard that rows are taken from.

    Attributes:
        path: of the tar.
        record: its record.
        ragged: whether rows differ in length.
        dtype: of what is stored.
    """

    path: Place
    record: ShardRecord
    ragged: bool
    dtype: DType


@dataclass(frozen=True)
class KnownRow:
    """Where a row's values stand already.

    Attributes:
        donor: the shard.
        row: in that shard.
    """

    donor: Donor
    row: int

    @property
    def reason(self) -> str:
        """Why the row holds no values; "" if it does."""
        record = self.donor.record
        return record.reasons[record.quarantined.index(self.row)] if self.row in record.quarantined else ""


def known_rows(dataset: Dataset, column: PlannedColumn) -> list[KnownRow | None]:
    """For each row of a column that is to be made, where the cache holds it, or None; [] if it holds none."""
    known: dict[tuple[str, str], KnownRow] = {}
    making = _making(column.ingredients)
    for folder in found(dataset.folder.parent, f"*@*/{column.name}@*"):
        try:
            manifest = read_manifest(folder)
            if manifest is None or _making(manifest.ingredients) != making:
                continue
            if manifest.dtype != column.output.dtype and (manifest.dtype, column.output.dtype) != ("float16", "int8"):
                continue
            other = open_dataset(folder.parent)
        except CacheError:  # another data set's damage is its own: what it held is described again
            continue
        if manifest.ingredients.get("dataset") != other.id or manifest.rows != other.rows(column.modality):
            continue  # it was brought here from another version: its rows are not those of the captions beside it
        rows = [row for donor in donors(folder, manifest) for row in rows_of(donor)]
        known.update(zip(_contents(other, column.modality), rows, strict=True))
    return [known.get(content) for content in _contents(dataset, column.modality)] if known else []


def donors(folder: Place, manifest: Manifest) -> list[Donor]:
    """A finished column's shards."""
    return [
        Donor(shard_path(folder, number), record, manifest.ragged, manifest.dtype)
        for number, record in enumerate(manifest.shards)
    ]


def rows_of(donor: Donor) -> list[KnownRow]:
    """All rows of a shard."""
    return [KnownRow(donor, row) for row in range(donor.record.rows)]


def _making(ingredients: object) -> str:
    assert isinstance(ingredients, dict)
    return identity({name: value for name, value in ingredients.items() if name not in ("dataset", "dtype")})


def _contents(dataset: Dataset, modality: Modality) -> list[tuple[str, str]]:
    """(key, content) of every row."""
    content = list(dataset.digests) if modality == "image" else dataset.captions
    return list(zip(row_keys(dataset, modality), content, strict=True))


def read_row(known: KnownRow) -> Array:
    """The values, a view of the mapped file."""
    return _opened(known.donor, _stamp(known.donor.path)).row(known.row)


def _stamp(path: Place) -> Stamp:
    """What changes with a local file's bytes, so that nothing is remembered of a file that was damaged or repaired."""
    if not isinstance(path, Path):
        return ()
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _opened(donor: Donor, stamp: Stamp) -> Shard:  # noqa: ARG001 - part of the cache's key
    if isinstance(donor.path, Path):
        return Shard(donor.path, donor.record.rows, ragged=donor.ragged)
    return open_remote(Node.here(), donor.path, donor.record, ragged=donor.ragged)


def is_sound(donor: Donor) -> bool:
    """Whether a shard still holds what its record says; damage is not handed on."""
    try:
        return _is_sound(donor, _stamp(donor.path))
    except OSError:
        return False


@functools.lru_cache(maxsize=4096)
def _is_sound(donor: Donor, stamp: Stamp) -> bool:
    try:
        shard = _opened(donor, stamp)  # a remote one is compared when it is fetched
        if not isinstance(donor.path, Path):
            return True
        return sha256_of(donor.path) == donor.record.sha256 and (not donor.ragged or shard.has_its_index())
    except (ShardError, CacheError):
        return False


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(path: Place, known: Sequence[KnownRow | None], dtype: DType) -> ShardRecord | None:
    """Let a shard be another one whose rows are the same, in the same order.

    Args:
        path: of the tar that is missing.
        known: where its rows stand.
        dtype: of what it is to hold.

    Returns:
        The shard's record; None if no single shard holds just these rows, or the file system knows no hard links.
    """
    first = known[0] if known else None
    if first is None or first.donor.dtype != dtype or list(known) != rows_of(first.donor):
        return None
    files = [(first.donor.path, path)]
    if first.donor.ragged:
        files.insert(0, (first.donor.path.with_suffix(".idx.npy"), path.with_suffix(".idx.npy")))
    for source, target in files:
        try:
            second_name(source, target)
        except OSError:
            return None
    if isinstance(path, Path):
        fsync_folder(path.parent)
    return first.donor.record
