"""Columns of the cache as files for others; `import:PATH` reads them back to the same values.

    python -m pipeline cache export COLUMN_FOLDER [COLUMN_FOLDER ...] OUT --format h5|npy|parquet|webdataset

| format | OUT | a row | rows of different length |
|---|---|---|---|
| h5 | a file | dataset NAME (N, ...), dataset `ids` | group NAME: `values` (sum, ...), `offsets` (N + 1) |
| npy | a folder | NAME.npy (N, ...), ids.npy | NAME.npy (sum, ...), NAME.offsets.npy (N + 1) |
| parquet | a file | column NAME of lists of fixed size, column `ids` | a list of such lists |
| webdataset | a folder of tars | KEY.NAME.npy and KEY.json with the id | as they are |

NAME is the encoder's output, e.g. "pooled"; of two columns with one output it is the column's whole name. An id is the
image's or, for captions, the image's with `#` and the caption's number. Rows without values in any of the columns are
left out.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurize.columns import open_column
from featurize.index import Dataset, open_dataset
from featurize.manifest import CacheError, Manifest, read_manifest, shard_path
from featurize.places import Place, fsync_folder, temporary_name
from featurize.shards import Array, Column, row_key
from featurize.sharing import sha256_of

_BATCH = 256  # rows that are written together
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class _Table:
    """Columns side by side.

    Attributes:
        dataset: whose rows they are.
        manifests: of the columns.
        columns: by the name in the file.
        rows: (n,) int64 those that all columns have values of.
        ids: (n,) one a row.
    """

    dataset: Dataset
    manifests: tuple[Manifest, ...]
    columns: Mapping[str, Column]
    rows: Array
    ids: list[str]

    def lengths(self, name: str) -> Array:
        """(n,) int64 parts of each row of a ragged column."""
        column = self.columns[name]
        return np.array([len(column.row(row)) for row in self.rows.tolist()], np.int64)

    def batches(self) -> Iterator[tuple[slice, list[int]]]:
        """Places of rows that are written together, and these rows."""
        for start in range(0, len(self.rows), _BATCH):
            place = slice(start, min(start + _BATCH, len(self.rows)))
            yield place, self.rows[place].tolist()


def export(folders: Sequence[Place], target: Path, kind: str) -> int:
    """Write columns of one data set and modality as one file or folder, whole or not at all.

    Args:
        folders: of finished columns, `<cache>/<dataset>@<id8>/<column>@<id8>`.
        target: what is written; nothing may be there.
        kind: one of `FORMATS`.

    Returns:
        Rows that were left out, because a column holds no values of them.

    Raises:
        CacheError: a folder holds no finished column, a shard is damaged, columns do not belong together, or something
            is at `target`.
    """
    if kind not in FORMATS:
        raise CacheError(f"unknown format {kind!r}; expected {', '.join(FORMATS)}")
    if target.exists():
        raise CacheError(f"{target} exists; give another name, nothing is written over")
    table = _open(folders)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _whole(target) as temporary:
        FORMATS[kind](table, temporary)
    return table.dataset.rows(table.manifests[0].modality) - len(table.rows)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A name that becomes `target` once all under it is written and on the disk; what fails leaves nothing behind."""
    temporary = temporary_name(target.absolute())
    try:
        yield temporary
        files = sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if temporary.is_dir():
            fsync_folder(temporary)
        temporary.rename(target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(target.absolute().parent)


def _open(folders: Sequence[Place]) -> _Table:
    dataset: Dataset | None = None
    manifests: list[Manifest] = []
    opened: list[Column] = []
    for folder in (one.absolute() for one in folders):
        manifest = read_manifest(folder)
        if manifest is None:
            raise CacheError(
                f"{folder}: no finished column here; give <cache>/<dataset>@<id>/<column>@<id>, as "
                "`python -m pipeline cache ls` lists them"
            )
        if dataset is None:
            dataset = open_dataset(folder.parent)
        if folder.parent != dataset.folder or manifest.modality != (manifests or [manifest])[0].modality:
            raise CacheError(
                f"{folder}: {manifest.modality} rows of {folder.parent.name}, but {manifests[0].name} has "
                f"{manifests[0].modality} rows of {dataset.folder.name}; columns that are joined have the same rows"
            )
        manifests.append(manifest)
        opened.append(open_column(dataset, manifest.name, manifest.id))
        _require_sound(folder, manifest)
    assert dataset is not None, "argparse asks for one folder or more"
    lost = np.unique(np.concatenate([manifest.missing for manifest in manifests]))
    rows = np.setdiff1d(np.arange(manifests[0].rows), lost)
    ids = _ids(dataset, manifests[0].modality)
    return _Table(
        dataset,
        tuple(manifests),
        dict(zip(_names(manifests), opened, strict=True)),
        rows,
        [ids[row] for row in rows.tolist()],
    )


def _require_sound(folder: Place, manifest: Manifest) -> None:
    """Let no damage go out; shards of a store are compared when they are fetched."""
    for number, record in enumerate(manifest.shards):
        path = shard_path(folder, number)
        if isinstance(path, Path) and sha256_of(path) != record.sha256:
            raise CacheError(
                f"{path}: changed since it was written (sha256 differs); `python -m pipeline cache repair` mends it"
            )


def _names(manifests: Sequence[Manifest]) -> list[str]:
    outputs = [str(manifest.ingredients["output"]) for manifest in manifests]
    counts = Counter(outputs)
    names = [
        output if counts[output] == 1 else manifest.name for output, manifest in zip(outputs, manifests, strict=True)
    ]
    if len(set(names)) < len(names):
        raise CacheError(f"two columns are called {Counter(names).most_common(1)[0][0]!r}; export them one by one")
    return names


def _ids(dataset: Dataset, modality: str) -> list[str]:
    if modality == "image":
        return [sample.image_id for sample in dataset.samples]
    return [f"{sample.image_id}#{number}" for sample in dataset.samples for number in range(len(sample.captions))]


def _write_h5(table: _Table, path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("ids", data=table.ids, dtype=h5py.string_dtype())
        for name, column in table.columns.items():
            if not column.ragged:
                values = file.create_dataset(name, (len(table.rows), *column.shape), column.dtype)
                for place, rows in table.batches():
                    values[place] = column.gather(np.array(rows))
                continue
            offsets = np.concatenate([[0], np.cumsum(table.lengths(name))])
            group = file.create_group(name)
            group.create_dataset("offsets", data=offsets)
            values = group.create_dataset("values", (int(offsets[-1]), *column.shape), column.dtype)
            for place, rows in table.batches():
                if offsets[place.stop] > offsets[place.start]:
                    values[offsets[place.start] : offsets[place.stop]] = _end_to_end(column, rows)


def _end_to_end(column: Column, rows: Sequence[int]) -> Array:
    """The parts of ragged rows, one row behind the other."""
    return np.concatenate([column.row(row) for row in rows])


def _write_npy(table: _Table, path: Path) -> None:
    path.mkdir()
    np.save(path / "ids.npy", np.array(table.ids, np.str_), allow_pickle=False)
    for name, column in table.columns.items():
        count = len(table.rows)
        offsets = np.concatenate([[0], np.cumsum(table.lengths(name))]) if column.ragged else np.arange(count + 1)
        with (path / f"{name}.npy").open("wb") as file:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, column.dtype))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (int(offsets[-1]), *column.shape)})
            for _, rows in table.batches():
                file.write((_end_to_end(column, rows) if column.ragged else column.gather(np.array(rows))).tobytes())
        if column.ragged:
            np.save(path / f"{name}.offsets.npy", offsets)


