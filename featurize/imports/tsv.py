"""Bottom-up attention's own files: one image a line, boxes and features as base64.

Anderson et al., Bottom-Up and Top-Down Attention, CVPR 2018 (github.com/peteanderson80/bottom-up-attention): no header;
`image_id, image_w, image_h, num_boxes, boxes, features`, tabs between; boxes (num_boxes, 4) x1, y1, x2, y2 in pixels
and features (num_boxes, D), float32, little endian.
"""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from featurize.datasets.sample import DataError
from featurize.encoder import Output
from featurize.imports.source import ById, Feature, Source, mean_of
from featurize.shards import Array

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
KIND = "tsv 1"
"""Of the table of lines, for the memory; its number rises when the table changes."""

_FLOAT = np.dtype("<f4")


def open_tsv(path: Path, table: Mapping[str, Array]) -> Source:
    """A file of bottom-up attention's with the outputs "regions", "boxes" (x1, y1, x2, y2 in [0, 1]) and "pooled".

    Images that have all the same number of boxes give fixed rows, others ragged ones.

    Args:
        path: the file.
        table: `read_lines` of it.
    """
    counts = table["boxes"]
    width = int(table["width"])
    fixed = len(set(counts.tolist())) == 1
    shape = (int(counts[0]),) if fixed else ()

    def read(field: int, columns: int) -> Callable[[Array], Iterator[Array]]:
        def rows_of(rows: Array) -> Iterator[Array]:
            with path.open("rb") as file:
                for row in rows.tolist():
                    file.seek(int(table["offset"][row]))
                    line = file.read(int(table["length"][row]))
                    where = f"{path}, line {row + 1}"
                    yield _decode(line.split(b"\t")[field], (int(counts[row]), columns), where, FIELDS[field])

        return rows_of

    boxes_in_pixels = read(4, 4)

    def boxes(rows: Array) -> Iterator[Array]:
        for row, values in zip(rows.tolist(), boxes_in_pixels(rows), strict=True):
            yield values / np.tile(table["size"][row], 2).astype(np.float32)

    regions = Feature(Output("regions", (*shape, width), ragged=not fixed), read(5, width))
    return Source(
        {"format": "bottom-up attention, tsv", "boxes": "relative", "pooled": "mean of regions"},
        (regions, Feature(Output("boxes", (*shape, 4), ragged=not fixed), boxes), mean_of(regions)),
        ById(table["ids"].tolist()),
    )


def read_lines(path: Path) -> dict[str, Array]:
    """Where each line stands and what it says of its sizes.

    Returns:
        "ids" (n,) text, "offset" and "length" (n,) int64 in bytes, "size" (n, 2) int64 width and height in pixels,
        "boxes" (n,) int64, "width" () int64, numbers in a feature.

    Raises:
        DataError: a line is cut, has other fields, or as many bytes as its number of boxes does not make.
    """
    ids: list[str] = []
    numbers: list[tuple[int, int, int, int, int]] = []
    width = 0
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != len(FIELDS):
                raise DataError(
                    f"{where}: found {len(fields)} fields, expected {len(FIELDS)} ({', '.join(FIELDS)}) with tabs "
                    "between; the line is cut, or this is another kind of tsv"
                )
            try:
                image_w, image_h, boxes = (int(field) for field in fields[1:4])
            except ValueError as error:
                raise DataError(f"{where}: image_w, image_h and num_boxes must be whole numbers; {error}") from error
            if min(image_w, image_h) < 1 or boxes < 0:
                raise DataError(f"{where}: found an image of {image_w} x {image_h} with {boxes} boxes")
            if not width and boxes:
                width = len(base64_bytes(fields[5], where, "features")) // (_FLOAT.itemsize * boxes)
            for name, field, numbers_of_box in (("boxes", fields[4], 4), ("features", fields[5], width)):
                _check_length(field, boxes * numbers_of_box * _FLOAT.itemsize, where, name, boxes)
            ids.append(fields[0].decode("utf-8", "surrogateescape"))
            numbers.append((offset, len(line.rstrip(b"\r\n")), image_w, image_h, boxes))
            offset += len(line)
    if not width:
        raise DataError(f"{path}: no line has boxes, expected features of images")
    columns = np.array(numbers, np.int64)
    return {
        "ids": np.array(ids),
        "offset": columns[:, 0],
        "length": columns[:, 1],
        "size": columns[:, 2:4],
        "boxes": columns[:, 4],
        "width": np.array(width),
    }


def _check_length(field: bytes, expected: int, where: str, name: str, boxes: int) -> None:
    found = len(field) // 4 * 3 - (field[-2:].count(b"=") if field else 0)
    if len(field) % 4 or found != expected:
        raise DataError(
            f"{where}: the base64 of {name!r} has {len(field)} letters, which is not the {expected} bytes of {boxes} "
            "boxes; the line is cut or num_boxes is wrong"
        )


def base64_bytes(field: bytes, where: str, name: str) -> bytes:
    """The bytes that a base64 field holds.

    Raises:
        DataError: it is not base64.
    """
    try:
        return base64.b64decode(field, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: {name!r} is not base64 ({error})") from error


def _decode(field: bytes, shape: tuple[int, int], where: str, name: str) -> Array:
    return np.frombuffer(base64_bytes(field, where, name), _FLOAT).reshape(shape)
