"""Webdataset tars of images and captions, read where they lie: an image is a byte range in the tar."""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from featurize.datasets.sample import IMAGE_SUFFIXES, DataError, Sample, caption_lines, required, split_in
from featurize.places import Place, found


@dataclass
class _Group:
    """The members of one key so far."""

    key: str
    span: tuple[int, int] | None = None
    text: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    suffixes: list[str] = field(default_factory=list)


def read_tar(root: Place) -> Iterator[Sample]:
    """Samples in the order of the members; several tars are sorted by name.

    As in webdataset, members with one key (the path up to the first dot of the file name) are one sample and
    stand side by side. An image goes with `txt` (one caption a line) or `json` ({"caption": ...} or
    {"captions": [...]}, and if wanted "id" and "split"); the captions of the json come first. Without them
    the image id is the key, and the split is the word train, val or test in the tar's name, else "". Only
    regular members are read: links are passed over, and no member's name is ever used as a path.

    Args:
        root: a tar, not compressed, or a folder of tars.

    Raises:
        DataError: there is no tar, it is compressed or cut short, or a sample has no image, several, or
            members that do not stand side by side.
    """
    paths = [root] if root.is_file() else found(root, "*.tar")
    if not paths:
        raise DataError(f"{root}: expected webdataset tars (*.tar), found none")
    for path in paths:
        seen: set[str] = set()
        for group in _groups(path):
            if group.key in seen:
                raise DataError(
                    f"{path}: members of {group.key!r} do not stand side by side, as webdataset demands; "
                    "sort them (tar --sort=name)"
                )
            seen.add(group.key)
            yield _sample(path, group)


def _groups(path: Place) -> Iterator[_Group]:
    """Neighbouring members that share a key and belong to a sample."""
    group: _Group | None = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, name = posixpath.split(member.name)
                stem, dot, suffix = name.partition(".")
                suffix = f".{suffix.lower()}"
                wanted = suffix in IMAGE_SUFFIXES or suffix in (".txt", ".json")
                if not (stem and dot and wanted and member.isreg()) or member.issparse():
                    continue
                key = posixpath.join(folder, stem)
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key)
                _add(group, tar, member, suffix, f"{path}, member {member.name!r}")
            _require_end(path, tar.offset)
    except tarfile.ReadError as error:
        raise DataError(f"{path}: not a whole, uncompressed tar ({error}); unpack .gz, or fetch it again") from error
    if group is not None:
        yield group


def _require_end(path: Place, offset: int) -> None:
    """The standard library takes a broken header for the end; the end that was meant is a block of zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end mark at byte {offset}")


def _add(group: _Group, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, where: str) -> None:
    group.suffixes.append(suffix)
    if suffix in IMAGE_SUFFIXES:
        if group.span is not None:
            raise DataError(f"{where}: {group.key!r} has several images ({', '.join(group.suffixes)}); expected one")
        group.span = (member.offset_data, member.size)
        return
    data = tar.extractfile(member)
    assert data is not None, "a regular member has data"
    text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape")
    if suffix == ".txt":
        group.text = caption_lines(text)
        return
    try:
        meta = json.load(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at line {error.lineno})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(meta).__name__}")
    group.meta = meta


def _sample(path: Place, group: _Group) -> Sample:
    where = f"{path}, sample {group.key!r}"
    if group.span is None:
        raise DataError(
            f"{where}: no image among its members ({', '.join(group.suffixes)}); "
            f"expected one of {', '.join(sorted(IMAGE_SUFFIXES))} beside them"
        )
    meta = {name: value for name, value in group.meta.items() if value is not None}
    captions = group.text
    if "captions" in meta:
        captions = tuple(_text(one, where) for one in required(meta, "captions", list, where))
    elif "caption" in meta:
        captions = (_text(meta["caption"], where),)
    return Sample(
        image_id=str(required(meta, "id", (str, int), where)) if "id" in meta else group.key,
        image=str(path),
        captions=captions,
        split=required(meta, "split", str, where) if "split" in meta else split_in(path.stem),
        span=group.span,
    )


def _text(caption: Any, where: str) -> str:
    if not isinstance(caption, str):
        raise DataError(f"{where}: a caption is {caption!r}, expected text")
    return caption.strip()
