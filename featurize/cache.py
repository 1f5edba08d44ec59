"""What a cache holds, by what name, and whether it can be trusted.

    <cache>/<dataset>@<id8>/samples.parquet       one row an image, in order: the rows of every image column
                            quarantine.jsonl      what could not be used: image_id, stage, reason, sha256, columns
                            <column>@<id8>/000000.tar ... manifest.json

The eight hex digits are the beginning of an identity: the sha256 of everything that determines the content. A data
set's is made of ids, splits, captions and image bytes; a column's of its data set, its encoder (weights,
preprocessing), the output and view it holds, dtype and format version. `manifest.json` is written last: a column
without one is unfinished, and a shard counts as finished once its record `000000.json` stands beside it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.datasets.sample import Sample
from featurize.shards import Array, Column, ShardError, publish, row_key

FORMAT_VERSION = 1


class CacheError(ValueError):
    """The cache is stale, mixed, damaged or incomplete; the message says which and what to do."""


def identity(ingredients: Mapping[str, Any]) -> str:
    """The sha256 of plain JSON values, whatever their order."""
    text = json.dumps(ingredients, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Quarantined:
    """One thing that could not be used, and why.

    Attributes:
        image_id: whose it is.
        stage: "read" (no bytes), "caption" (no usable text), "decode" (no picture in the bytes).
        reason: what was found.
        sha256: of the image bytes, where there were any.
    """

    image_id: str
    stage: str
    reason: str
    sha256: str = ""


@dataclass(frozen=True)
class Dataset:
    """An indexed data set: every image readable and hashed, every caption usable.

    Attributes:
        name: preset or source.
        id: its identity (sha256).
        folder: where its columns live.
        samples: image rows, in order.
        digests: sha256 of each image's bytes.
        quarantine: what was left out while indexing.
    """

    name: str
    id: str
    folder: Path
    samples: tuple[Sample, ...]
    digests: tuple[str, ...]
    quarantine: tuple[Quarantined, ...]

    @property
    def caption_image(self) -> Array:
        """(captions,) int64: the image row of each caption row."""
        return np.repeat(np.arange(len(self.samples)), [len(sample.captions) for sample in self.samples])

    @property
    def captions(self) -> list[str]:
        """Every caption, in caption-row order."""
        return [caption for sample in self.samples for caption in sample.captions]

    def rows_of(self, split: str) -> Array:
        """(n,) int64 image rows of a split.

        Raises:
            CacheError: there are none.
        """
        rows = np.array([row for row, sample in enumerate(self.samples) if sample.split == split], np.int64)
        if not len(rows):
            raise CacheError(
                f"{self.folder}: no images of split {split!r}; found {sorted({s.split for s in self.samples})}"
            )
        return rows


def _is_broken(text: str) -> bool:
    """Whether text was not UTF-8 where it was read (readers keep such bytes as lone surrogates)."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _usable_captions(sample: Sample) -> tuple[tuple[str, ...], list[Quarantined]]:
    kept: list[str] = []
    problems: list[Quarantined] = []
    for number, caption in enumerate(sample.captions):
        if not caption.strip():
            problems.append(Quarantined(sample.image_id, "caption", f"caption {number} is empty"))
        elif _is_broken(caption):
            problems.append(Quarantined(sample.image_id, "caption", f"caption {number} is not UTF-8"))
        else:
            kept.append(caption)
    if not kept:
        problems.append(Quarantined(sample.image_id, "caption", "no usable caption; the image is left out"))
    return tuple(kept), problems


def _stamp(sample: Sample) -> tuple[str, int, int, int, int]:
    """What lets a hash be believed without reading the bytes again; mtime 0 where there is none to see."""
    offset, length = sample.span or (0, -1)
    try:
        status = Path(sample.image).stat()
    except (OSError, ValueError):
        return sample.image, offset, length, 0, 0
    return sample.image, offset, length, status.st_size, status.st_mtime_ns


_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("sha256", pa.string()),
        ("image", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)


def _known_hashes(cache: Path, name: str) -> dict[tuple[str, int, int, int, int], str]:
    known: dict[tuple[str, int, int, int, int], str] = {}
    for path in sorted(cache.glob(f"{name}@*/samples.parquet"), key=lambda path: path.stat().st_mtime):
        table = pq.read_table(path).to_pydict()
        stamps = zip(*(table[key] for key in ("image", "offset", "length", "size", "mtime_ns")), strict=True)
        known.update(zip(stamps, table["sha256"], strict=True))
    return known


