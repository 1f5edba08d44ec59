"""What a column is, and which of it is finished: identities, shard records, manifests.

An identity is the sha256 of everything that determines the content. A data set's is made of ids, splits, captions and
image bytes; a column's of its data set, its encoder (weights, preprocessing), the output and view it holds, dtype and
format version. Its first eight hex digits stand in the folder's name.

    <column>@<id8>/column.json      what is being made; while the column is unfinished
                   000000.json      a finished shard's record; while the column is unfinished
                   000000.tar
                   manifest.json    what it is and its shards; written last, and then the records go
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featurize.encoder import DType
from featurize.places import Place, make_folder, publish, read, remove_file
from featurize.shards import Array

FORMAT_VERSION = 1

Modality = Literal["image", "text"]


class CacheError(ValueError):
    """The cache is stale, mixed, damaged or incomplete; the message says which and what to do."""


def identity(ingredients: Mapping[str, Any]) -> str:
    """The sha256 of plain JSON values, whatever their order."""
    text = json.dumps(ingredients, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two sets of ingredients, one line each: `name: this one's value, that one's value`."""
    found = []
    for name in dict.fromkeys([*one, *other]):
        values = [side.get(name, "absent") for side in (one, other)]
        if all(isinstance(value, Mapping) for value in values):
            found += differences(values[0], values[1], f"{prefix}{name}.")
        elif json.dumps(values[0]) != json.dumps(values[1]):
            found.append(f"{prefix}{name}: {', '.join(map(_short, values))}")
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard of a column.

    Attributes:
        rows: members in the tar.
        size: bytes of the tar.
        sha256: of the tar.
        quarantined: rows (within the shard) that hold NaN, or nothing in a ragged column, because their image could
            not be described.
        reasons: why, one for each.
    """

    rows: int
    size: int
    sha256: str
    quarantined: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "ShardRecord":
        """From JSON."""
        return cls(**{**plain, "quarantined": tuple(plain["quarantined"]), "reasons": tuple(plain["reasons"])})


def shard_path(folder: Place, number: int) -> Place:
    """The tar of a column's shard."""
    return folder / f"{number:06d}.tar"


def write_record(folder: Place, number: int, record: ShardRecord) -> None:
    """Say that a shard of an unfinished column is finished."""
    publish(shard_path(folder, number).with_suffix(".json"), json.dumps(asdict(record)).encode())


def read_record(folder: Place, number: int) -> ShardRecord | None:
    """The record of a finished shard of an unfinished column, or None."""
    try:
        return ShardRecord.of(json.loads(read(shard_path(folder, number).with_suffix(".json"))))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


@dataclass(frozen=True)
class Manifest:
    """A column: what it is, how to make it, and its finished shards.

    Attributes:
        name: e.g. "efficientnet-lite0.pooled.flip".
        modality: "image" (one row an image) or "text" (one row a caption).
        ingredients: everything the identity is made of.
        reference: what opens its encoder.
        dtype: of the values.
        shape: of a row, or of one part of a ragged row.
        ragged: whether rows differ in length.
        images_per_shard: whose rows, or whose captions' rows, stand in one shard.
        shards: in order.
        environment: library versions and machine; beside the identity, not in it.
    """

    name: str
    modality: Modality
    ingredients: Mapping[str, Any]
    reference: str
    dtype: DType
    shape: tuple[int, ...]
    ragged: bool
    images_per_shard: int
    shards: tuple[ShardRecord, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The column's identity (sha256)."""
        return identity(self.ingredients)

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all tars."""
        return sum(shard.size for shard in self.shards)

    @property
    def starts(self) -> Array:
        """(shards + 1,) int64: the first row of each shard, and the number of rows."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)], dtype=np.int64)

    @property
    def missing(self) -> Array:
        """(n,) int64 rows that hold NaN or nothing because their image could not be described."""
        return np.array(
            [start + row for start, shard in zip(self.starts, self.shards, strict=False) for row in shard.quarantined],
            np.int64,
        )

    @property
    def reasons(self) -> list[str]:
        """Why, one for each of `missing`."""
        return [reason for shard in self.shards for reason in shard.reasons]

    def begin(self, folder: Place) -> None:
        """Say what the folder is going to hold, unless it says so already."""
        make_folder(folder)
        if not (folder / "column.json").exists():
            publish(folder / "column.json", _text(replace(self, shards=())))

    def write(self, folder: Place) -> None:
        """Publish the finished column; what was there while it was unfinished goes."""
        publish(folder / "manifest.json", _text(self))
        remove_file(folder / "column.json")
        for number in range(len(self.shards)):
            remove_file(shard_path(folder, number).with_suffix(".json"))

    def reopen(self, folder: Place, sound: Iterable[int]) -> None:
        """Make a finished column unfinished again: all shards but the sound ones are to be made anew.

        The order of the steps leaves a finished or an unfinished column, whenever the process dies. Records of the
        other shards go first: a process that died while it finished the column may have left them.
        """
        kept = set(sound)
        for number, record in enumerate(self.shards):
            if number in kept:
                write_record(folder, number, record)
            else:
                remove_file(shard_path(folder, number).with_suffix(".json"))
        self.begin(folder)
        remove_file(folder / "manifest.json")


def _text(manifest: Manifest) -> bytes:
    return json.dumps({**asdict(manifest), "id": manifest.id}, indent=1).encode()


def read_manifest(folder: Place) -> Manifest | None:
    """A finished column's manifest, or None where the column is unfinished.

    Raises:
        CacheError: the manifest is damaged, its ingredients do not give the identity it states, or its format is not
            the one that is known here.
    """
    return _read(folder / "manifest.json")


def read_begun(folder: Place) -> Manifest | None:
    """What an unfinished column is to become, or None.

    Raises:
        CacheError: as `read_manifest`.
    """
    return _read(folder / "column.json")


def _read(path: Place) -> Manifest | None:
    try:
        plain = json.loads(read(path))
        stated = plain.pop("id")
        shards = tuple(map(ShardRecord.of, plain.pop("shards")))
        manifest = Manifest(**{**plain, "shape": tuple(plain["shape"]), "shards": shards})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path}: damaged ({error}); remove the folder and run `featurize` again") from error
    if manifest.id != stated or not path.parent.name.endswith(f"@{stated[:8]}"):
        raise CacheError(
            f"{path}: states identity {stated[:8]}, its ingredients give {manifest.id[:8]} and its folder is "
            f"{path.parent.name}; the three must agree. It was edited or moved: remove it and run `featurize` again"
        )
    found = manifest.ingredients.get("format", FORMAT_VERSION)
    if found != FORMAT_VERSION:
        raise CacheError(
            f"{path}: has format {found}, this version of isthmus reads format {FORMAT_VERSION}; use the version that "
            "wrote it, or another cache"
        )
    return manifest


USED = ".used"
"""In a column's folder in a store: a job found the column when this was written."""


def touch(folder: Place) -> None:
    """Make a column that a job has found young, so that `gc` spares it until a run has noted that it reads it."""
    if isinstance(folder, Path):
        with suppress(FileNotFoundError, PermissionError):
            os.utime(folder / "manifest.json")
    elif (folder / "manifest.json").exists():
        publish(folder / USED, b"")


def environment() -> dict[str, str]:
    """This machine's kind, and the versions of the libraries that describe."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = ("torch", "torchvision", "transformers", "numpy", "pillow")
    found = {package: version(package) for package in packages}
    with suppress(PackageNotFoundError):
        found["opencv"] = version("opencv-python-headless")
    return {
        **found,
        "machine": platform.platform(),
        "processor": platform.machine(),
    }
