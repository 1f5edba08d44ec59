"""What every format is read as: features by row, and whose rows they are."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from featurize.datasets.sample import DataError
from featurize.encoder import JSON, Output
from featurize.shards import Array

Modality = Literal["image", "text"]

NAMES: dict[Modality, tuple[str, ...]] = {
    "image": ("pooled", "grid", "coarse", "tokens", "regions", "boxes", "spatial", "scores", "labels", "placed"),
    "text": ("sentence", "tokens", "lemmas"),
}
"""What arrays may be called: as encoders call their outputs."""

SCALARS = ("scores", "labels", "lemmas")
"""Outputs that say one number of each part: a row of theirs is a list of numbers, of everything else's vectors."""

_BLOCK_BYTES = 64 << 20
_SHOWN = 5


@dataclass(frozen=True)
class Feature:
    """One thing that a file says of each of its rows.

    Attributes:
        output: its name and the shape of a row.
        read: ascending row numbers (n,) int64 -> n arrays in that order, of whatever dtype the file has.
    """

    output: Output
    read: Callable[[Array], Iterator[Array]]


@dataclass(frozen=True)
class ById:
    """Rows that say whose they are.

    Attributes:
        ids: one a row: an image's, or for captions an image's with `#` and the caption's number.
        captions: the caption of each row, where the file has them.
        repeated: whether several rows of one id are several copies of one image's features.
    """

    ids: Sequence[str]
    captions: Sequence[str] | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Part:
    """Rows in the order of a split's images.

    Attributes:
        file: where they stand.
        split: which split; "" for the whole data set.
        first: row of the source.
        rows: how many.
        repeats: rows that each image has.
        ids: what the file calls each row, if anything.
        captions: the captions of each row, if the file has them.
    """

    file: Path
    split: str
    first: int
    rows: int
    repeats: int = 1
    ids: Sequence[str] | None = None
    captions: Sequence[Sequence[str]] | None = None


@dataclass(frozen=True)
class InOrder:
    """Rows that are the data set's rows, by position alone."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Source:
    """A file, or several, opened.

    Attributes:
        layout: what was recognised; it becomes the card's preprocessing.
        features: by the output's name.
        keys: whose the rows are.
    """

    layout: Mapping[str, JSON]
    features: tuple[Feature, ...]
    keys: ById | InOrder


def blocks(begins: Array, ends: Array, gap: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges [i, j) of ascending intervals that are read in one piece.

    Intervals that are at most `gap` apart go together, up to 64 MiB: one long read costs less than many short ones.

    Args:
        begins: (n,) first of each interval.
        ends: (n,) behind the last.
        gap: what may be read in vain between two.
        row_bytes: bytes of one unit.
    """
    first = 0
    most = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for place in range(1, len(begins) + 1):
        if place < len(begins):
            near = 0 <= begins[place] - ends[place - 1] <= gap
            if near and ends[place] - begins[first] <= most:
                continue
        yield first, place
        first = place


def output_of(name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], modality: Modality, where: str) -> Output:
    """The output that rows of a fixed shape are stored as.

    Parts of captions are always ragged, because towers read them so. Whole numbers of images are for ragged rows only.

    Raises:
        DataError: a row's shape or dtype is none that a tower reads.
    """
    whole = dtype.kind in "iu"
    if dtype.kind != "f" and not (whole and modality == "text"):
        raise DataError(f"{where}: found values of type {dtype}, expected floating point numbers")
    if len(shape) not in (1, 2) or 0 in shape[-1:]:
        raise DataError(
            f"{where}: found rows of shape {shape}, expected (D,), one vector a row, or (K, D), K parts a row"
        )
    ragged = modality == "text" and (len(shape) == 2 or whole)
    return Output(name, shape[1:] if ragged else shape, ragged=ragged, dtype="int32" if whole else "float16")


def ragged_output(
    name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], modality: Modality, where: str
) -> Output:
    """The output that rows (L_i, *shape) are stored as.

    Raises:
        DataError: see `output_of`; or rows are numbers alone, under the name of an output of vectors.
    """
    if dtype.kind not in "iu":
        output_of(name, (1, *shape), dtype, modality, where)
        if not shape and name not in SCALARS:
            raise DataError(
                f"{where}: found rows that are lists of numbers of any length, expected vectors (D,) of one width, or "
                f"parts (L, D); only {', '.join(SCALARS)} are such lists"
            )
    return Output(name, shape, ragged=True, dtype="int32" if dtype.kind in "iu" else "float16")


