"""HDF5 files: bottom-up attention as it is usually converted, and what `cache export --format h5` writes.

Bottom-up attention (hengyuan-hu/bottom-up-attention-vqa): `image_features` (N, 36, 2048), `spatial_features` (N, 36, 6)
x1, y1, x2, y2, width, height in shares of the image, and `image_bb` (N, 36, 4) in pixels; with 10 to 100 boxes an image
`image_features` (sum, 2048), ... and `pos_boxes` (N, 2), first and end of each image's boxes. Their ids are in a pickle
beside the file, which is not read.

Export: each output a dataset (N, ...) of its name, or a group of `values` (sum, ...) and `offsets` (N + 1); and `ids`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurize.datasets.sample import DataError
from featurize.encoder import Output
from featurize.imports.ids import COLUMNS, as_ids, check_count, file_beside, read_ids
from featurize.imports.source import (
    NAMES,
    ById,
    Feature,
    InOrder,
    Modality,
    Part,
    Source,
    blocks,
    listed,
    mean_of,
    output_of,
    ragged_output,
)
from featurize.shards import Array

VALUES, OFFSETS = "values", "offsets"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not an HDF5 file ({error})") from error
    with file:
        yield file


def open_h5(path: Path, modality: Modality) -> Source:
    """An HDF5 file; which of the two kinds shows in its datasets.

    Raises:
        DataError: it is neither, its datasets do not fit each other, or there are no ids but a pickle.
    """
    with _opened(path) as file:
        if "image_features" in file:
            layout, features, rows = _bottom_up(path, file, modality)
        else:
            layout, features, rows = _exported(path, file, modality)
        keys = _keys(path, file, rows)
    return Source(layout, features, keys)


def _keys(path: Path, file: Any, rows: int) -> ById | InOrder:
    for name in COLUMNS:
        if name in file:
            ids = as_ids(file[name][()], f"{path}, {name}")
            check_count(ids, rows, f"{path}, {name}")
            return ById(ids)
    beside = file_beside(path)
    if beside is not None:
        ids = read_ids(beside)
        check_count(ids, rows, str(beside))
        return ById(ids)
    _refuse_pickles(path)
    return InOrder((Part(path, "", 0, rows),))


def _refuse_pickles(path: Path) -> None:
    """Let no rows be told by position where their ids are in a pickle.

    Raises:
        DataError: there are pickles of ids beside the file; where it is plain which one, the message has the command
            that converts it.
    """
    pickles = sorted(file.name for file in path.parent.glob("*imgid2idx.pkl"))
    own, wanted = f"{path.stem}_imgid2idx.pkl", f"{path.stem}_imgid2idx.json"
    if not pickles:
        return
    if own not in pickles and len(pickles) > 1:
        raise DataError(
            f"{path}: found no ids but in pickles, which may run any code and are never read: {listed(pickles)}; none "
            f"is called {own}. Write the ids of the one that belongs to this file as JSON: {wanted}"
        )
    found = own if own in pickles else pickles[0]
    raise DataError(
        f"{path}: its ids are in {found}, a pickle, which may run any code and is never read. Where it is trusted, "
        f"write them as JSON beside it: python -c \"import json, pickle; json.dump(pickle.load(open('{found}', 'rb')), "
        f"open('{wanted}', 'w'))\""
    )


def _bottom_up(path: Path, file: Any, modality: Modality) -> tuple[dict[str, Any], tuple[Feature, ...], int]:
    if modality != "image":
        raise DataError(f"{path}: holds features of images' regions, expected features of captions")
    features = file["image_features"]
    bounds = None
    if "pos_boxes" in file:
        bounds = file["pos_boxes"][()].astype(np.int64)
        _check_bounds(path, bounds, features.shape[0])
    if features.ndim != (3 if bounds is None else 2):
        extra = "; with (boxes, D) there must be pos_boxes" if features.ndim == 2 else ""
        expected = "(images, boxes, D)" if bounds is None else "(boxes, D) beside pos_boxes"
        raise DataError(f"{path}: image_features has the shape {features.shape}, expected {expected}{extra}")
    arrays = {"regions": _feature(path, file, "image_features", "regions", bounds)}
    if "spatial_features" in file:
        spatial = file["spatial_features"]
        if spatial.shape[:-1] != features.shape[:-1] or spatial.shape[-1] != 6:
            raise DataError(
                f"{path}: spatial_features has the shape {spatial.shape}, expected {(*features.shape[:-1], 6)}, as "
                "image_features has"
            )
        arrays["spatial"] = _feature(path, file, "spatial_features", "spatial", bounds)
        arrays["boxes"] = _corners(arrays["spatial"])
    pooled = mean_of(arrays["regions"])
    layout = {"format": "bottom-up attention, h5", "boxes": "of spatial_features", "pooled": "mean of regions"}
    return layout, (*arrays.values(), pooled), len(features) if bounds is None else len(bounds)


def _check_bounds(path: Path, bounds: Array, boxes: int) -> None:
    good = bounds.ndim == 2 and bounds.shape[1] == 2 and bool(len(bounds))
    if not (good and (bounds[:, 0] <= bounds[:, 1]).all() and bounds.min() >= 0 and bounds.max() <= boxes):
        raise DataError(f"{path}: pos_boxes must be (images, 2), first and end of each image's rows among {boxes}")


def _corners(spatial: Feature) -> Feature:
    def read(rows: Array) -> Iterator[Array]:
        return (values[:, :4] for values in spatial.read(rows))

    return Feature(Output("boxes", (*spatial.output.shape[:-1], 4), ragged=spatial.output.ragged), read)


def _exported(path: Path, file: Any, modality: Modality) -> tuple[dict[str, Any], tuple[Feature, ...], int]:
    features: list[Feature] = []
    counts: dict[str, int] = {}
    for name in NAMES[modality]:
        if name not in file:
            continue
        if isinstance(file[name], h5py.Group):
            if VALUES not in file[name] or OFFSETS not in file[name]:
                raise DataError(
                    f"{path}: the group {name!r} holds {listed(file[name]) or 'nothing'}, expected {VALUES} and "
                    f"{OFFSETS}"
                )
            ends = file[name][OFFSETS][()].astype(np.int64)
            bounds = np.stack([ends[:-1], ends[1:]], 1)
            _check_bounds(path, bounds, len(file[name][VALUES]))
            features.append(_feature(path, file, f"{name}/{VALUES}", name, bounds, modality))
            counts[name] = len(bounds)
        else:
            features.append(_feature(path, file, name, name, None, modality))
            counts[name] = len(file[name])
    if not features:
        found = listed(file, lambda name: f"{name} {getattr(file[name], 'shape', '(group)')}")
        raise DataError(
            f"{path}: found the datasets {found or 'none'}; expected image_features, as bottom-up attention has it, or "
            f"some of {', '.join(NAMES[modality])}"
        )
    if len(set(counts.values())) > 1:
        raise DataError(f"{path}: datasets of different length: {counts}; expected the same rows in all")
    return {"format": "h5"}, tuple(features), next(iter(counts.values()))


def _feature(
    path: Path, file: Any, dataset: str, name: str, bounds: Array | None, modality: Modality = "image"
) -> Feature:
    """Rows of one dataset; `bounds` (N, 2) says which of its rows belong together."""
    found = file[dataset]
    shape, where = found.shape[1:], f"{path}, {dataset}"
    row_bytes = int(np.prod(shape)) * found.dtype.itemsize
    gap = found.chunks[0] if found.chunks else 0  # a chunk is read whole, so what lies in it costs nothing more
    if bounds is None:
        output = output_of(name, shape, found.dtype, modality, where)
    elif len(counts := set((bounds[:, 1] - bounds[:, 0]).tolist())) == 1 and found.dtype.kind == "f":
        output = output_of(name, (*counts, *shape), found.dtype, modality, where)
    else:
        output = ragged_output(name, shape, found.dtype, modality, where)
    return Feature(output, slices_of(path, dataset, bounds, gap, row_bytes))


def slices_of(
    path: Path, dataset: str, bounds: Array | None, gap: int, row_bytes: int
) -> Callable[[Array], Iterator[Array]]:
    """A reader of a dataset's rows in as few contiguous slices as may be.

    Single rows of a chunked dataset at random cost a chunk each (benchmarks/bench_imports.py).

    Args:
        path: of the file.
        dataset: in it.
        bounds: (N, 2) first and end of what is a row; None: row i is row i.
        gap: rows between two wanted ones that are read rather than skipped.
        row_bytes: of one row of the dataset.
    """

    def read(rows: Array) -> Iterator[Array]:
        begins, ends = (rows, rows + 1) if bounds is None else (bounds[rows, 0], bounds[rows, 1])
        with _opened(path) as file:
            values = file[dataset]
            for first, last in blocks(begins, ends, gap, row_bytes):
                start = int(begins[first])
                block = values[start : int(ends[last - 1])]
                for begin, end in zip(begins[first:last] - start, ends[first:last] - start, strict=True):
                    yield block[begin] if bounds is None else block[begin:end]

    return read
