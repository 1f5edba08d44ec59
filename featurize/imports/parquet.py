"""A Parquet table: a column of ids, and for each output a column of lists, as `cache export --format parquet` writes.

A vector is a list of numbers, parts are a list of lists. Lists of fixed size make rows of fixed shape. Others leave the
size open (pandas, polars and Hugging Face's datasets write such): D is then that of the first row that has numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    SCALARS,
    ById,
    Feature,
    InOrder,
    Modality,
    Part,
    Source,
    listed,
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
            f"{path}: found the columns {listed(schema.names)}, expected some of {', '.join(NAMES[modality])}, "
            "lists of numbers"
        )
    features: list[Feature] = []
    found: list[str] = []  # columns whose width their type leaves open
    for name in names:
        sizes, kind = _sizes(schema.field(name).type)
        if sizes[-1:] == [-1] and (len(sizes) == 2 or (len(sizes) == 1 and name not in SCALARS)):
            sizes[-1] = _first_width(path, name)
            found.append(name)
        features.append(Feature(_output(name, sizes, kind, modality, path), _reader(path, name, starts, sizes[1:])))
    keys = InOrder((Part(path, "", 0, rows),)) if ids is None else ById(as_ids(ids, f"{path}, {own}"))
    layout = {"format": "parquet", **({"width": f"of the first row: {', '.join(found)}"} if found else {})}
    return Source(layout, tuple(features), keys)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}, {name}: cannot be read ({error}); every row must hold a list") from error


def _sizes(kind: Any) -> tuple[list[int], Any]:
    """The sizes of a column's nested lists, -1 for any size, and the type inside."""
    sizes: list[int] = []
    while _is_list(kind):
        sizes.append(kind.list_size if pa.types.is_fixed_size_list(kind) else -1)
        kind = kind.value_type
    return sizes, kind


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _first_width(path: Path, name: str) -> int:
    """D of the first row that has numbers.

    Raises:
        DataError: no row has any.
    """
    with _opened(path, name) as file:
        for batch in file.iter_batches(_BATCH, columns=[name]):
            values = batch.column(0)
            while _is_list(values.type.value_type):
                values = values.flatten()
            sizes = values.value_lengths().drop_null().to_numpy()
            if sizes.any():
                return int(sizes[sizes > 0][0])
    raise DataError(f"{path}, {name}: found no row with numbers, expected a list of them in every row")


def _output(name: str, sizes: Sequence[int], kind: Any, modality: Modality, path: Path) -> Output:
    """The shape that lists of these sizes promise."""
    where = f"{path}, {name}"
    dtype = np.dtype(kind.to_pandas_dtype())
    if not sizes or -1 in sizes[1:]:
        raise DataError(
            f"{where}: found {kind} in lists of the sizes {sizes} (-1: any size), expected numbers in lists, or in "
            "lists of lists"
        )
    if sizes[0] == -1:
        return ragged_output(name, tuple(sizes[1:]), dtype, modality, where)
    return output_of(name, tuple(sizes), dtype, modality, where)


def _reader(path: Path, name: str, starts: Array, inner: Sequence[int]) -> Callable[[Array], Iterator[Array]]:
    """A reader of a column's rows; `inner` are the sizes of the lists in a row."""

    def read(rows: Array) -> Iterator[Array]:
        owner = np.searchsorted(starts, rows, side="right") - 1
        with _opened(path, name) as file:
            for group in np.unique(owner).tolist():
                inside = rows[owner == group] - starts[group]
                for row, cell in zip(inside, _rows_of_group(file, name, group, inside), strict=True):
                    yield _values(cell, inner, f"{path}, {name}: row {row + starts[group]}")

    return read


def _rows_of_group(file: Any, name: str, group: int, rows: Array) -> Iterator[Any]:
    """Cells of ascending rows of a row group, some hundred in memory at a time: others write all rows as one group."""
    first, done = 0, 0
    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[name]):
        inside = rows[done : np.searchsorted(rows, first + batch.num_rows)] - first
        yield from (batch.column(0)[row] for row in inside.tolist())
        first, done = first + batch.num_rows, done + len(inside)
        if done == len(rows):
            return


def _values(cell: Any, inner: Sequence[int], where: str) -> Array:
    """A cell's numbers, (D,) or (L, *inner); none where the cell is empty.

    Raises:
        DataError: a list inside has another length.
    """
    if not cell.is_valid:
        return np.empty(0, np.float32)
    values = cell.values
    shape = (len(values), *inner)
    for size in inner:
        others = [length for length in values.value_lengths().fill_null(0).unique().to_pylist() if length != size]
        if others:
            raise DataError(f"{where} holds a list of {others[0]} numbers, expected {size}, as in the rows before")
        values = values.flatten()
    found: Array = values.to_numpy(zero_copy_only=False).reshape(shape)
    return found
