"""SCAN's precomputed features: SPLIT_ims.npy, SPLIT_caps.txt, SPLIT_ids.txt.

Lee et al., Stacked Cross Attention, ECCV 2018 (github.com/kuanghuei/SCAN), in the layout of VSE++ (Faghri et al., BMVC
2018): `SPLIT_ims.npy` (N, 36, 2048) or (N, D), or five rows an image, one for each of its captions; `SPLIT_caps.txt`
with one caption a line, five an image; sometimes `SPLIT_ids.txt`, a line for each row or image. Splits are train, dev,
test and, for all of COCO's test images, testall. The order of the rows is the order of the split's images.
"""

from pathlib import Path

from featurize.datasets.sample import SPLIT_NAMES, DataError, open_text
from featurize.imports.arrays import load_npy
from featurize.imports.source import (
    Feature,
    InOrder,
    Modality,
    Part,
    Source,
    end_to_end,
    mean_of,
    output_names,
    output_of,
)

IMAGES, CAPTIONS, IDS = "_ims.npy", "_caps.txt", "_ids.txt"
_REPEATS = 5  # rows that an image has where rows are captions'


def files_of(folder: Path) -> tuple[Path, ...]:
    """The files of such a folder; none where it is another."""
    arrays = sorted(folder.glob(f"*{IMAGES}"))
    texts = (array.with_name(array.name.removesuffix(IMAGES) + end) for array in arrays for end in (CAPTIONS, IDS))
    return (*arrays, *(text for text in texts if text.is_file())) if arrays else ()


def open_scan(path: Path, modality: Modality) -> Source:
    """A folder of such files with the outputs "regions" and their mean, "pooled", or "pooled" alone for vectors.

    Raises:
        DataError: files of different shapes, or texts that do not fit the arrays.
    """
    if modality != "image":
        raise DataError(f"{path}: {IMAGES} files hold features of images, expected features of captions")
    arrays = {file: load_npy(file) for file in sorted(path.glob(f"*{IMAGES}"))}
    if len({array.shape[1:] for array in arrays.values()}) > 1:
        listed = ", ".join(f"{file.name} {array.shape}" for file, array in arrays.items())
        raise DataError(f"{path}: rows of different shapes: {listed}")
    parts: list[Part] = []
    first = 0
    for file, array in arrays.items():
        parts.append(_part(file, len(array), first))
        first += len(array)
    some = next(iter(arrays.values()))
    names = output_names({"ims": some.ndim - 1}, modality, str(path), "regions")
    output = output_of(names["ims"], some.shape[1:], some.dtype, modality, str(path))
    feature = Feature(output, end_to_end(list(arrays.values())))
    features = (feature,) if output.name == "pooled" else (feature, mean_of(feature))
    return Source({"format": "SCAN", "pooled": "mean of regions"}, features, InOrder(tuple(parts)))


def _part(file: Path, rows: int, first: int) -> Part:
    name = file.name.removesuffix(IMAGES)
    split = "test" if name == "testall" else SPLIT_NAMES.get(name, name)
    captions = _lines(file.with_name(name + CAPTIONS))
    ids = _lines(file.with_name(name + IDS))
    repeats = 1
    if captions is not None:
        if len(captions) not in (rows, rows * _REPEATS) or len(captions) % _REPEATS:
            raise DataError(
                f"{file}: {rows} rows beside {len(captions)} captions in {name}{CAPTIONS}; expected as many rows as "
                "captions, or one for five"
            )
        repeats = _REPEATS if len(captions) == rows else 1
    elif ids is not None and rows % _REPEATS == 0 and len(ids) == rows and len(set(ids)) * _REPEATS == rows:
        repeats = _REPEATS
    if ids is not None and len(ids) not in (rows, rows // repeats):
        raise DataError(f"{file}: {rows} rows beside {len(ids)} ids in {name}{IDS}, expected one a row or an image")
    return Part(
        file,
        split,
        first,
        rows,
        repeats,
        None if ids is None else ids[:: len(ids) * repeats // rows],
        None if captions is None else [captions[at : at + _REPEATS] for at in range(0, len(captions), _REPEATS)],
    )


def _lines(file: Path) -> list[str] | None:
    if not file.is_file():
        return None
    with open_text(file) as lines:
        return [line.strip() for line in lines]
