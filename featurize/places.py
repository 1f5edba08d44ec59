"""Places: files and folders of this machine, or of a store that fsspec knows (s3://, gs://, az://, memory://, ...).

A local place is a plain `pathlib.Path`, a remote one a `UPath` with the same interface. What must be done differently
there stands here: how a file is published whole or not at all, how it gets a second name, what a folder holds.
"""

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import fsspec
from upath import UPath

Place: TypeAlias = Path | UPath

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""Their objects are seen when they are whole, and not before; elsewhere a temporary name is moved into place."""


def place(text: str, refused: type[ValueError]) -> Place:
    """A path, made absolute because workers run in other folders, or a URI.

    Args:
        text: what the user typed.
        refused: the error to raise.

    Raises:
        refused: no fsspec file system of this Python knows the URI.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text).expanduser().absolute()
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        found = UPath(text.rstrip("/"), **_options(scheme))
        _ = found.fs  # made on first use: asks for the package behind it
    except (ValueError, ImportError) as error:
        advice = "pip install 'isthmus[s3]'" if scheme in ("s3", "s3a") else "install the fsspec package for it"
        raise refused(f"{text}: no file system for {scheme}:// here ({error}); {advice}, or use a path") from error
    assert isinstance(found, UPath)
    return found


def _options(scheme: str) -> dict[str, Any]:
    """Others write to a store too: a listing that is remembered would hide what they did."""
    return {"use_listings_cache": False} if scheme in OBJECT_STORES else {}


