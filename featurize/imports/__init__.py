"""Features that others have extracted, by the reference `import:PATH`: columns of the cache like any other.

    --featurize.images efficientnet-lite0,import:/data/bua.h5

| PATH | rows are told by |
|---|---|
| a .tsv of bottom-up attention (also .tsv.0, ...), or a folder of them | image id |
| .h5, .hdf5 of bottom-up attention or exported; a folder of them | ids in it or beside it, position |
| a folder with SPLIT_ims.npy (SCAN) | position in the split |
| a folder of .npz or .npy, one an image; or one .npz with an array an id | the array's or the file's name |
| a folder with img_emb/, text_emb/ and metadata/ (clip-retrieval) | image_path, caption |
| .npy, .npz, .safetensors, .parquet; a folder of .npy called as encoders' outputs | ids in it or beside it, position |
| a webdataset .tar, or a folder of them | id in the json, key |

Nothing is unpickled. The reader takes the place of an encoder: it has a card, but nothing that could describe a new
picture or text.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featurize.datasets.sample import DataError
from featurize.encoder import Card, EncoderError
from featurize.imports import clip_retrieval, scan, tars, tokens, tsv
from featurize.imports.arrays import open_npy, open_npy_folder, open_safetensors
from featurize.imports.hdf5 import open_h5
from featurize.imports.ids import file_beside
from featurize.imports.parquet import open_parquet
from featurize.imports.reader import FeatureFile, ImportedRows
from featurize.imports.remembered import FileStamp, Memory
from featurize.imports.source import Modality, Source, joined

__all__ = ["FeatureFile", "ImportedRows", "check_imports", "is_import", "open_import"]

PREFIX = "import:"
_READER = 1  # rises when the same file would be read as other values
_KINDS = (
    "a .tsv of bottom-up attention, .h5, .hdf5, .npy, .npz, .safetensors, .parquet or .tar; a folder of .tsv, .h5, "
    ".npz, .npy (one an image, or called as encoders' outputs) or .tar; a folder with SPLIT_ims.npy (SCAN); or one "
    "with img_emb/ and metadata/ (clip-retrieval)"
)


def is_import(reference: str) -> bool:
    """Whether a reference names features in a file, and no network."""
    return reference.startswith(PREFIX)


def card_name(reference: str) -> str:
    """What an import's columns are called: "import:" and the file's or folder's name without extension."""
    return PREFIX + _path(reference).stem


def check_imports(images: Sequence[str], texts: Sequence[str], views: Sequence[str]) -> None:
    """Refuse imports that a run cannot tell apart, or that lack a view it needs.

    Args:
        images: references of images.
        texts: references of captions.
        views: of images that the run describes.

    Raises:
        EncoderError: two imports of one name, or a view besides the plain one.
    """
    for references in (images, texts):
        imports = [reference for reference in references if is_import(reference)]
        name, count = next(iter(Counter(map(card_name, imports)).most_common(1)), ("", 0))
        if count > 1:
            same = ", ".join(reference for reference in imports if card_name(reference) == name)
            raise EncoderError(f"{same}: two imports would be called {name!r}; rename one of the files")
    imported = next(filter(is_import, images), None)
    if imported is not None and tuple(views) != ("plain",):
        raise EncoderError(
            f"{imported} holds one view of each image, but --featurize.views is {','.join(views)}; expected plain, "
            "since all columns of images must have the same views"
        )


def open_import(reference: str, modality: Modality, cache: Path) -> FeatureFile:
    """Opens features in a file; what has been learned of the file before is remembered in the cache.

    Args:
        reference: "import:PATH".
        modality: whether its rows are images or captions.
        cache: folder of all data sets.

    Raises:
        DataError: nothing is at PATH, it is of no known format, or its content is not what the format promises.
    """
    path = _path(reference)
    found = _recognise(path, modality)
    return _open(reference, modality, cache, tuple(map(FileStamp.of, found.files)))


def _path(reference: str) -> Path:
    return Path(reference.removeprefix(PREFIX)).expanduser().absolute()


@functools.lru_cache(maxsize=8)
def _open(reference: str, modality: Modality, cache: Path, files: tuple[FileStamp, ...]) -> FeatureFile:
    """Opened once in a process while the files are as they were."""
    path = _path(reference)
    memory = Memory(cache)
    content = memory.digest(path, files)
    source = _recognise(path, modality).open(memory, content)
    rows = {"image": "images", "text": "captions"}[modality]
    card = Card(
        card_name(reference),
        content,
        {"reader": _READER, "rows": rows, **source.layout},
        tuple(feature.output for feature in source.features),
    )
    return FeatureFile(path, modality, card, source)


