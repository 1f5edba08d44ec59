"""Webdataset tars of features, as `cache export --format webdataset` writes: KEY.OUTPUT.npy members, and KEY.json.

The id is `id` in the sample's json, else its key.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featurize.datasets.sample import DataError
from featurize.encoder import Output
from featurize.imports.source import NAMES, ById, Feature, Modality, Source, output_of, ragged_of, ragged_output
from featurize.imports.tokens import npy_header, read_npy
from featurize.shards import Array

KIND = "tar 1"
"""Of the table of members, for the memory; its number rises when the table changes."""


def open_tars(path: Path, files: Sequence[Path], modality: Modality, table: Mapping[str, Array]) -> Source:
    """Tars with the outputs that their members are called.

    Args:
        path: a tar or a folder of tars.
        files: the tars.
        modality: whose features they hold.
        table: `read_members` of them.

    Raises:
        DataError: members of one name differ in width.
    """
    ids = table["ids"].tolist()
    features = []
    for name in NAMES[modality]:
        if f"{name}.offset" in table:
            where = f"{path}, {name}"
            output = _output(name, table[f"{name}.shape"], table[f"{name}.dtype"].tolist(), modality, where)
            features.append(Feature(output, _reader(files, table["owner"], table[f"{name}.offset"], where)))
    if not features:
        raise DataError(f"{path}: found no members KEY.OUTPUT.npy, expected OUTPUT out of {', '.join(NAMES[modality])}")
    return Source({"format": "webdataset"}, tuple(features), ById(ids))


def read_members(files: Sequence[Path]) -> dict[str, Array]:
    """Where each sample's arrays stand.

    Returns:
        "ids" (n,) text, "owner" (n,) int64 which of the files; for each output NAME "NAME.offset" (n,) int64 of the
        npy, "NAME.shape" (n, 3) int64 with -1 for an axis that is not there, and "NAME.dtype" (n,) text.

    Raises:
        DataError: a file is no tar, or a sample lacks an output that others have.
    """
    samples: dict[tuple[int, str], dict[str, Any]] = {}
    for number, path in enumerate(files):
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    _note(tar, member, samples.setdefault((number, _key(member.name)), {}), path)
        except tarfile.TarError as error:
            raise DataError(f"{path}: not a tar ({error})") from error
    known = {name for names in NAMES.values() for name in names}
    found = {sample_key: sample for sample_key, sample in samples.items() if known & sample.keys()}
    names = sorted(known & set().union(*found.values()))
    for (number, key), sample in found.items():
        lacking = [name for name in names if name not in sample]
        if lacking:
            raise DataError(f"{files[number]}: sample {key!r} has no {lacking[0]!r}, which other samples have")
    table = {
        "ids": np.array([sample.get("id", key) for (_, key), sample in found.items()], np.str_),
        "owner": np.array([number for number, _ in found], np.int64),
    }
    for name in names:
        table[f"{name}.offset"] = np.array([sample[name][0] for sample in found.values()], np.int64)
        table[f"{name}.shape"] = np.array([sample[name][1] for sample in found.values()], np.int64)
        table[f"{name}.dtype"] = np.array([sample[name][2] for sample in found.values()], np.str_)
    return table


def _key(name: str) -> str:
    """The part of a member's name up to the first dot behind the last slash, as webdataset has it."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _note(tar: tarfile.TarFile, member: tarfile.TarInfo, sample: dict[str, Any], path: Path) -> None:
    kind = member.name[len(_key(member.name)) + 1 :]
    file = tar.extractfile(member) if member.isfile() else None
    if file is None:
        return
    where = f"{path}, {member.name}"
    if kind == "json":
        try:
            content = json.load(file)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error})") from error
        if isinstance(content, dict) and "id" in content:
            sample["id"] = str(content["id"])
    elif kind.endswith(".npy"):
        shape, dtype = npy_header(file, where)
        if len(shape) > 3 or dtype.kind not in "fiu":
            raise DataError(f"{where}: found {dtype} of shape {shape}, expected numbers (D,) or (K, D)")
        sample[kind.removesuffix(".npy")] = member.offset_data, (*shape, *[-1] * (3 - len(shape))), dtype.str


def _output(name: str, shapes: Array, dtypes: Sequence[str], modality: Modality, where: str) -> Output:
    first = tuple(int(axis) for axis in shapes[0] if axis >= 0)
    if (shapes[:, 1:] != shapes[0, 1:]).any() or len(set(dtypes)) > 1:
        raise DataError(f"{where}: members of different width or type; expected one in all")
    dtype = np.dtype(dtypes[0])
    if len(first) == 1 and (dtype.kind in "iu" or (shapes[:, 0] != first[0]).any()):
        return ragged_output(name, (), dtype, modality, where)
    if (shapes[:, 0] != first[0]).any():
        return ragged_of(output_of(name, first, dtype, modality, where))
    return output_of(name, first, dtype, modality, where)


def _reader(files: Sequence[Path], owner: Array, offsets: Array, where: str) -> Callable[[Array], Iterator[Array]]:
    def read(rows: Array) -> Iterator[Array]:
        for number in dict.fromkeys(owner[rows].tolist()):  # in the order of the rows, which is that of the files
            with files[number].open("rb") as file:
                for row in rows[owner[rows] == number].tolist():
                    file.seek(int(offsets[row]))
                    yield read_npy(file, where)

    return read
