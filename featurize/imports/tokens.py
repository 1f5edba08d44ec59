"""Tokens of a vision transformer as .npz or .npy: a file an image (its name is the id), or an .npz with an array an id.

An array is (L, D), tokens, or (D,), one vector. An .npz an image may hold several arrays, called as encoders call their
outputs. Of .npy are, for example, the cocobu_fc (D,) and cocobu_att (K, D) of github.com/ruotianluo.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from featurize.datasets.sample import DataError
from featurize.encoder import Output
from featurize.imports.arrays import OFFSETS, open_rows_npz
from featurize.imports.ids import COLUMNS, file_beside
from featurize.imports.source import NAMES, ById, Feature, Modality, Source, listed, output_names, output_of, ragged_of
from featurize.shards import Array

KIND = "npz 1"
"""Of the table of shapes, for the memory; its number rises when the table changes."""


def members(path: Path) -> list[str]:
    """The arrays of an .npz.

    Raises:
        DataError: it is none.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not an npz file ({error})") from error


def holds_rows(names: Sequence[str], modality: Modality) -> bool:
    """Whether an .npz with arrays of these names has a row an image in each, and not an array an image."""
    return len(names) == 1 or any(name in COLUMNS for name in names) or all(name in NAMES[modality] for name in names)


def open_npz(path: Path, modality: Modality, table: Callable[[], Mapping[str, Array]]) -> Source:
    """One .npz: rows of arrays, or an array an id.

    Args:
        path: the file.
        modality: whose features it holds.
        table: gives `read_shapes` of it, for an array an id.

    Raises:
        DataError: its arrays do not fit each other or hold pickles.
    """
    names = members(path)
    if not names:
        raise DataError(f"{path}: holds no arrays")
    if holds_rows(names, modality):
        return open_rows_npz(path, {name: _array(path, name) for name in names}, modality)
    shapes = table()

    def read(rows: Array) -> Iterator[Array]:
        with zipfile.ZipFile(path) as file:
            for row in rows.tolist():
                yield _member(file, names[row], path)

    return _source("npz by id", {"": shapes["shapes"]}, {"": read}, names, str(shapes["dtype"]), modality, path)


def open_npz_folder(
    path: Path, files: Sequence[Path], modality: Modality, table: Callable[[], Mapping[str, Array]]
) -> Source:
    """A folder of .npz files, one an image.

    Args:
        path: the folder.
        files: in it.
        modality: whose features they hold.
        table: gives `read_shapes_of` of them.

    Raises:
        DataError: the files hold different arrays, or arrays that do not fit each other.
    """
    shapes = table()
    names = shapes["names"].tolist()

    def reader(name: str) -> Callable[[Array], Iterator[Array]]:
        return lambda rows: (_array(files[row], name) for row in rows.tolist())

    of_arrays = {name: shapes["shapes"][:, number] for number, name in enumerate(names)}
    readers = {name: reader(name) for name in names}
    return _source("npz by id", of_arrays, readers, [file.stem for file in files], str(shapes["dtype"]), modality, path)


def is_array_an_id(files: Sequence[Path]) -> bool:
    """Whether the .npy files of a folder are an image's each, and not a row an image in each.

    So it is where there are several, none is called as encoders call their outputs, and there are no ids or offsets.
    """
    stems = [file.stem for file in files]
    of_rows = {*COLUMNS, *(name for names in NAMES.values() for name in names)}
    return (
        len(stems) > 1
        and of_rows.isdisjoint(stems)
        and not any(stem.endswith(OFFSETS) for stem in stems)
        and file_beside(files[0].with_name("_.npy")) is None
    )


def open_npy_by_id(
    path: Path, files: Sequence[Path], modality: Modality, table: Callable[[], Mapping[str, Array]]
) -> Source:
    """A folder of .npy files, one an image.

    Args:
        path: the folder.
        files: in it.
        modality: whose features they hold.
        table: gives `read_npy_shapes` of them.

    Raises:
        DataError: a file is no npy, or arrays do not fit each other.
    """
    shapes = table()

    def read(rows: Array) -> Iterator[Array]:
        for row in rows.tolist():
            with files[row].open("rb") as file:
                yield read_npy(file, str(files[row]))

    ids = [file.stem for file in files]
    return _source("npy by id", {"": shapes["shapes"]}, {"": read}, ids, str(shapes["dtype"]), modality, path)


