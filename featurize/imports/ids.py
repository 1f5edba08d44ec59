"""Ids that stand beside an array: one for each of its rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurize.datasets.sample import DataError, open_text
from featurize.shards import Array

_NAMES = ("{stem}.ids{suffix}", "{stem}_ids{suffix}", "{stem}_imgid2idx{suffix}", "ids{suffix}")
_SUFFIXES = (".txt", ".json", ".npy", ".parquet")

COLUMNS = ("ids", "id", "image_id", "image_ids")
"""What a column, dataset or array of ids may be called."""


def file_beside(path: Path) -> Path | None:
    """The file with an array's ids: STEM.ids, STEM_ids, STEM_imgid2idx or ids, as .txt, .json, .npy or .parquet.

    Raises:
        DataError: there are two that are equally near.
    """
    for pattern in _NAMES:
        found = [path.with_name(pattern.format(stem=path.stem, suffix=suffix)) for suffix in _SUFFIXES]
        there = [file for file in found if file.is_file() and file != path]
        if len(there) > 1:
            raise DataError(f"{path}: found ids in {there[0].name} and in {there[1].name}; keep one of them")
        if there:
            return there[0]
    return None


def read_ids(file: Path) -> list[str]:
    """The ids of rows 0, 1, 2, ...: a line each; a JSON list, or object of id and row; an npy; a Parquet column.

    Raises:
        DataError: the file has another form.
    """
    readers = {".txt": _lines, ".json": _json, ".npy": _npy, ".parquet": _parquet}
    return readers[file.suffix](file)


def as_ids(values: Array | Sequence[Any], where: str) -> list[str]:
    """Text, UTF-8 or whole numbers as ids.

    Raises:
        DataError: they are something else.
    """
    listed = np.asarray(values).tolist() if isinstance(values, np.ndarray) else list(values)
    if not all(isinstance(value, str | bytes | int) and not isinstance(value, bool) for value in listed):
        odd = next(value for value in listed if not isinstance(value, str | bytes | int) or isinstance(value, bool))
        raise DataError(f"{where}: found the id {odd!r}, expected text or a whole number")
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value) for value in listed]


def check_count(ids: Sequence[str], rows: int, where: str) -> None:
    """An id for each row.

    Raises:
        DataError: there are more or fewer.
    """
    if len(ids) != rows:
        raise DataError(f"{where}: found {len(ids)} ids for {rows} rows, expected one a row")


def _lines(file: Path) -> list[str]:
    with open_text(file) as lines:
        return lines.read().rstrip("\r\n").replace("\r\n", "\n").split("\n")


def _json(file: Path) -> list[str]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    if isinstance(content, dict):
        by_row = {row: name for name, row in content.items() if isinstance(row, int)}
        if sorted(by_row) != list(range(len(content))):
            raise DataError(f"{file}: expected ids with their rows 0 to {len(content) - 1}, each once")
        return [by_row[row] for row in range(len(by_row))]
    if not isinstance(content, list):
        raise DataError(f"{file}: expected a JSON list of ids, or an object of ids and rows")
    return as_ids(content, str(file))


def _npy(file: Path) -> list[str]:
    try:
        return as_ids(np.load(file, allow_pickle=False), str(file))
    except ValueError as error:
        raise DataError(f"{file}: not an npy file of text or numbers ({error})") from error


def _parquet(file: Path) -> list[str]:
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: not a Parquet file ({error})") from error
    found = [name for name in COLUMNS if name in table.column_names]
    if not found:
        raise DataError(f"{file}: found the columns {', '.join(table.column_names)}, expected one of {COLUMNS}")
    return as_ids(table.column(found[0]).to_pylist(), str(file))
