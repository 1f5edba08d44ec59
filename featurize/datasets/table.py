"""A table of image paths and captions: CSV, TSV, JSON lines or Parquet, with column names of your choice."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featurize.config import TableConfig
from featurize.datasets.sample import DataError, Sample, nearest, open_text
from featurize.places import Place, prefix

_Row = tuple[str, Mapping[str, Any]]  # where the row stands, for messages; its cells by column

_LOOKS_LIKE_LIST = re.compile(r"\[\s*['\"].*\]\s*", re.DOTALL)


@dataclass
class _Image:
    """What the rows of one image id say so far."""

    image: str
    split: str
    captions: list[str]
    place: str


def read_table(root: Place, config: TableConfig) -> Iterator[Sample]:
    """Samples in the order in which their ids first appear.

    A row holds one caption or a list of captions (in CSV and TSV: a JSON list); rows with one id are one
    image. The image is a path relative to the table's folder, an absolute path, or a URI. A row that names another
    image or split than the first one of its id is a sample with a problem.

    Args:
        root: the table, or a folder that holds exactly one.
        config: the columns' names.

    Raises:
        DataError: there is not exactly one table, a column is missing, or a row has another form.
    """
    path = _table_file(root)
    images: dict[str, _Image] = {}
    others: list[Sample] = []
    for place, row in _READERS[path.suffix.lower()](path, config):
        where = f"{path}, {place}"
        image = _name(row, config.image, where)
        image_id = _name(row, config.id, where) if config.id else image
        split = _text(row.get(config.split), config.split, where) if config.split else ""
        captions = _captions(row[config.caption], config.caption, where)
        known = images.setdefault(image_id, _Image(image, split, [], place))
        if (known.image, known.split) == (image, split):
            known.captions += captions
            continue
        problem = (
            f"duplicate image id: {place} of {path.name} has image {image!r}, split {split!r}; {known.place} has image "
            f"{known.image!r}, split {known.split!r}. Rows of one id are captions of one image"
        )
        others.append(Sample(image_id, _location(path, image), tuple(captions), split, problem=problem))
    for image_id, known in images.items():
        yield Sample(image_id, _location(path, known.image), tuple(known.captions), known.split)
    yield from others


def _location(table: Place, image: str) -> str:
    """Where an image lies, from what the table says."""
    if "://" not in image and isinstance(table, Path):
        return str(table.parent / image)
    if "://" not in image and not image.startswith("/"):
        return f"{prefix(table.parent)}/{image}"
    return image


def _table_file(root: Place) -> Place:
    kinds = ", ".join(_READERS)
    if root.is_file():
        if root.suffix.lower() not in _READERS:
            raise DataError(f"{root}: expected a table ({kinds}), found {root.suffix or 'no extension'!r}")
        return root
    found = sorted(path for path in root.iterdir() if path.suffix.lower() in _READERS)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{root}: expected exactly one table ({kinds}), found {names}; give the file as --data.root")
    return found[0]


def _columns(found: Iterable[str], config: TableConfig, where: str) -> list[str]:
    """The wanted columns that are there; a split column that nobody named may be absent."""
    found = list(found)
    wanted = {"image": config.image, "caption": config.caption}
    wanted |= {role: name for role, name in (("id", config.id), ("split", config.split)) if name}
    columns = []
    for role, name in wanted.items():
        if name in found:
            if found.count(name) > 1:
                raise DataError(f"{where}: {found.count(name)} columns are named {name!r}; rename all but one")
            columns.append(name)
        elif role != "split" or name != TableConfig().split:
            raise DataError(
                f"{where}: no column {name!r}{nearest(name, found)}; "
                f"found {', '.join(map(repr, found)) or 'none'}. Name the column with --data.table.{role}"
            )
    return columns


def _delimited_rows(path: Place, config: TableConfig) -> Iterator[_Row]:
    tsv = path.suffix.lower() == ".tsv"
    with open_text(path) as file:
        reader = csv.reader(file, delimiter="\t" if tsv else ",", strict=True)
        try:
            header = next(reader, [])
            _columns(header, config, str(path))
            before = reader.line_num
            for cells in reader:
                first, before = before + 1, reader.line_num
                if not cells:
                    continue
                place = f"line {reader.line_num}"
                if tsv and any(_swallowed_a_row(cell) for cell in cells):
                    raise DataError(
                        f"{path}, lines {first} to {reader.line_num}: a quote opens a cell that holds tabs and line "
                        "breaks, so it has swallowed rows; expected a cell to end with its column. Where the quote is "
                        "part of the text, double it and quote the whole cell"
                    )
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, {place}: {len(cells)} cells under {len(header)} columns; "
                        "quote a cell that holds the delimiter"
                    )
                row = dict(zip(header, cells, strict=True))
                row[config.caption] = _listed(row[config.caption], f"{path}, {place}")
                yield place, row
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: {error}; quote a cell that holds quotes, doubled inside"
            ) from error


def _swallowed_a_row(cell: str) -> bool:
    """Whether a cell of a TSV spans the end of a row: all rows have the same number of cells, so it holds a tab too."""
    return "\t" in cell and ("\n" in cell or "\r" in cell)


def _listed(cell: str, where: str) -> Any:
    """The list that a CSV cell holds, else the cell itself."""
    if not _LOOKS_LIKE_LIST.fullmatch(cell):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: a list of captions must be JSON ({error.msg}), found {cell[:60]!r}; write it with json.dumps"
        ) from error


def _json_rows(path: Place, config: TableConfig) -> Iterator[_Row]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, {place}: not valid JSON ({error.msg}); expected one object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, {place}: expected a JSON object, found {type(row).__name__}")
            _columns(row, config, f"{path}, {place}")
            yield place, row


def _parquet_rows(path: Place, config: TableConfig) -> Iterator[_Row]:
    with path.open("rb") as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a Parquet file ({error})") from error
        columns = _columns(table.schema_arrow.names, config, str(path))
        start = 1
        for batch in table.iter_batches(columns=columns):
            cells = [_as_bytes(batch.column(name)).to_pylist() for name in columns]
            for number, values in enumerate(zip(*cells, strict=True), start=start):
                yield f"row {number}", dict(zip(columns, values, strict=True))
            start += batch.num_rows


def _as_bytes(column: Any) -> Any:
    """Text columns as bytes, because Parquet does not promise that its strings are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()

    def bytes_type(kind: Any) -> Any:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pa.large_list(bytes_type(kind.value_type))
        return pa.large_binary() if pa.types.is_string(kind) or pa.types.is_large_string(kind) else kind

    return column.cast(bytes_type(column.type))


_READERS: dict[str, Callable[[Place, TableConfig], Iterator[_Row]]] = {
    ".csv": _delimited_rows,
    ".tsv": _delimited_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}


def _text(cell: Any, column: str, where: str) -> str:
    """A cell as stripped text; numbers serve as names, nothing is empty text."""
    if cell is None:
        return ""
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", errors="surrogateescape")
    if isinstance(cell, (str, int)):
        return str(cell).strip()
    raise DataError(f"{where}: {column!r} is {cell!r}, expected text")


def _name(row: Mapping[str, Any], column: str, where: str) -> str:
    name = _text(row[column], column, where)
    if not name:
        raise DataError(f"{where}: {column!r} is empty, so the row belongs to no image")
    return name


def _captions(cell: Any, column: str, where: str) -> list[str]:
    return [_text(one, column, where) for one in (cell if isinstance(cell, list) else [cell])]
