"""A Parquet table: a column of ids, and for each output a column of lists, as `cache export --format parquet` writes.

A vector is a list of numbers, parts are a list of lists. Lists of fixed size make rows of fixed shape.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurize.datasets.sample import DataError
from featurize.encoder import Output
from featurize.imports.ids import COLUMNS, as_ids
from featurize.imports.source import (
    NAMES,
    ById,
    Feature,
    InOrder,
    Modality,
    Part,
    Source,
    output_of,
    ragged_output,
)
from featurize.shards import Array

_BATCH = 256


def open_parquet(path: Path, modality: Modality) -> Source:
    """A table with columns that are called as encoders call their outputs.

    Raises:
        DataError: there is no such column, or one of another type.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            starts = np.cumsum([0, *(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups))])
            own = next((name for name in COLUMNS if name in schema.names), None)
            ids = None if own is None else file.read([own]).column(0).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from error
    names = [name for name in NAMES[modality] if name in schema.names]
    if not names:
        raise DataError(
            f"{path}: found the columns {', '.join(schema.names)}, expected some of {', '.join(NAMES[modality])}, "
            "lists of numbers"
        )
    features = tuple(
        Feature(_output(name, schema.field(name).type, modality, path), _reader(path, name, starts)) for name in names
    )
    keys = InOrder((Part(path, "", 0, rows),)) if ids is None else ById(as_ids(ids, f"{path}, {own}"))
    return Source({"format": "parquet"}, features, keys)


def _output(name: str, kind: Any, modality: Modality, path: Path) -> Output:
    """The shape that a column's type promises."""
    sizes: list[int] = []
    while pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        sizes.append(kind.list_size if pa.types.is_fixed_size_list(kind) else -1)
        kind = kind.value_type
    where = f"{path}, {name}"
    dtype = np.dtype(kind.to_pandas_dtype())
    if not sizes or -1 in sizes[1:]:
        raise DataError(
            f"{where}: found {kind} in lists of the sizes {sizes} (-1: any size), expected lists of one fixed size, or "
            "lists of such lists"
        )
    if sizes[0] == -1:
        return ragged_output(name, tuple(sizes[1:]), dtype, modality, where)
    return output_of(name, tuple(sizes), dtype, modality, where)


def _reader(path: Path, name: str, starts: Array) -> Callable[[Array], Iterator[Array]]:
    def read(rows: Array) -> Iterator[Array]:
        owner = np.searchsorted(starts, rows, side="right") - 1
        try:
            with pq.ParquetFile(path) as file:
                for group in np.unique(owner).tolist():
                    yield from _rows_of_group(file, name, group, rows[owner == group] - starts[group])
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}, {name}: cannot be read ({error}); every row must hold a list") from error

    return read


def _rows_of_group(file: Any, name: str, group: int, rows: Array) -> Iterator[Array]:
    """Ascending rows of a row group, with some hundred in memory at a time: others write all rows as one group."""
    first, done = 0, 0
    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[name]):
        inside = rows[done : np.searchsorted(rows, first + batch.num_rows)] - first
        yield from (_values(batch.column(0)[row]) for row in inside.tolist())
        first, done = first + batch.num_rows, done + len(inside)
        if done == len(rows):
            return


def _values(cell: Any) -> Array:
    """A cell's numbers, (D,) or (L, D); none where the cell is empty."""
    if not cell.is_valid:
        return np.empty(0, np.float32)
    values = cell.values
    shape = [len(values)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    found: Array = values.to_numpy(zero_copy_only=False).reshape(shape)
    return found