def _write_parquet(table: _Table, path: Path) -> None:
    schema = pa.schema([("ids", pa.string()), *((name, _arrow_type(column)) for name, column in table.columns.items())])
    with pq.ParquetWriter(path, schema) as writer:
        for place, rows in table.batches():
            arrays = [pa.array(table.ids[place], pa.string())]
            arrays += [_arrow_array(column, rows) for column in table.columns.values()]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _arrow_type(column: Column) -> Any:
    kind = pa.from_numpy_dtype(column.dtype)
    for size in reversed(column.shape):
        kind = pa.list_(kind, size)
    return pa.list_(kind) if column.ragged else kind


def _arrow_array(column: Column, rows: Sequence[int]) -> Any:
    values = _end_to_end(column, rows) if column.ragged else column.gather(np.array(rows))
    array = pa.array(values.reshape(-1))
    for size in reversed(column.shape):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    if column.ragged:
        offsets = np.cumsum([0, *(len(column.row(row)) for row in rows)])
        array = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), array)
    return array


def _write_webdataset(table: _Table, path: Path) -> None:
    path.mkdir()
    starts = table.manifests[0].starts
    owner = np.searchsorted(starts, table.rows, side="right") - 1
    for number in range(len(starts) - 1):
        places = np.flatnonzero(owner == number)
        with tarfile.open(path / f"{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in places.tolist():
                key = _sample_key(table.ids[place], is_text=table.manifests[0].modality == "text")
                _add(tar, f"{key}.json", json.dumps({"id": table.ids[place]}).encode())
                for name, column in table.columns.items():
                    buffer = io.BytesIO()
                    np.lib.format.write_array(buffer, np.ascontiguousarray(column.row(int(table.rows[place]))))
                    _add(tar, f"{key}.{name}.npy", buffer.getvalue())


def _sample_key(name: str, *, is_text: bool) -> str:
    """The key of a row: its id, where webdataset reads that back and it is no path; else as in the cache."""
    image, _, number = name.rpartition("#") if is_text else (name, "", "")
    key = image if _PLAIN_KEY.fullmatch(image) and "~~" not in row_key(image) else row_key(image)
    return f"{key}~{number}" if is_text else key


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


FORMATS: dict[str, Callable[[_Table, Path], None]] = {
    "h5": _write_h5,
    "npy": _write_npy,
    "parquet": _write_parquet,
    "webdataset": _write_webdataset,
}
"""How a table is written, by the format's name."""
