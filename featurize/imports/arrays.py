"""Plain arrays: .npy, .npz or .safetensors, whose rows are the data set's rows or have ids.

Ids are an array `ids` in the file, or a file beside it (`featurize.imports.ids`); without them rows are told by their
position. A folder of .npy files is what `cache export --format npy` writes: NAME.npy (N, ...) or, of rows of different
length, NAME.npy (sum, ...) and NAME.offsets.npy (N + 1); and ids.npy. An .npz, or a folder of .npy, without ids whose
arrays are not called as encoders call their outputs holds one array an image, by id: see `featurize.imports.tokens`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from featurize.datasets.sample import DataError
from featurize.imports.ids import COLUMNS, as_ids, check_count, file_beside, read_ids
from featurize.imports.source import (
    ById,
    Feature,
    InOrder,
    Modality,
    Part,
    Source,
    blocks,
    check_names,
    output_names,
    output_of,
    ragged_output,
    rows_of,
)
from featurize.shards import Array

OFFSETS = ".offsets"


def open_npy(path: Path, modality: Modality) -> Source:
    """An .npy of the data set's rows; mapped, so only what is asked for is read."""
    return _mapped({path.stem: path}, {}, path, modality, file_beside(path))


def open_npy_folder(path: Path, files: tuple[Path, ...], modality: Modality) -> Source:
    """A folder as `cache export --format npy` writes it.

    Raises:
        DataError: see `open_npy`.
    """
    arrays = {file.stem: file for file in files if file.suffix == ".npy" and file.stem != "ids"}
    offsets = {name.removesuffix(OFFSETS): arrays.pop(name) for name in list(arrays) if name.endswith(OFFSETS)}
    return _mapped(arrays, offsets, path, modality, file_beside(path / "_.npy"))


def load_npy(path: Path) -> Array:
    """An .npy file, mapped and never unpickled.

    Raises:
        DataError: it is none.
    """
    try:
        loaded: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not an npy file of plain numbers ({error})") from error
    return loaded


def _mapped(
    files: Mapping[str, Path], offsets: Mapping[str, Path], path: Path, modality: Modality, ids: Path | None
) -> Source:
    check_names(files, modality, str(path))  # a system maps only some ten thousand files
    arrays = {name: load_npy(file) for name, file in files.items()}
    ends = {name: load_npy(file).astype(np.int64) for name, file in offsets.items()}
    _check_axes({name: array.shape for name, array in arrays.items()}, str(path))
    names = output_names(
        {name: array.ndim - (name not in ends) for name, array in arrays.items()}, modality, str(path), "regions"
    )
    features, counts = [], {}
    for name, array in arrays.items():
        where = f"{path}, {name}"
        if name in ends:
            counts[name] = len(ends[name]) - 1
            _check_offsets(ends[name], len(array), where)
            output = ragged_output(names[name], array.shape[1:], array.dtype, modality, where)
            features.append(Feature(output, _between(array, ends[name])))
        else:
            counts[name] = len(array)
            output = output_of(names[name], array.shape[1:], array.dtype, modality, where)
            features.append(Feature(output, rows_of(array)))
    return _source({"format": "npy"}, features, counts, path, None if ids is None else (read_ids(ids), str(ids)))


def _between(array: Array, ends: Array) -> Callable[[Array], Iterator[Array]]:
    return lambda rows: (array[ends[row] : ends[row + 1]] for row in rows.tolist())


def _check_offsets(ends: Array, rows: int, where: str) -> None:
    if ends.ndim != 1 or not len(ends) or ends[0] != 0 or ends[-1] != rows or (np.diff(ends) < 0).any():
        raise DataError(f"{where}: offsets must rise from 0 to the {rows} rows of the values")


def _check_axes(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, shape in shapes.items():
        if not shape:
            raise DataError(f"{where}, {name}: found a single number, expected an array with a row for each image")


def _source(
    layout: Mapping[str, str],
    features: list[Feature],
    counts: Mapping[str, int],
    path: Path,
    ids: tuple[list[str], str] | None,
) -> Source:
    if len(set(counts.values())) > 1:
        raise DataError(f"{path}: arrays of different length: {dict(counts)}; expected the same rows in all")
    rows = next(iter(counts.values()))
    if ids is None:
        return Source(layout, tuple(features), InOrder((Part(path, "", 0, rows),)))
    check_count(ids[0], rows, ids[1])
    return Source(layout, tuple(features), ById(ids[0]))


def open_rows_npz(path: Path, arrays: Mapping[str, Array], modality: Modality) -> Source:
    """An .npz whose arrays hold the data set's rows; arrays are read whole.

    Raises:
        DataError: an array's shape or name, or the number of ids, does not fit.
    """
    own = next((name for name in COLUMNS if name in arrays), None)
    beside = file_beside(path)
    ids = None
    if own is not None:
        ids = as_ids(arrays[own], f"{path}, {own}"), f"{path}, {own}"
    elif beside is not None:
        ids = read_ids(beside), str(beside)
    values = {name: array for name, array in arrays.items() if name != own}
    _check_axes({name: array.shape for name, array in values.items()}, str(path))
    names = output_names({name: array.ndim - 1 for name, array in values.items()}, modality, str(path), "regions")
    features = [
        Feature(output_of(names[name], array.shape[1:], array.dtype, modality, f"{path}, {name}"), rows_of(array))
        for name, array in values.items()
    ]
    return _source({"format": "npz"}, features, {name: len(array) for name, array in values.items()}, path, ids)


def open_safetensors(path: Path, modality: Modality) -> Source:
    """A .safetensors of the data set's rows; a tensor `ids` of whole numbers, or a file beside it, names them.

    Raises:
        DataError: it is not such a file, or its tensors do not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
            own = next((name for name in COLUMNS if name in shapes), None)
            _check_axes(shapes, str(path))
            dtypes = {name: _as_numpy(file.get_slice(name)[:0]).dtype for name in shapes}
            numbers = None if own is None else _as_numpy(file.get_tensor(own))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a safetensors file ({error})") from error
    beside = file_beside(path)
    ids = None
    if numbers is not None:
        ids = as_ids(numbers, f"{path}, {own}"), f"{path}, {own}"
    elif beside is not None:
        ids = read_ids(beside), str(beside)
    shapes.pop(own or "", None)
    names = output_names({name: len(shape) - 1 for name, shape in shapes.items()}, modality, str(path), "regions")

    def slices(name: str) -> Callable[[Array], Iterator[Array]]:
        def read(rows: Array) -> Iterator[Array]:
            row_bytes = 4 * int(np.prod(shapes[name][1:]))
            with safe_open(path, "pt") as file:
                for first, last in blocks(rows, rows + 1, 0, row_bytes):
                    start = int(rows[first])
                    block = _as_numpy(file.get_slice(name)[start : int(rows[last - 1]) + 1])
                    yield from (block[row - start] for row in rows[first:last])

        return read

    features = [
        Feature(output_of(names[name], shape[1:], dtypes[name], modality, f"{path}, {name}"), slices(name))
        for name, shape in shapes.items()
    ]
    return _source({"format": "safetensors"}, features, {name: shape[0] for name, shape in shapes.items()}, path, ids)


def _as_numpy(tensor: object) -> Array:
    """A tensor of safetensors as an array; numpy has no bfloat16, so that becomes float32."""
    import torch

    assert isinstance(tensor, torch.Tensor)
    found: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found