def read_shapes(path: Path) -> dict[str, Array]:
    """The shapes of an npz's arrays: "shapes" (n, 2) int64, -1 for an axis that is not there; "dtype" of the first."""
    with zipfile.ZipFile(path) as file:
        found = [_member_header(file, name, path) for name in members(path)]
    return {"shapes": np.array([shape for shape, _ in found], np.int64), "dtype": np.array(found[0][1])}


def read_npy_shapes(files: Sequence[Path]) -> dict[str, Array]:
    """The same of .npy files."""
    found = []
    for path in files:
        with path.open("rb") as file:
            found.append(_header(file, str(path)))
    return {"shapes": np.array([shape for shape, _ in found], np.int64), "dtype": np.array(found[0][1])}


def read_shapes_of(files: Sequence[Path]) -> dict[str, Array]:
    """The shapes of the arrays of many files.

    Returns:
        "shapes" (files, arrays, 2) int64, "names" (arrays,) of the arrays, "dtype" of the first.

    Raises:
        DataError: a file holds other arrays than the first.
    """
    names = sorted(members(files[0]))
    shapes: list[list[tuple[int, int]]] = []
    dtype = ""
    for path in files:
        own = sorted(members(path))
        if own != names:
            raise DataError(f"{path}: holds {listed(own)}, but {files[0].name} holds {listed(names)}")
        with zipfile.ZipFile(path) as file:
            found = [_member_header(file, name, path) for name in names]
        shapes.append([shape for shape, _ in found])
        dtype = dtype or found[0][1]
    return {"shapes": np.array(shapes, np.int64), "names": np.array(names), "dtype": np.array(dtype)}


def _source(
    layout: str,
    shapes: Mapping[str, Array],
    readers: Mapping[str, Callable[[Array], Iterator[Array]]],
    ids: Sequence[str],
    dtype: str,
    modality: Modality,
    path: Path,
) -> Source:
    axes = {name: int((found[0] >= 0).sum()) for name, found in shapes.items()}
    names = output_names(axes, modality, str(path), "tokens")
    features = []
    for name, found in shapes.items():
        output = _output(names[name], found, np.dtype(dtype), modality, ids, f"{path}, {name or 'arrays'}")
        features.append(Feature(output, readers[name]))
    return Source({"format": layout}, tuple(features), ById(ids))


def _output(
    name: str, shapes: Array, dtype: np.dtype[Any], modality: Modality, ids: Sequence[str], where: str
) -> Output:
    """One shape for all rows, or one width and a length of their own each.

    Raises:
        DataError: rows of other widths or axes than the first.
    """
    other = np.flatnonzero((shapes[:, -1] != shapes[0, -1]) | ((shapes[:, 0] < 0) != (shapes[0, 0] < 0)))
    if len(other):
        row = int(other[0])
        raise DataError(
            f"{where}: {ids[row]!r} has the shape {_shape(shapes[row])}, but {ids[0]!r} has {_shape(shapes[0])}; "
            "expected one width in all"
        )
    output = output_of(name, _shape(shapes[0]), dtype, modality, where)
    return ragged_of(output) if len(np.unique(shapes[:, 0])) > 1 else output


def _shape(axes: Array) -> tuple[int, ...]:
    return tuple(int(axis) for axis in axes if axis >= 0)


def _member_header(file: zipfile.ZipFile, name: str, path: Path) -> tuple[tuple[int, int], str]:
    with file.open(f"{name}.npy") as member:
        return _header(member, f"{path}, {name}")


def _header(file: Any, where: str) -> tuple[tuple[int, int], str]:
    """Shape of one array without its values: (L, D), or (-1, D) of a vector; and its dtype."""
    shape, dtype = npy_header(file, where)
    if len(shape) not in (1, 2) or dtype.kind not in "fiu":
        raise DataError(f"{where}: found {dtype} of shape {shape}, expected numbers (L, D) or (D,), an array an id")
    return ((-1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])), dtype.str


def npy_header(file: Any, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an npy stream, which is left at its values.

    Raises:
        DataError: it is no npy.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{where}: not an npy array ({error})") from error
    return shape, dtype


def _array(path: Path, name: str) -> Array:
    with zipfile.ZipFile(path) as file:
        return _member(file, name, path)


def _member(file: zipfile.ZipFile, name: str, path: Path) -> Array:
    with file.open(f"{name}.npy") as member:
        return read_npy(member, f"{path}, {name}")


def read_npy(member: BinaryIO | Any, where: str) -> Array:
    """An npy stream, never unpickled.

    Raises:
        DataError: it is no npy of plain numbers or text.
    """
    try:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: not an npy array of plain numbers ({error})") from error
    return array
