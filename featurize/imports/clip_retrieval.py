"""The folder that clip-retrieval's inference writes.

github.com/rom1504/clip-retrieval: `img_emb/img_emb_0.npy` (N, D), `text_emb/text_emb_0.npy` (N, D) and
`metadata/metadata_0.parquet` with N rows: image_path, for webdatasets the key; caption; key. A row is an image with one
caption, so images with several captions are there several times.
"""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from featurize.datasets.sample import DataError
from featurize.imports.arrays import load_npy
from featurize.imports.ids import as_ids
from featurize.imports.source import ById, Feature, Modality, Source, end_to_end, output_of

_ARRAYS = {"image": "img_emb", "text": "text_emb"}
_OUTPUTS = {"image": "pooled", "text": "sentence"}
_IDS = ("image_id", "image_path", "key")
_NUMBER = re.compile(r"_(\d+)$")


def files_of(folder: Path, modality: Modality) -> tuple[Path, ...]:
    """The files of such a folder that hold a modality; none where it is another folder."""
    name = _ARRAYS[modality]
    if not any((folder / other).is_dir() for other in _ARRAYS.values()):
        return ()
    return (*_numbered(folder / name, ".npy"), *_numbered(folder / "metadata", ".parquet"))


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """Files by their numbers: 2 before 10."""
    found = [(int(number[1]), file) for file in folder.glob(f"*{suffix}") if (number := _NUMBER.search(file.stem))]
    return [file for _, file in sorted(found)]


def open_clip_retrieval(path: Path, modality: Modality) -> Source:
    """Such a folder with the output "pooled" of images or "sentence" of captions.

    Raises:
        DataError: a part is missing, or parts do not fit each other.
    """
    name = _ARRAYS[modality]
    arrays, tables = _numbered(path / name, ".npy"), _numbered(path / "metadata", ".parquet")
    if not arrays or [_part(file) for file in arrays] != [_part(file) for file in tables]:
        raise DataError(
            f"{path}: found the parts {[_part(file) for file in arrays]} of {name} and "
            f"{[_part(file) for file in tables]} of metadata, expected the same, one or more"
        )
    opened = [load_npy(file) for file in arrays]
    ids: list[str] = []
    captions: list[str] | None = []
    for array, file, table in zip(opened, arrays, tables, strict=True):
        if array.ndim != 2 or array.shape[1:] != opened[0].shape[1:]:
            raise DataError(f"{file}: found the shape {array.shape}, expected (N, D), D as in {arrays[0].name}")
        names, texts = _metadata(table)
        if len(names) != len(array):
            raise DataError(f"{file}: {len(array)} rows, but {table.name} has {len(names)}")
        ids += names
        captions = None if captions is None or texts is None else captions + texts
    if modality == "text" and captions is None:
        raise DataError(f"{path}: no column 'caption' in metadata, which says whose text a row is")
    output = output_of(_OUTPUTS[modality], opened[0].shape[1:], opened[0].dtype, modality, str(arrays[0]))
    keys = ById(ids, captions if modality == "text" else None, repeated=True)
    return Source({"format": "clip-retrieval"}, (Feature(output, end_to_end(opened)),), keys)


def _part(file: Path) -> int:
    number = _NUMBER.search(file.stem)
    return int(number[1]) if number else -1


def _metadata(file: Path) -> tuple[list[str], list[str] | None]:
    """The ids and captions of a part."""
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: not a Parquet file ({error})") from error
    found = [name for name in _IDS if name in table.column_names]
    if not found:
        raise DataError(
            f"{file}: found the columns {', '.join(table.column_names)}, expected one of {', '.join(_IDS)} to say "
            "whose rows these are"
        )
    ids = as_ids(table.column(found[0]).to_pylist(), f"{file}, {found[0]}")
    if "caption" not in table.column_names:
        return ids, None
    return ids, [str(caption) for caption in table.column("caption").to_pylist()]