@dataclass(frozen=True)
class _Found:
    """What is at a path: all files that are read for it, and how."""

    files: tuple[Path, ...]
    open: Callable[[Memory, str], Source]


def _recognise(path: Path, modality: Modality) -> _Found:
    if not path.exists():
        raise DataError(f"{PREFIX}{path}: there is nothing; expected {_KINDS}")
    if path.is_dir():
        return _recognise_folder(path, modality)
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown format {path.suffix!r}; expected {_KINDS}")
    return _of_kind(kind, path, (path,), modality)


def _kind(path: Path) -> str | None:
    """The format that a file's extension names."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".tsv"] or (suffixes[-2:-1] == [".tsv"] and suffixes[-1][1:].isdecimal()):
        return "tsv"
    kinds = {".h5": "h5", ".hdf5": "h5", ".npy": "npy", ".npz": "npz", ".safetensors": "safetensors"}
    return {**kinds, ".parquet": "parquet", ".tar": "tar"}.get("".join(suffixes[-1:]))


def _recognise_folder(path: Path, modality: Modality) -> _Found:
    files = clip_retrieval.files_of(path, modality)
    if files:
        return _Found(files, lambda *_: clip_retrieval.open_clip_retrieval(path, modality))
    files = scan.files_of(path)
    if files:
        return _Found(files, lambda *_: scan.open_scan(path, modality))
    inside = sorted(file for file in path.iterdir() if file.is_file())
    kinds: dict[str | None, list[Path]] = defaultdict(list)
    for file in inside:
        kinds[_kind(file)].append(file)
    for kind in ("tsv", "h5", "npz", "npy", "tar"):
        if kind in kinds:
            return _of_kind(kind, path, tuple(kinds[kind]), modality)
    names = ", ".join(file.name for file in inside[:5]) or "no files"
    raise DataError(f"{path}: unknown format; found {names}; expected {_KINDS}")


def _of_kind(kind: str, path: Path, files: tuple[Path, ...], modality: Modality) -> _Found:
    """How files of one format are read; those with ids beside them belong to most."""

    def npz(memory: Memory, content: str) -> Source:
        if path.is_dir():
            return tokens.open_npz_folder(
                path, files, modality, lambda: memory.table(content, tokens.KIND, lambda: tokens.read_shapes_of(files))
            )
        return tokens.open_npz(
            path, modality, lambda: memory.table(content, tokens.KIND, lambda: tokens.read_shapes(path))
        )

    def npy(memory: Memory, content: str) -> Source:
        if not path.is_dir():
            return open_npy(path, modality)
        if not tokens.is_array_an_id(files):
            return open_npy_folder(path, files, modality)
        return tokens.open_npy_by_id(
            path, files, modality, lambda: memory.table(content, tokens.KIND, lambda: tokens.read_npy_shapes(files))
        )

    def tar(memory: Memory, content: str) -> Source:
        table = memory.table(content, tars.KIND, lambda: tars.read_members(files))
        return tars.open_tars(path, files, modality, table)

    openers: dict[str, Callable[[Memory, str], Source]] = {
        "tsv": lambda memory, content: _open_tsv(path, files, memory, content, modality),
        "h5": lambda *_: joined([open_h5(file, modality) for file in files], path),
        "npz": npz,
        "npy": npy,
        "safetensors": lambda *_: open_safetensors(path, modality),
        "parquet": lambda *_: open_parquet(path, modality),
        "tar": tar,
    }
    with_ids = () if kind in ("tsv", "tar", "parquet") or (kind == "npz" and path.is_dir()) else files
    if kind == "npy" and path.is_dir():
        with_ids = (path / "_.npy",)  # one for all of them
    everything = dict.fromkeys([*files, *(file for file in map(file_beside, with_ids) if file is not None)])
    return _Found(tuple(everything), openers[kind])


def _open_tsv(path: Path, files: Sequence[Path], memory: Memory, content: str, modality: Modality) -> Source:
    if modality != "image":
        raise DataError(f"{path}: holds features of images' regions, expected features of captions")
    tables = [
        memory.table(f"{content} {number}", tsv.KIND, functools.partial(tsv.read_lines, file))
        for number, file in enumerate(files)
    ]
    return joined([tsv.open_tsv(file, table) for file, table in zip(files, tables, strict=True)], path)
