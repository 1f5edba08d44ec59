"""Webdataset tars of images and captions, read where they lie: an image is a byte range in the tar."""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from featurize.datasets.sample import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    DataError,
    Sample,
    caption_lines,
    required,
    split_in,
    unread,
)
from featurize.places import Place, found

_WANTED = IMAGE_SUFFIXES | UNREAD_SUFFIXES | {".txt", ".json"}


@dataclass
class _Group:
    """The members of one key so far."""

    key: str
    span: tuple[int, int] | None = None
    unread: str = ""
    text: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    suffixes: list[str] = field(default_factory=list)
    problem: str = ""


def read_tar(root: Place) -> Iterator[Sample]:
    """Samples in the order of the members; several tars are sorted by name.

    As in webdataset, members with one key (the path up to the first dot of the file name) are one sample and
    stand side by side. An image goes with `txt` (one caption a line) or `json` ({"caption": ...} or
    {"captions": [...]}, and if wanted "id" and "split"); the captions of the json come first. Without them
    the image id is the key, and the split is the word train, val or test in the tar's name, else "".
    No link is followed, and no member's name is ever used as a path.

    A sample has a problem if one of its members is a link, a device or sparse, or a json of another form; if it has no
    image, one of a kind that is not read (`UNREAD_SUFFIXES`) or several; or if it is the second one of its key, for
    members that do not stand side by side.

    Args:
        root: a tar, not compressed, or a folder of tars.

    Raises:
        DataError: there is no tar, or it is compressed or cut short.
    """
    paths = [root] if root.is_file() else found(root, "*.tar")
    if not paths:
        raise DataError(f"{root}: expected webdataset tars (*.tar), found none")
    for path in paths:
        seen: set[str] = set()
        for group in _groups(path):
            if UNREAD_SUFFIXES.issuperset(group.suffixes):
                continue
            if group.key in seen:
                group.problem = (
                    "members of one key do not stand side by side, as webdataset demands; sort them (tar --sort=name)"
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
                if not (stem and dot and suffix in _WANTED) or member.isdir():
                    continue
                key = posixpath.join(folder, stem)
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key)
                try:
                    _add(group, tar, member, suffix)
                except DataError as error:
                    group.problem = group.problem or str(error)
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


def _add(group: _Group, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
    group.suffixes.append(suffix)
    if suffix in UNREAD_SUFFIXES:
        group.unread = posixpath.basename(member.name)
        return
    if not member.isreg() or member.issparse():
        kind = "a link is not followed" if member.islnk() or member.issym() else "a device or sparse file is not read"
        raise DataError(f"{kind}; pack the file itself (tar --dereference --hard-dereference)")
    if suffix in IMAGE_SUFFIXES:
        if group.span is not None:
            raise DataError(f"several images ({', '.join(group.suffixes)}); expected one")
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
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and lists of lists of lists
        raise DataError(f"json: not valid JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"json: expected a JSON object, found {type(meta).__name__}")
    group.meta = meta


def _sample(path: Place, group: _Group) -> Sample:
    span = group.span or (0, 0)  # no image: no bytes of the tar
    found = Sample(group.key, str(path), group.text, split_in(path.stem), span)
    try:
        return _described(found, group)
    except DataError as error:
        return replace(found, problem=f"{error} ({path}, sample {group.key!r})")


def _described(found: Sample, group: _Group) -> Sample:
    """A sample with what its json says of it."""
    if group.problem:
        raise DataError(group.problem)
    if group.span is None and group.unread:
        raise DataError(unread(group.unread))
    if group.span is None:
        raise DataError(
            f"no image among its members ({', '.join(group.suffixes)}); "
            f"expected one of {', '.join(sorted(IMAGE_SUFFIXES))} beside them"
        )
    meta = {name: value for name, value in group.meta.items() if value is not None}
    captions = group.text
    if "captions" in meta:
        captions = tuple(map(_text, required(meta, "captions", list, "json")))
    elif "caption" in meta:
        captions = (_text(meta["caption"]),)
    return replace(
        found,
        image_id=str(required(meta, "id", (str, int), "json")) if "id" in meta else found.image_id,
        captions=captions,
        split=required(meta, "split", str, "json") if "split" in meta else found.split,
    )


def _text(caption: Any) -> str:
    if not isinstance(caption, str):
        raise DataError(f"json: a caption is {caption!r}, expected text")
    return caption.strip()