def file_at(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a file, and its path there; the URI may have any form, such as a chain."""
    file_system, path = fsspec.core.url_to_fs(uri, **_options(uri.partition("://")[0]))
    return file_system, str(path)


def is_full(error: Exception) -> bool:
    """Whether a disk of this machine has no room, or its owner's quota has none."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def answering(where: object, refused: type[Exception]) -> Iterator[None]:
    """Make an error of a store, of which each has its own, one that says what to do; files are as always.

    Raises:
        refused: there are no credentials, they do not suffice, or nothing answers; what is missing stays
            `FileNotFoundError`, and a disk of this machine that is full stays `OSError`.
    """
    try:
        yield
    except (FileNotFoundError, refused, MemoryError):
        raise
    except Exception as error:
        if isinstance(where, Path) or is_full(error):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise refused(
            f"{where}: the store does not answer as it should ({told[:300]}); check the network, the endpoint "
            "(AWS_ENDPOINT_URL for one that is not Amazon's) and the credentials (the store's usual variables or files)"
        ) from error


def require_answer(where: Place, refused: type[Exception]) -> None:
    """Ask a store for a listing, so that what is wrong with it is said before any work.

    Raises:
        refused: as `answering`, or the bucket does not exist.
    """
    if isinstance(where, Path):
        return
    with answering(where, refused):
        try:
            where.fs.ls(where.path)
        except FileNotFoundError:
            bucket = where.path.partition("/")[0]
            if where.protocol in OBJECT_STORES and not _lists(where, bucket):
                raise refused(f"{where}: there is no bucket {bucket!r}; make it, or correct the name") from None


def _lists(where: UPath, bucket: str) -> bool:
    try:
        where.fs.ls(bucket)
    except FileNotFoundError:
        return False
    except PermissionError:  # there is one, of which only a part may be listed
        return True
    return True


def fsync_folder(folder: Path) -> None:
    """Make the renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process writes to, on this machine or another."""
    return path.with_name(_hidden(path))


def _hidden(path: Place) -> str:
    return f".{path.name}.{uuid.uuid4().hex}.tmp"


@contextmanager
def replacing(path: Place) -> Iterator[BinaryIO]:
    """A file that takes the name `path` once it is whole and durable; what fails leaves nothing behind.

    For a remote path it is a local file, which is uploaded in the end.
    """
    if not isinstance(path, Path):
        with tempfile.NamedTemporaryFile(prefix="isthmus-") as local:
            yield cast("BinaryIO", local)
            local.flush()
            with _arriving(path) as target:
                path.fs.put_file(local.name, target)
        return
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def _arriving(path: UPath) -> Iterator[str]:
    """The name to write under: the final one where objects appear whole, else one that is moved into place."""
    if path.protocol in OBJECT_STORES:
        yield path.path
        return
    temporary = path.with_name(_hidden(path)).path
    try:
        yield temporary
        path.fs.mv(temporary, path.path)
    except BaseException:
        if path.fs.exists(temporary):
            path.fs.rm_file(temporary)
        raise


def publish(path: Place, data: bytes) -> None:
    """Write a small file whole or not at all."""
    if isinstance(path, Path):
        with replacing(path) as file:
            file.write(data)
    else:
        with _arriving(path) as target:
            path.fs.pipe_file(target, data)


def read(path: Place) -> bytes:
    """A small file, whole.

    Raises:
        FileNotFoundError: there is none.
    """
    return path.read_bytes() if isinstance(path, Path) else bytes(path.fs.cat_file(path.path))


def link(source: Place, target: Place) -> None:
    """Give a file a second name, or where there is none such make a copy without bringing its bytes here.

    Raises:
        OSError: the file system cannot.
    """
    if isinstance(source, Path) and isinstance(target, Path):
        temporary = temporary_name(target)
        os.link(source, temporary)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # between two names of one file a rename does nothing
    elif isinstance(source, UPath) and isinstance(target, UPath):
        with _arriving(target) as name:
            target.fs.cp_file(source.path, name)
    else:
        raise OSError(f"{source} and {target} lie in different file systems")


def make_folder(folder: Place) -> None:
    """Make a folder and those above it; object stores know none."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    elif folder.protocol not in OBJECT_STORES:
        folder.fs.makedirs(folder.path, exist_ok=True)


def found(folder: Place, pattern: str) -> list[Place]:
    """The places below a folder that match, sorted by name."""
    return sorted(folder.glob(pattern), key=str)


def prefix(folder: Place) -> str:
    """A folder's text as names begin that lie in it, without the slash in which a bucket's ends."""
    return str(folder).rstrip("/")


@dataclass(frozen=True)
class File:
    """A file in a folder.

    Attributes:
        name: within the folder.
        size: in bytes.
        modified: seconds since 1970, by the clock of the file system.
        shared: whether other names keep its bytes.
    """

    name: str
    size: int
    modified: float
    shared: bool = False


def files(folder: Place) -> list[File]:
    """The files that lie in a folder itself; a store is asked once."""
    if isinstance(folder, Path):
        status = [(path.name, path.stat()) for path in folder.iterdir() if path.is_file()]
        return [File(name, one.st_size, one.st_mtime, one.st_nlink > 1) for name, one in status]
    listed = [one for one in _listing(folder) if one["type"] == "file"]
    return [File(one["name"].rpartition("/")[2], one["size"] or 0, _modified(one)) for one in listed]


def folders(folder: Place) -> list[Place]:
    """The folders in a folder, sorted by name; a store is asked once."""
    if isinstance(folder, Path):
        return sorted(path for path in folder.iterdir() if path.is_dir())
    listed = [one["name"] for one in _listing(folder) if one["type"] == "directory"]
    return [folder / name.rstrip("/").rpartition("/")[2] for name in sorted(listed)]


def _listing(folder: UPath) -> list[dict[str, Any]]:
    """A store's description of what lies in a folder; stores know no empty ones."""
    try:
        listed: list[dict[str, Any]] = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:
        return []
    return listed


def _modified(info: dict[str, object]) -> float:
    for key in ("LastModified", "last_modified", "updated", "mtime", "created", "Last-Modified"):
        value = info.get(key)
        if isinstance(value, int | float):
            return float(value)
        if hasattr(value, "timestamp"):
            return float(value.timestamp())
    return 0.0


def remove_file(path: Place) -> None:
    """Remove a file, if it is there."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    else:
        try:
            path.fs.rm_file(path.path)
        except FileNotFoundError:
            return


def remove_folder(folder: Place) -> None:
    """Remove a folder and all that it holds."""
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.fs.rm(folder.path, recursive=True)


_EXACT = ("ETag", "etag", "sha256", "md5Hash", "md5", "Content-MD5", "crc32c", "generation", "version_id", "checksum")


def version(info: dict[str, object], now: float) -> str:
    """What of a remote file's description changes with its bytes; "" where nothing does.

    Args:
        info: as fsspec gives it.
        now: seconds since 1970: a file that was written within the last two seconds may change again without a trace.
    """
    for key in _EXACT:
        if info.get(key):
            return re.sub(r"^W/", "", str(info[key])).strip('"')
    moment = _modified(info)
    return f"{moment:.6f}" if 0 < moment < now - 2 else ""
