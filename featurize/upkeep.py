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
from featurize.fill import fill
from featurize.index import Dataset, open_dataset
from featurize.leases import LOCK, is_held
from featurize.manifest import CacheError, differences, read_begun, read_manifest
from featurize.places import File, Place, files, folders, found, make_folder, publish, read, remove_file, remove_folder
from featurize.plan import PlannedColumn, encoder_card
from featurize.verify import Problem, require_unchanged


@dataclass(frozen=True)
class Use:
    """A run that reads a data set.

    Attributes:
        run: its folder.
        time: when it began, ISO 8601 in UTC.
        columns: folder names of the columns that it reads.
        machine: where the run is, if its cache is in a store: others do not see its folder.
    """

    run: str
    time: str
    columns: tuple[str, ...]
    machine: str = ""

    @property
    def exists(self) -> bool:
        """Whether the run is still there, as far as one can tell from here."""
        return self.machine not in ("", platform.node()) or Path(self.run).is_dir()


def note_use(dataset: Dataset, run: Path, columns: Iterable[tuple[str, str]]) -> None:
    """Remember in the cache that a run reads these columns, (name, identity) each: `gc` keeps them."""
    names = tuple(sorted(f"{name}@{column_id[:8]}" for name, column_id in columns))
    machine = "" if isinstance(dataset.folder, Path) else platform.node()
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


def repair(dataset: Dataset, problems: Iterable[Problem], config: FeaturizeConfig) -> list[Place]:
    """Make again the shards that are broken, and nothing else; Ray is initialised.

    Args:
        dataset: the index; its images must be where they were.
        problems: that `verify` found.
        config: how to extract; encoders and precision are those that made the columns.

    Returns:
        The columns that were mended; those whose problems have no shard are left as they are.

    Raises:
        CacheError: an encoder is not the one that made the column, or an image is not the one that was indexed.
    """
    broken: dict[Place, set[int]] = {}
    for problem in problems:
        if problem.shard is not None:
            broken.setdefault(problem.folder, set()).add(problem.shard)
    columns = []
    for folder, numbers in broken.items():
        manifest = read_manifest(folder)
        assert manifest is not None, "only finished columns have broken shards"
        column = PlannedColumn.of(folder, manifest)
        encoder_card(column)  # before anything is given up
        if manifest.modality == "image":
            for first in (number * manifest.images_per_shard for number in numbers):
                images = slice(first, first + manifest.images_per_shard)
                require_unchanged(dataset.samples[images], dataset.digests[images])
        manifest.reopen(folder, sound=set(range(len(manifest.shards))) - numbers)
        columns.append(column)
    fill(dataset, config, columns, thorough=True)  # what is broken here may be broken where it came from
    return list(broken)


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


def removable(dataset_folder: Place, days: float) -> list[Removable]:
    """What no run refers to and nobody has touched for some days.

    A column is kept while a run that reads it exists, while a job makes it, and until it is `days` old; a data set
    while one of its columns or a run is kept.
    """
    every = uses(dataset_folder)
    last = {name: use for use in every for name in use.columns}
    alive = {name for use in every if use.exists for name in use.columns}
    columns = column_folders(dataset_folder)
    removed = []
    for folder in columns:
        inside = files(folder)
        age = _age(folder, inside)
        if folder.name in alive or age < days or is_held(folder, time.time()):
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
