"""Keeping a cache: who used what, why two things differ, making again what is broken, freeing what nobody needs."""

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from featurize.columns import column_folders
from featurize.config import FeaturizeConfig
from featurize.datasets.sample import DataError
from featurize.encoder import EncoderError
from featurize.fill import fill
from featurize.index import Dataset, open_dataset
from featurize.leases import LOCK, held, is_held
from featurize.manifest import CacheError, Manifest, differences, read_begun, read_manifest, read_record
from featurize.places import File, Place, files, folders, found, make_folder, publish, read, remove_file, remove_folder
from featurize.plan import PlannedColumn, encoder_card, imported_rows
from featurize.verify import Problem, require_unchanged


@dataclass(frozen=True)
class Use:
    """A run that reads a data set.

    Attributes:
        run: its folder.
        time: when it began, ISO 8601 in UTC.
        columns: folder names of the columns that it reads.
        machine: where the run is: others may not see its folder. "" in what earlier versions noted on disks.
    """

    run: str
    time: str
    columns: tuple[str, ...]
    machine: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether the run is another machine's, and not seen here."""
        return self.machine not in ("", platform.node()) and not Path(self.run).is_dir()

    @property
    def exists(self) -> bool:
        """Whether the run is still there, as far as one can tell from here."""
        return self.elsewhere or Path(self.run).is_dir()


