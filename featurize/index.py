"""The index of a data set: which images and captions there are, each checked and hashed.

    <cache>/<dataset>@<id8>/samples.parquet       one row an image, in order: the rows of every image column
                            quarantine.jsonl      what could not be used: image_id, stage, reason
                            uses/                 the runs that read it
                            <column>@<id8>/       see `featurize.manifest`

A data set that changes is another version with an identity and a folder of its own; what both have in common is not
described again (see `featurize.sharing`).
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.datasets.sample import Sample
from featurize.manifest import CacheError, Modality
from featurize.places import (
    Place,
    answering,
    file_at,
    files,
    found,
    make_folder,
    publish,
    read,
    version,
)
from featurize.quarantine import Quarantined, check_quarantine, read_quarantine, write_quarantine
from featurize.shards import Array


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
    folder: Place
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

    def rows(self, modality: Modality) -> int:
        """Rows of a column: images or captions."""
        return len(self.samples) if modality == "image" else sum(len(sample.captions) for sample in self.samples)

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


def content_id(samples: Iterable[Sample], digests: Iterable[str]) -> str:
    """A data set's identity: the sha256 of ids, splits, captions and hashes of the images, in order."""
    content = hashlib.sha256()
    for sample, sha256 in zip(samples, digests, strict=True):
        content.update(json.dumps([sample.image_id, sample.split, sample.captions, sha256]).encode())
    return content.hexdigest()


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


Stamp: TypeAlias = tuple[str, int, int, int, str]
_STAMP = ("image", "offset", "length", "size", "version")


def _stamp(sample: Sample, listed: Mapping[str, tuple[int, str]]) -> Stamp:
    """What lets a hash be believed without reading the bytes again; version "" where nothing does.

    Taken before the bytes are read. A local file's version is its modification time. One that was written within the
    last two seconds may change again without a trace, for file systems' clocks can be that coarse; and one from the
    future tells that a clock is wrong.

    Args:
        sample: an image.
        listed: size and version of remote files that were seen in listings.
    """
    offset, length = sample.span or (0, -1)
    try:
        if "://" in sample.image:
            return sample.image, offset, length, *(listed.get(sample.image) or _asked(sample.image))
        status = Path(sample.image).stat()
    except (OSError, ValueError):
        return sample.image, offset, length, 0, ""
    settled = status.st_mtime_ns < time.time_ns() - 2 * 10**9
    return sample.image, offset, length, status.st_size, str(status.st_mtime_ns) if settled else ""


def _asked(uri: str) -> tuple[int, str]:
    with answering(uri, OSError):
        store, path = file_at(uri)
        info = store.info(path)
    return info.get("size") or 0, version(info, time.time())


_WORTH_A_LISTING = 8  # files of a folder


def _listed(samples: Iterable[Sample]) -> dict[str, tuple[int, str]]:
    """Size and version of remote images: folders that hold many of them are listed, a thousand files at a time."""
    folders: dict[str, set[str]] = {}
    for uri in {sample.image for sample in samples if "://" in sample.image}:
        folders.setdefault(uri.rpartition("/")[0], set()).add(uri)
    known: dict[str, tuple[int, str]] = {}
    for folder, uris in folders.items():
        if len(uris) < _WORTH_A_LISTING:
            continue
        with suppress(OSError), answering(folder, OSError):  # not every store lists; then each file is asked for
            store, path = file_at(folder)
            for info in store.ls(path, detail=True):
                uri = f"{folder}/{str(info['name']).rpartition('/')[2]}"
                if uri in uris:
                    known[uri] = info.get("size") or 0, version(info, time.time())
    return known


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
        ("version", pa.string()),
    ]
)


_DAMAGED = (OSError, ValueError, pa.ArrowException)
"""What reading a damaged Parquet file raises; a ValueError where its text is not UTF-8 any more."""


def _known_hashes(cache: Place, name: str) -> dict[Stamp, str]:
    """What earlier indexes say of files, the latest last; one that is damaged says nothing, and costs hashing only."""
    tables: list[tuple[float, Place]] = []
    for path in found(cache, f"{name}@*/samples.parquet"):
        tables += [(file.modified, path) for file in files(path.parent) if file.name == path.name]
    known: dict[Stamp, str] = {}
    for _, path in sorted(tables, key=lambda one: one[0]):
        try:
            table = pq.read_table(pa.BufferReader(read(path)), columns=[*_STAMP, "sha256"]).to_pydict()
        except _DAMAGED:
            continue
        if len(table) <= len(_STAMP):  # written before there were remote files, or by something else
            continue
        known.update(zip(zip(*(table[key] for key in _STAMP), strict=True), table["sha256"], strict=True))
    return {stamp: sha256 for stamp, sha256 in known.items() if stamp[-1]}