def output_names(arrays: Mapping[str, int], modality: Modality, where: str, parts: str) -> dict[str, str]:
    """What the arrays of a file are called here: array -> output.

    A name that encoders use is kept. A single array of another name is "pooled" or "sentence" if it has one vector a
    row, and `parts` or "tokens" if it has several.

    Args:
        arrays: name -> axes of one row.
        modality: whose features they are.
        where: the file, for messages.
        parts: the name of many parts of an image.

    Raises:
        DataError: several arrays, and a name that says nothing.
    """
    check_names(arrays, modality, where)
    if all(name in NAMES[modality] for name in arrays):
        return {name: name for name in arrays}
    (name, axes), *_ = arrays.items()
    by_axes = {"image": ("pooled", parts), "text": ("sentence", "tokens")}[modality]
    return {name: by_axes[axes >= 2]}


def check_names(names: Collection[str], modality: Modality, where: str) -> None:
    """Refuse arrays that are not called as encoders call their outputs, unless there is only one.

    Raises:
        DataError: none; or several, and a name that says nothing.
    """
    known = NAMES[modality]
    if not names or (len(names) > 1 and not all(name in known for name in names)):
        raise DataError(
            f"{where}: found the arrays {listed(names, repr) or '(none)'}, expected one array, or names out of "
            f"{', '.join(known)}; rename them"
        )


def listed(names: Iterable[str], text: Callable[[str], str] = str) -> str:
    """The first names as a message shows them, and how many there are if that is not all.

    Args:
        names: any number of them.
        text: what is shown of one.
    """
    every = list(names)
    more = f", ... ({len(every)} in all)" if len(every) > _SHOWN else ""
    return ", ".join(map(text, every[:_SHOWN])) + more


def mean_of(feature: Feature) -> Feature:
    """The feature "pooled": the mean over a row's parts."""

    def read(rows: Array) -> Iterator[Array]:
        for parts in feature.read(rows):
            if len(parts):
                yield parts.mean(0, dtype=np.float32)
            else:
                yield np.full(parts.shape[1:], np.nan, np.float32)

    return Feature(Output("pooled", feature.output.shape[-1:]), read)


def rows_of(array: Array) -> Callable[[Array], Iterator[Array]]:
    """A reader of an array's rows; a mapped one is read where it is asked for."""
    return lambda rows: (array[row] for row in rows.tolist())


def end_to_end(arrays: Sequence[Array]) -> Callable[[Array], Iterator[Array]]:
    """A reader of the rows of several arrays, one behind the other."""
    return _reader([rows_of(array) for array in arrays], np.cumsum([0, *(len(array) for array in arrays)]))


def joined(sources: Sequence[Source], path: Path) -> Source:
    """Several files of one layout as one source, end to end.

    Raises:
        DataError: the files differ in layout, or one of several has no ids.
    """
    if len(sources) == 1:
        return sources[0]
    ids: list[str] = []
    starts = [0]
    for source in sources:
        if not isinstance(source.keys, ById):
            raise DataError(f"{path}: several files whose rows have no ids; expected ids beside each, or one file")
        ids += source.keys.ids
        starts.append(len(ids))
    return Source(sources[0].layout, _joined_features(sources, np.array(starts), path), ById(ids))


def _joined_features(sources: Sequence[Source], starts: Array, path: Path) -> tuple[Feature, ...]:
    features = []
    for number, first in enumerate(sources[0].features):
        same = [source.features[number] for source in sources if len(source.features) == len(sources[0].features)]
        if len(same) != len(sources) or len({_of_parts(one.output) for one in same}) > 1:
            listed = "; ".join(
                ", ".join(f"{one.output.name} {one.output.shape}" for one in source.features) for source in sources
            )
            raise DataError(f"{path}: expected files of one layout, found {listed}")
        one_shape = len({one.output for one in same}) == 1
        output = first.output if one_shape else ragged_of(first.output)
        features.append(Feature(output, _reader([one.read for one in same], starts)))
    return tuple(features)


def _reader(reads: Sequence[Callable[[Array], Iterator[Array]]], starts: Array) -> Callable[[Array], Iterator[Array]]:
    def read(rows: Array) -> Iterator[Array]:
        owner = np.searchsorted(starts, rows, side="right") - 1
        for number, one in enumerate(reads):
            yield from one(rows[owner == number] - starts[number])

    return read


def ragged_of(output: Output) -> Output:
    """An output (K, D), with the number of parts left open; a ragged one is returned as it is."""
    return output if output.ragged else replace(output, shape=output.shape[1:], ragged=True)


def _of_parts(output: Output) -> tuple[str, tuple[int, ...]]:
    """What must be equal in all files: name and width; the number of parts may differ."""
    return output.name, output.shape[-1:] if len(output.shape) == 2 else output.shape