def note_use(dataset: Dataset, run: Path, columns: Iterable[tuple[str, str]]) -> None:
    """Remember in the cache that a run reads these columns, (name, identity) each: `gc` keeps them."""
    names = tuple(sorted(f"{name}@{column_id[:8]}" for name, column_id in columns))
    machine = platform.node()
    use = Use(str(run), datetime.now(UTC).isoformat(timespec="seconds"), names, machine)
    folder = dataset.folder / "uses"
    make_folder(folder)
    name = hashlib.sha256(f"{machine}{run}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    publish(folder / f"{name}.json", json.dumps(asdict(use)).encode())


def uses(dataset_folder: Place) -> list[Use]:
    """The runs that read a data set, oldest first, whether or not they are still there.

    Raises:
        CacheError: what a run noted cannot be read.
    """
    return sorted(map(_use, found(dataset_folder, "uses/*.json")), key=lambda use: use.time)


def _use(path: Place) -> Use:
    try:
        plain = json.loads(read(path))
        return Use(**{**plain, "columns": tuple(plain["columns"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(
            f"{path}: damaged ({error}), so nobody knows which run reads this data set; remove it if its run is gone"
        ) from error


def explain(one: Place, other: Place) -> list[str]:
    """In what two columns, or two data sets, differ: one line for each ingredient.

    Raises:
        CacheError: they are not two columns or two data sets of a cache.
    """
    columns = [read_manifest(folder) or read_begun(folder) for folder in (one, other)]
    if columns[0] is not None and columns[1] is not None:
        first, second = ({"column": column.name, **column.ingredients} for column in columns if column)
        found = differences(first, second)
        if first["dataset"] != second["dataset"]:
            found += _versions(open_dataset(one.parent), open_dataset(other.parent))
        beside = differences(columns[0].environment, columns[1].environment, "environment.")
        return [*found, *(f"{line} (no part of the identity)" for line in beside)]
    if all((folder / "samples.parquet").exists() for folder in (one, other)):
        return list(_versions(open_dataset(one), open_dataset(other)))
    raise CacheError(
        f"found {one} and {other}, expected the folders of two columns (<cache>/<data set>@<id>/<column>@<id>) or of "
        "two data sets (<cache>/<data set>@<id>)"
    )


_NAME = re.compile(".+@[0-9a-f]{8}")


def dataset_folders(cache: Place) -> list[Place]:
    """The data sets of a cache, also those whose index is gone: their columns still take room."""
    if isinstance(cache, Path) and not cache.is_dir():
        return []
    return [
        folder
        for folder in folders(cache)
        if _NAME.fullmatch(folder.name)
        and (
            (folder / "samples.parquet").exists()
            or any(_NAME.fullmatch(column.name) for column in column_folders(folder))
        )
    ]


def _versions(one: Dataset, other: Dataset) -> Iterator[str]:
    """How two versions of a data set differ, with a few examples each."""
    sides = [
        {s.image_id: (digest, s.captions, s.split) for s, digest in zip(side.samples, side.digests, strict=True)}
        for side in (one, other)
    ]
    both = [image_id for image_id in sides[0] if image_id in sides[1]]
    changes: Mapping[str, list[str]] = {
        "images only in the first": [image_id for image_id in sides[0] if image_id not in sides[1]],
        "images only in the second": [image_id for image_id in sides[1] if image_id not in sides[0]],
        **{
            text: [image_id for image_id in both if sides[0][image_id][place] != sides[1][image_id][place]]
            for place, text in enumerate(("images with other bytes", "images with other captions", "other splits"))
        },
    }
    for text, ids in changes.items():
        if ids:
            yield f"{text}: {len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
    if both != [image_id for image_id in sides[1] if image_id in sides[0]]:
        yield "the order of the images"


REFUSALS = (CacheError, DataError, EncoderError, OSError)
"""What is raised where a column cannot be described again here: a text that tells the user why."""


def repair(dataset: Dataset, problems: Iterable[Problem], config: FeaturizeConfig) -> tuple[list[Place], list[Problem]]:
    """Make again the shards that are broken, and go on with columns that are unfinished; Ray is initialised.

    Args:
        dataset: the index; its images must be where they were.
        problems: that `verify` found.
        config: how to extract; encoders and precision are those that made the columns.

    Returns:
        The columns that were mended; and why others cannot be made here, which are left as they are. Those whose
        problems have no shard are in neither list.

    Raises:
        CacheError: a column that was given up could not be made again; the next repair goes on with it.
    """
    broken: dict[Place, set[int]] = {}
    for problem in problems:
        if problem.mendable:
            broken.setdefault(problem.folder, set()).update([] if problem.shard is None else [problem.shard])
    columns, refused = [], []
    finished: dict[Place, Manifest] = {}
    for folder, numbers in broken.items():  # all are looked at before any is given up
        try:
            manifest = read_manifest(folder)
            columns.append(_remade(dataset, folder, manifest, numbers))
        except REFUSALS as error:
            refused.append(Problem.of(folder, error))
        else:
            if manifest is not None:
                finished[folder] = manifest
    with held(*finished):
        for folder, manifest in finished.items():
            if read_manifest(folder) == manifest:  # else another job is or was at it
                manifest.reopen(folder, sound=set(range(len(manifest.shards))) - broken[folder])
    if columns:
        fill(dataset, config, columns, thorough=True)  # what is broken here may be broken where it came from
    return [column.folder for column in columns], refused


def _remade(dataset: Dataset, folder: Place, manifest: Manifest | None, numbers: set[int]) -> PlannedColumn:
    """A column that can be made again on this machine.

    Args:
        dataset: the index.
        folder: of the column.
        manifest: of the column; None: it is unfinished.
        numbers: of the broken shards of a finished one.

    Raises:
        CacheError: an encoder is not the one that made the column, or an image is not the one that was indexed.
        EncoderError: an encoder cannot be opened.
        DataError: a file of features has other rows.
        OSError: a file cannot be read.
    """
    begun = manifest or read_begun(folder)
    if begun is None:
        raise CacheError(f"{folder}: vanished while it was looked at; run `cache repair` again")
    column = PlannedColumn.of(folder, begun)
    encoder_card(column)
    if imported_rows(dataset, column) is None and column.modality == "image":
        for number, first in enumerate(range(0, len(dataset.samples), begun.images_per_shard)):
            lost = manifest.shards[number].quarantined if manifest else ()
            if number in numbers or (manifest is None and read_record(folder, number) is None):
                rows = range(first, min(first + begun.images_per_shard, len(dataset.samples)))
                asked = [row for row in rows if row - first not in lost]
                require_unchanged([dataset.samples[row] for row in asked], [dataset.digests[row] for row in asked])
    return column


@dataclass(frozen=True)
class Removable:
    """A folder that no run needs.

    Attributes:
        folder: of a column, or of a data set of which nothing is needed.
        size: bytes that it alone takes: a shard that another version shares frees nothing.
        reason: why it may go.
    """

    folder: Place
    size: int
    reason: str


def is_busy(dataset_folder: Place) -> bool:
    """Whether a job makes a column of a data set."""
    return any(is_held(folder, time.time()) for folder in column_folders(dataset_folder))


def removable(dataset_folder: Place, days: float) -> list[Removable]:
    """What no run refers to and nobody has touched for some days.

    A column is kept while a run that reads it exists, and until it is `days` old; a data set while one of its columns
    or a run is kept. While a job makes a column all are kept: it may read the others, and notes that at its end.
    """
    every = uses(dataset_folder)
    last = {name: use for use in every for name in use.columns}
    alive = {name for use in every if use.exists for name in use.columns}
    columns = column_folders(dataset_folder)
    if is_busy(dataset_folder):
        return []
    removed = []
    for folder in columns:
        inside = files(folder)
        age = _age(folder, inside)
        if folder.name in alive or age < days:
            continue
        state = _state(folder)
        use = f"its last run, {last[folder.name].run}, is gone" if folder.name in last else "no run reads it"
        removed.append(Removable(folder, _own_bytes(inside), f"{state}{use}; {age:.0f} days old"))
    inside = files(dataset_folder)
    age = _age(dataset_folder, [file for file in inside if file.name == "samples.parquet"])
    if len(removed) == len(columns) and age >= days and not any(use.exists for use in every):
        size = _own_bytes(inside) + sum(one.size for one in removed)
        return [Removable(dataset_folder, size, f"no run reads any of its {len(columns)} columns; {age:.0f} days old")]
    return removed


def _state(folder: Place) -> str:
    try:
        return "" if read_manifest(folder) else "unfinished, "
    except CacheError:
        return "damaged, "


_DAY = 24 * 60 * 60


def _age(folder: Place, inside: Iterable[File]) -> float:
    """Days since a column last changed; locks do not count, for looking at them touches them."""
    changed = [file.modified for file in inside if file.name != LOCK]
    if not changed and isinstance(folder, Path):
        changed = [folder.stat().st_mtime]
    return (time.time() - max(changed)) / _DAY if changed else math.inf


def _own_bytes(inside: Iterable[File]) -> int:
    return sum(file.size for file in inside if not file.shared)


def remove(what: Iterable[Removable]) -> None:
    """Free what `removable` found. Manifests and indexes go first: what is half removed does not look whole."""
    for one in what:
        for pattern in ("samples.parquet", "manifest.json", "*/manifest.json"):
            for sign in found(one.folder, pattern):
                remove_file(sign)
        remove_folder(one.folder)