def index(samples: Iterable[Sample], name: str, cache: Path, *, max_quarantined: float, threads: int = 8) -> Dataset:
    """Check and hash every sample; write `samples.parquet`; the result's identity depends on content alone.

    An image whose bytes cannot be read, a caption that is empty or not UTF-8, an image left without captions become
    quarantine rows. Hashes of files whose size and modification time are as they were are taken from earlier indexes.

    Args:
        samples: as a source yields them.
        name: of the preset or source; part of the folder's name.
        cache: folder of all data sets.
        max_quarantined: share of images that may be left out.
        threads: readers at a time.

    Raises:
        CacheError: more than `max_quarantined` of the images were left out.
    """
    known = _known_hashes(cache, name)

    def digest(sample: Sample) -> tuple[str, str]:
        found = known.get(_stamp(sample)) if _stamp(sample)[-1] else None
        if found:
            return found, ""
        try:
            data = sample.read()
        except (OSError, ValueError) as error:
            return "", f"{type(error).__name__}: {error}"
        return (hashlib.sha256(data).hexdigest(), "") if data else ("", f"the file is empty: {sample.image}")

    everything = list(samples)
    kept: list[Sample] = []
    digests: list[str] = []
    problems: list[Quarantined] = []
    with ThreadPoolExecutor(threads) as pool:
        hashed = tqdm(pool.map(digest, everything), total=len(everything), desc="hash", unit="images")
        for sample, (sha256, reason) in zip(everything, hashed, strict=True):
            captions, caption_problems = _usable_captions(sample)
            problems += [replace(problem, sha256=sha256) for problem in caption_problems]
            names = {"image id": sample.image_id, "path": sample.image, "split": sample.split}
            if broken := [what for what, name in names.items() if _is_broken(name)]:
                problems.append(Quarantined(sample.image_id, "read", f"the {broken[0]} is not UTF-8", sha256))
            elif reason:
                problems.append(Quarantined(sample.image_id, "read", reason))
            elif captions:
                kept.append(replace(sample, captions=captions))
                digests.append(sha256)
    check_quarantine(problems, len(everything) - len(kept), len(everything), max_quarantined)
    content = hashlib.sha256()
    for sample, sha256 in zip(kept, digests, strict=True):
        content.update(json.dumps([sample.image_id, sample.split, sample.captions, sha256]).encode())
    dataset_id = content.hexdigest()
    folder = cache / f"{name}@{dataset_id[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    dataset = Dataset(name, dataset_id, folder, tuple(kept), tuple(digests), tuple(problems))
    stamps = [_stamp(sample) for sample in kept]
    columns: dict[str, list[Any]] = {
        "image_id": [sample.image_id for sample in kept],
        "split": [sample.split for sample in kept],
        "captions": [list(sample.captions) for sample in kept],
        "sha256": digests,
        **{
            key: [stamp[place] for stamp in stamps]
            for place, key in enumerate(("image", "offset", "length", "size", "mtime_ns"))
        },
    }
    table = pa.table(columns, schema=_SCHEMA.with_metadata({"dataset_id": dataset_id, "name": name}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    publish(folder / "samples.parquet", sink.getvalue().to_pybytes())
    write_quarantine(dataset, [])
    return dataset


def open_dataset(folder: Path) -> Dataset:
    """Read an index back, without touching the images.

    Raises:
        CacheError: there is none, or it is damaged.
    """
    path = folder / "samples.parquet"
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CacheError(f"{path}: not a readable index ({error}); run `featurize` again") from error
    metadata = table.schema.metadata or {}
    rows = table.to_pylist()
    samples = tuple(
        Sample(
            row["image_id"],
            row["image"],
            tuple(row["captions"]),
            row["split"],
            None if row["length"] < 0 else (row["offset"], row["length"]),
        )
        for row in rows
    )
    quarantine = folder / "quarantine.jsonl"
    lines = quarantine.read_text("utf-8").splitlines() if quarantine.exists() else []
    rejected = (line for line in map(json.loads, lines) if line["stage"] != "decode" and not line.get("columns"))
    return Dataset(
        metadata[b"name"].decode(),
        metadata[b"dataset_id"].decode(),
        folder,
        samples,
        tuple(row["sha256"] for row in rows),
        tuple(Quarantined(line["image_id"], line["stage"], line["reason"], line["sha256"]) for line in rejected),
    )


def check_quarantine(problems: Iterable[Quarantined], lost: int, total: int, limit: float) -> None:
    """End the job when too many images fail.

    Raises:
        CacheError: more than `limit` of `total` images are `lost`; the message shows the first reasons.
    """
    if total and lost / total > limit:
        first = "".join(f"\n  {p.image_id}: {p.stage}: {p.reason}" for p in list(problems)[:5])
        raise CacheError(
            f"{lost} of {total} images cannot be used, more than the {limit:.0%} that "
            f"--featurize.max_quarantined allows. The first reasons:{first}"
        )


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard of a column.

    Attributes:
        rows: members in the tar.
        size: bytes of the tar.
        sha256: of the tar.
        quarantined: rows (within the shard) that hold NaN because their image could not be decoded.
        reasons: why, one for each.
    """

    rows: int
    size: int
    sha256: str
    quarantined: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()


def read_record(path: Path) -> ShardRecord | None:
    """The record of a finished shard, or None."""
    try:
        plain = json.loads(path.read_text("utf-8"))
        return ShardRecord(**{**plain, "quarantined": tuple(plain["quarantined"]), "reasons": tuple(plain["reasons"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


@dataclass(frozen=True)
class Manifest:
    """A finished column.

    Attributes:
        name: e.g. "efficientnet-lite0.pooled.flip".
        modality: "image" (one row an image) or "text" (one row a caption).
        ingredients: everything the identity is made of.
        dtype: of the values.
        shape: of a row, or of one part of a ragged row.
        ragged: whether rows differ in length.
        shards: in order.
        environment: library versions and machine; beside the identity, not in it.
    """

    name: str
    modality: str
    ingredients: Mapping[str, Any]
    dtype: str
    shape: tuple[int, ...]
    ragged: bool
    shards: tuple[ShardRecord, ...]
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
    def missing(self) -> Array:
        """(n,) int64 rows that hold NaN because their image could not be decoded."""
        starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        return np.array(
            [start + row for start, shard in zip(starts, self.shards, strict=False) for row in shard.quarantined],
            np.int64,
        )

    def write(self, folder: Path) -> None:
        """Publish the column; its shards' own records are folded in and removed."""
        publish(folder / "manifest.json", json.dumps({**asdict(self), "id": self.id}, indent=1).encode())
        for number in range(len(self.shards)):
            (folder / f"{number:06d}.json").unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest | None:
    """A column's manifest, or None where the column is unfinished.

    Raises:
        CacheError: the manifest is damaged, or its ingredients do not give the identity it states.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text("utf-8"))
        stated = plain.pop("id")
        shards = tuple(
            ShardRecord(**{**shard, "quarantined": tuple(shard["quarantined"]), "reasons": tuple(shard["reasons"])})
            for shard in plain.pop("shards")
        )
        manifest = Manifest(**{**plain, "shape": tuple(plain["shape"]), "shards": shards})
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path}: damaged ({error}); remove the folder and run `featurize` again") from error
    if manifest.id != stated or not folder.name.endswith(f"@{stated[:8]}"):
        raise CacheError(
            f"{path}: states identity {stated[:8]}, its ingredients give {manifest.id[:8]} and its folder is "
            f"{folder.name}; the three must agree. It was edited or moved: remove it and run `featurize` again"
        )
    return manifest


def column_folder(dataset: Dataset, name: str, column_id: str) -> Path:
    """Where a column lives."""
    return dataset.folder / f"{name}@{column_id[:8]}"


def open_column(dataset: Dataset, name: str, column_id: str) -> Column:
    """Open a finished column by what it must be.

    Raises:
        CacheError: it is missing, was made for another data set or by another encoder, or is damaged.
    """
    folder = column_folder(dataset, name, column_id)
    manifest = read_manifest(folder)
    if manifest is None:
        others = [path.name for path in dataset.folder.glob(f"{name}@*") if path != folder]
        also = f" (there is {', '.join(others)}, of another identity)" if others else ""
        raise CacheError(f"{folder}: not in the cache{also}; run `python -m pipeline featurize` first")
    if manifest.id != column_id:
        raise CacheError(
            f"{folder}: holds identity {manifest.id}, expected {column_id}: two columns whose identities begin "
            "alike; remove this one and run `featurize` again"
        )
    expected = len(dataset.samples) if manifest.modality == "image" else len(dataset.captions)
    if manifest.rows != expected:
        raise CacheError(f"{folder}: {manifest.rows} rows, but the data set has {expected}; run `featurize` again")
    try:
        column = Column(name, folder, [shard.rows for shard in manifest.shards], ragged=manifest.ragged)
    except ShardError as error:
        raise CacheError(str(error)) from error
    for problem in _key_problems(dataset, manifest, column, ends_only=True):
        raise CacheError(problem)
    return column


def _row_keys(dataset: Dataset, modality: str) -> list[str]:
    if modality == "image":
        return [row_key(sample.image_id) for sample in dataset.samples]
    return [row_key(s.image_id, number) for s in dataset.samples for number in range(len(s.captions))]


def _key_problems(dataset: Dataset, manifest: Manifest, column: Column, *, ends_only: bool) -> Iterator[str]:
    keys = _row_keys(dataset, manifest.modality)
    for start, shard in zip(column.starts, column.shards, strict=False):
        for row in (0, shard.rows - 1) if ends_only else range(shard.rows):
            if shard.key(row) != keys[start + row]:
                yield (
                    f"{shard.path}: row {row} belongs to {shard.key(row)!r}, expected {keys[start + row]!r}; the shard "
                    "is another data set's or out of order: remove it and its manifest and run `featurize` again"
                )
                break


def write_quarantine(dataset: Dataset, manifests: Iterable[Manifest]) -> list[Quarantined]:
    """Gather what indexing and extraction left out in `quarantine.jsonl`; returns the extraction's part, by image.

    First comes the index's part, then the images that extraction could not use, in row order: one line for an image
    and a reason, with the columns that miss it.
    """
    lines = [{**asdict(problem), "columns": []} for problem in dataset.quarantine]
    failed: dict[tuple[int, str], list[str]] = {}
    for manifest in manifests:
        reasons = (reason for shard in manifest.shards for reason in shard.reasons)
        for row, reason in zip(manifest.missing.tolist(), reasons, strict=True):
            failed.setdefault((row, reason), []).append(manifest.name)
    images: dict[int, Quarantined] = {}
    for (row, reason), columns in sorted(failed.items()):
        stage = "decode" if reason.startswith("DecodeError") else "read"
        problem = Quarantined(dataset.samples[row].image_id, stage, reason, dataset.digests[row])
        images.setdefault(row, problem)
        lines.append({**asdict(problem), "columns": sorted(columns)})
    text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
    publish(dataset.folder / "quarantine.jsonl", text.encode())
    return list(images.values())


def list_columns(dataset_folder: Path) -> list[tuple[Path, Manifest | None]]:
    """Every column folder of a data set with its manifest (None: unfinished)."""
    folders = sorted(path for path in dataset_folder.iterdir() if path.is_dir() and "@" in path.name)
    return [(folder, read_manifest(folder)) for folder in folders]


def verify(dataset_folder: Path) -> Iterator[str]:
    """Read everything and yield what is wrong: checksums, counts, key order, values that are not finite."""
    try:
        dataset = open_dataset(dataset_folder)
        columns = list_columns(dataset_folder)
    except CacheError as error:
        yield str(error)
        return
    for folder, manifest in columns:
        if manifest is None:
            yield f"{folder}: unfinished (no manifest.json); run `featurize` again to finish it"
            continue
        sums = [(folder / f"{number:06d}.tar", shard) for number, shard in enumerate(manifest.shards)]
        broken = [path for path, shard in sums if not path.exists() or _sha256(path) != shard.sha256]
        yield from (f"{path}: missing or changed since it was written (sha256 differs)" for path in broken)
        if broken:
            continue
        try:
            column = Column(manifest.name, folder, [shard.rows for shard in manifest.shards], ragged=manifest.ragged)
        except ShardError as error:
            yield str(error)
            continue
        expected = len(_row_keys(dataset, manifest.modality))
        if column.rows != expected:
            yield f"{folder}: {column.rows} rows, but the data set has {expected}"
            continue
        yield from _key_problems(dataset, manifest, column, ends_only=False)
        yield from _values_problems(folder, manifest, column)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _values_problems(folder: Path, manifest: Manifest, column: Column) -> Iterator[str]:
    missing = set(manifest.missing.tolist())
    for start in range(0, column.rows, 256):
        rows = np.arange(start, min(start + 256, column.rows))
        values = column.gather_padded(rows)[0] if column.ragged else column.gather(rows)
        finite = np.isfinite(values.reshape(len(rows), -1)).all(1)
        for row in rows[~finite]:
            if int(row) not in missing:
                yield f"{folder}: row {row} holds values that are not finite"


def make_manifest(
    name: str,
    modality: str,
    ingredients: Mapping[str, Any],
    output: Mapping[str, Any],
    shards: Iterable[ShardRecord],
) -> Manifest:
    """A manifest with this environment's versions; `output` gives dtype, shape and ragged."""
    return Manifest(name, modality, ingredients, shards=tuple(shards), environment=_environment(), **output)


def _environment() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = ("torch", "torchvision", "transformers", "numpy", "pillow")
    return {
        **{package: version(package) for package in packages},
        "machine": platform.platform(),
        "processor": platform.machine(),
    }
