"""Whether a cache still is what it says: everything is read and compared, and rows are described again on request."""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from featurize.columns import column_folders, mapped, misplaced, row_keys
from featurize.config import FeaturizeConfig
from featurize.copies import DamagedError, download
from featurize.datasets.sample import Sample
from featurize.extract import ShardTask, describe
from featurize.index import Dataset, content_id, open_dataset
from featurize.manifest import CacheError, Manifest, ShardRecord, read_begun, read_manifest, shard_path
from featurize.places import Place, found
from featurize.plan import PlannedColumn, encoder_card, imported_rows
from featurize.shards import Array, Shard, ShardError, index_of, read_index
from featurize.sharing import sha256_of


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        folder: of the column, or of the data set.
        text: what was found.
        shard: the number of the shard that is to be made again.
        begun: whether the column is unfinished and says what it is to become.
    """

    folder: Place
    text: str
    shard: int | None = None
    begun: bool = False

    @classmethod
    def of(cls, folder: Place, error: Exception) -> "Problem":
        """What an error says of a folder, which it may not name itself."""
        return cls(folder, str(error) if str(folder) in str(error) else f"{folder}: {error}")

    @property
    def mendable(self) -> bool:
        """Whether `repair` may help."""
        return self.shard is not None or self.begun

    def __str__(self) -> str:
        return self.text


def verify(dataset_folder: Place) -> Iterator[Problem]:
    """Read everything and yield what is wrong: checksums, counts, gaps, key order, values that are not finite."""
    try:
        dataset = open_dataset(dataset_folder)
    except CacheError as error:
        yield Problem(dataset_folder, str(error))
        return
    if content_id(dataset.samples, dataset.digests) != dataset.id or not dataset_folder.name.endswith(dataset.id[:8]):
        yield Problem(
            dataset_folder,
            f"{dataset_folder / 'samples.parquet'}: its rows do not give the identity {dataset.id[:8]} that it states, "
            "or the folder was renamed; run `featurize` again",
        )
    for folder in column_folders(dataset_folder):
        try:
            manifest = read_manifest(folder)
            begun = read_begun(folder) if manifest is None else None
        except CacheError as error:
            yield Problem(folder, str(error))
            continue
        if manifest is not None:
            yield from verify_column(dataset, folder, manifest)
        elif begun is not None and (stranger := _stranger(dataset, folder, begun)):
            yield Problem(folder, stranger)
        else:
            how = "`featurize` or `cache repair` goes on with it" if begun else "run `featurize` again to finish it"
            yield Problem(folder, f"{folder}: unfinished (no manifest.json); {how}", begun=begun is not None)


def _stranger(dataset: Dataset, folder: Place, manifest: Manifest) -> str:
    """What is said of a column that belongs to another version, "" if it does not."""
    of = manifest.ingredients.get("dataset")
    if of == dataset.id:
        return ""
    return f"{folder}: was made for the data set {str(of)[:8]}, but stands in {dataset.id[:8]}; remove it"


def verify_column(dataset: Dataset, folder: Place, manifest: Manifest) -> Iterator[Problem]:
    """What is wrong with a finished column."""
    if stranger := _stranger(dataset, folder, manifest):
        yield Problem(folder, stranger)
        return
    if manifest.rows != dataset.rows(manifest.modality):
        yield Problem(folder, f"{folder}: {manifest.rows} rows, but the data set has {dataset.rows(manifest.modality)}")
        return
    known = {shard_path(folder, number) for number in range(len(manifest.shards))}
    for path in (path for path in found(folder, "*.tar") if path not in known):
        yield Problem(folder, f"{path}: stands in no manifest; nothing reads it and it may be removed")
    keys = row_keys(dataset, manifest.modality)
    for number, start in enumerate(manifest.starts[:-1]):
        text = _shard_problem(shard_path(folder, number), manifest, number, keys[start:])
        if text:
            yield Problem(folder, text, number)


def _shard_problem(path: Place, manifest: Manifest, number: int, keys: list[str]) -> str:
    """The first thing that is wrong with a shard, "" if nothing is."""
    record = manifest.shards[number]
    if not path.exists():
        return f"{path}: is missing"
    try:
        with _at_hand(path, record) as (file, source):
            if manifest.ragged and (problem := _index_problem(path, file)):
                return problem
            shard = Shard(file, record.rows, ragged=manifest.ragged, source=source)
            described = f"{manifest.dtype}{manifest.shape}"
            if f"{shard.stored}{shard.shape}" != described:
                return f"{path}: holds {shard.stored}{shard.shape}, its manifest says {described}"
            placed = misplaced(shard, keys, range(shard.rows))
            return placed or _value_problem(path, shard, set(record.quarantined))
    except (ShardError, DamagedError) as error:
        return str(error)


@contextmanager
def _at_hand(path: Place, record: ShardRecord) -> Iterator[tuple[Path, Place | None]]:
    """A shard as a file here whose checksum is right, and what it is a copy of: copies that others use are not asked.

    Raises:
        DamagedError: the checksum is another, or the disk does not give it back.
    """
    if isinstance(path, Path):
        try:
            digest = sha256_of(path)
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read ({error})") from error
        if digest != record.sha256:
            raise DamagedError(f"{path}: changed since it was written (sha256 differs)")
        yield path, None
        return
    with tempfile.NamedTemporaryFile(prefix="isthmus-", suffix=".tar") as file:
        download(path, record, cast("BinaryIO", file))
        file.flush()
        yield Path(file.name), path


def _index_problem(path: Place, file: Path) -> str:
    """What is wrong with the index that stands beside a ragged shard."""
    beside = path.with_suffix(".idx.npy")
    try:
        stored = read_index(beside)
    except (OSError, ValueError) as error:
        return f"{beside}: not readable ({error})"
    try:
        made = index_of(np.fromfile(file, np.uint8))
    except ValueError as error:
        return f"{path}: is not a shard ({error})"
    same = stored.dtype == made.dtype and np.array_equal(stored, made)
    return "" if same else f"{beside}: is not the index of the tar beside it"


def _value_problem(path: Place, shard: Shard, quarantined: set[int]) -> str:
    for row in range(shard.rows):
        values = shard.row(row)
        if row not in quarantined and not np.isfinite(values).all():
            return f"{path}: row {row} holds values that are not finite"
        if row in quarantined and np.isfinite(values).any():
            return f"{path}: row {row} is quarantined and holds values"
    return ""


@dataclass(frozen=True)
class Drift:
    """How far rows that are described again are from what is stored.

    Attributes:
        folder: of the column.
        rows: how many were compared.
        largest: the largest absolute difference of a value.
        cosine: the smallest cosine between a row and its second description.
    """

    folder: Place
    rows: int
    largest: float
    cosine: float

    def __str__(self) -> str:
        return f"{self.folder}: {self.rows} rows again, largest difference {self.largest:.3g}, cosine {self.cosine:.6f}"


def drift(dataset: Dataset, folder: Place, manifest: Manifest, images: int, seed: int = 0) -> Drift:
    """Describe some rows of a column again, on this machine with these libraries.

    Args:
        dataset: the index.
        folder: of the column.
        manifest: of the column.
        images: how many random images, or images whose captions; fewer if the data set has fewer.
        seed: chooses them.

    Raises:
        CacheError: the encoder is not the one that made the column, or an image is not the one that was indexed.
    """
    column = PlannedColumn.of(folder, manifest)
    card = encoder_card(column)
    lost = manifest.missing if manifest.modality == "image" else dataset.caption_image[manifest.missing]
    usable = np.setdiff1d(np.arange(len(dataset.samples)), lost)
    chosen = np.sort(np.random.default_rng(seed).permutation(usable)[:images])
    samples = tuple(dataset.samples[image] for image in chosen)
    digests = tuple(dataset.digests[image] for image in chosen)
    if column.modality == "image":
        rows = chosen
        require_unchanged(samples, digests)
    else:
        rows = np.flatnonzero(np.isin(dataset.caption_image, chosen))
    imported = imported_rows(dataset, column)
    task = ShardTask(
        column.modality,
        column.encoder,
        card,
        column.precision,
        column.view,
        0,
        samples,
        digests,
        (),
        batch=8,
        decode_timeout=FeaturizeConfig.decode_timeout,
        imported=imported.part(rows.tolist()) if imported is not None else None,
    )
    described = describe(task, range(len(rows)), careful=True)
    if described.failed:
        raise CacheError(f"{folder}: rows cannot be described again: {'; '.join(described.failed.values())}")
    again = described.values[column.output.name]
    stored = mapped(folder, manifest)
    pairs = [
        (stored.row(int(row)).astype(np.float64), again[place].astype(np.float64)) for place, row in enumerate(rows)
    ]
    return Drift(
        folder,
        len(rows),
        max((_difference(one, other) for one, other in pairs), default=0.0),
        min((_cosine(one, other) for one, other in pairs), default=1.0),
    )


def require_unchanged(samples: Sequence[Sample], digests: Sequence[str]) -> None:
    """Let nothing be described again that has changed.

    Raises:
        CacheError: an image is not the one that was indexed, or is not there.
    """
    for sample, digest in zip(samples, digests, strict=True):
        try:
            data = sample.read()
        except (OSError, ValueError) as error:
            raise CacheError(
                f"{sample.image}: cannot be read ({error}), expected the image that was indexed as "
                f"{sample.image_id!r}; put it back, or run `featurize` again, which makes another version of the data "
                "set"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CacheError(
                f"{sample.image}: is not the image that was indexed as {sample.image_id!r}; run `featurize` again, "
                "which makes another version of the data set"
            )


def _difference(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return math.inf
    return float(np.abs(one - other).max(initial=0.0))


def _cosine(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return 0.0
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float((one * other).sum() / lengths) if lengths else 1.0