def index(samples: Iterable[Sample], name: str, cache: Place, *, max_quarantined: float, threads: int = 8) -> Dataset:
    """Check and hash every sample; write `samples.parquet`; the result's identity depends on content alone.

    An image whose bytes cannot be read, a caption that is empty or not UTF-8, an image left without captions, and what
    its source says to have a problem become quarantine rows. Hashes of files whose size and modification time are as
    they were are taken from earlier indexes.

    Args:
        samples: as a source yields them.
        name: of the preset or source; part of the folder's name.
        cache: folder of all data sets.
        max_quarantined: share of images that may be left out.
        threads: readers at a time.

    Raises:
        CacheError: more than `max_quarantined` of the images were left out; the index and their list are written.
    """
    known = _known_hashes(cache, name)

    everything = list(samples)
    listed = _listed(everything)

    def digest(sample: Sample) -> tuple[Stamp, str, str]:
        stamp = _stamp(sample, listed)
        if stamp in known:
            return stamp, known[stamp], ""
        try:
            data = sample.read()
        except (OSError, ValueError) as error:
            return stamp, "", f"{type(error).__name__}: {error}"
        reason = "" if data else f"the file is empty: {sample.image}"
        return stamp, hashlib.sha256(data).hexdigest() if data else "", reason

    kept: list[Sample] = []
    digests: list[str] = []
    stamps: list[Stamp] = []
    problems: list[Quarantined] = []
    with ThreadPoolExecutor(threads) as pool:
        hashed = tqdm(pool.map(digest, everything), total=len(everything), desc="hash", unit="images")
        for sample, (stamp, sha256, reason) in zip(everything, hashed, strict=True):
            if sample.problem:
                problems.append(Quarantined(sample.image_id, "source", sample.problem, sha256))
                continue
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
                stamps.append(stamp)
    dataset_id = content_id(kept, digests)
    folder = cache / f"{name}@{dataset_id[:8]}"
    make_folder(folder)
    dataset = Dataset(name, dataset_id, folder, tuple(kept), tuple(digests), tuple(problems))
    columns: dict[str, list[Any]] = {
        "image_id": [sample.image_id for sample in kept],
        "split": [sample.split for sample in kept],
        "captions": [list(sample.captions) for sample in kept],
        "sha256": digests,
        **{key: [stamp[place] for stamp in stamps] for place, key in enumerate(_STAMP)},
    }
    table = pa.table(columns, schema=_SCHEMA.with_metadata({"dataset_id": dataset_id, "name": name}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    publish(folder / "samples.parquet", sink.getvalue().to_pybytes())
    of_columns: list[Quarantined] = []
    with suppress(CacheError):  # a damaged list is written anew, and that of the columns when they are finished
        of_columns = [problem for problem in read_quarantine(folder) if problem.columns]
    write_quarantine(folder, [*problems, *of_columns])
    check_quarantine(folder, problems, len(everything) - len(kept), len(everything), max_quarantined)
    return dataset


def open_dataset(folder: Place) -> Dataset:
    """Read an index back, without touching the images.

    Raises:
        CacheError: there is none, or it is damaged.
    """
    path = folder / "samples.parquet"
    try:
        with answering(path, CacheError):
            data = read(path)
        table = pq.read_table(pa.BufferReader(data))
        rows = table.to_pylist()
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        columns = set(table.column_names)
    except CacheError:
        raise
    except _DAMAGED as error:
        raise CacheError(f"{path}: not a readable index ({error}); run `featurize` again") from error
    lacking = ({"name", "dataset_id"} - metadata.keys()) | (set(_SCHEMA.names) - {"size", "version"} - columns)
    if lacking:
        raise CacheError(f"{path}: not the index of a data set (it lacks {', '.join(sorted(lacking))}); remove it")
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
    return Dataset(
        metadata["name"],
        metadata["dataset_id"],
        folder,
        samples,
        tuple(row["sha256"] for row in rows),
        tuple(problem for problem in read_quarantine(folder) if not problem.columns),
    )
