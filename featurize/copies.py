"""Shards of a remote cache on this node: copied once, checked, mapped, and evicted when there is no room.

    <ISTHMUS_LOCAL>/<sha256>.tar        a copy, named by its content: any cache that holds these bytes shares it
                    .<sha256>.….part    a copy that is being made; its room is taken at once
                    locks/              who makes a copy; who makes room

Three variables of the environment, for they differ from node to node:

    ISTHMUS_LOCAL        folder of the copies; without it isthmus-<user's number> in the system's temporary directory
    ISTHMUS_LOCAL_GIB    most that they take; 0: there is no disk, shards stream into memory; without it a tenth of the
                         file system stays free, but at most 10 GiB
    ISTHMUS_MEMORY_GIB   most that streamed shards take in the memory of a process; 1 without it

A process that maps a copy holds a shared `flock` on it, which the system takes back when the process ends. What
evicts asks for it exclusively, so that nothing that is in use goes; the copies that were used longest ago go first. A
shard for which there is no room streams into memory.
"""

import fcntl
import hashlib
import itertools
import os
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock
from upath import UPath

from featurize.manifest import CacheError, ShardRecord
from featurize.places import Place, answering
from featurize.shards import Shard

T = TypeVar("T")

_GIB = 2**30
_FREE, _MOST_FREE = 0.1, 10 * _GIB  # of the file system, where no limit is set
_PIECE = 16 * 2**20  # bytes asked for at a time
_TRIES = 3
_MEND = "`python -m pipeline cache repair` makes it again"


class DamagedError(CacheError):
    """A shard in a store is missing, cut or changed: to ask again does not help."""


class NoRoomError(Exception):
    """A copy has no place on this node, for the others are in use or the limit is smaller than the shard."""


@dataclass(frozen=True)
class Node:
    """What this node gives to copies.

    Attributes:
        folder: of the copies.
        disk: most bytes that they take; None: a tenth of the file system stays free, but at most 10 GiB.
        memory: most bytes of streamed shards that a process keeps.
    """

    folder: Path
    disk: int | None
    memory: int

    @classmethod
    def here(cls) -> "Node":
        """This one, as its environment describes it.

        Raises:
            CacheError: a variable holds no number of 0 or more.
        """
        folder = os.environ.get("ISTHMUS_LOCAL")
        chosen = Path(folder) if folder else Path(tempfile.gettempdir()) / f"isthmus-{os.getuid()}"
        memory = _bytes_of("ISTHMUS_MEMORY_GIB")
        return cls(chosen.absolute(), _bytes_of("ISTHMUS_LOCAL_GIB"), _GIB if memory is None else memory)

    def make(self) -> None:
        """Make the folder, for this user alone: what lies there is believed by its name.

        Raises:
            CacheError: it cannot be made, is another user's, or one that others may write to.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            (self.folder / "locks").mkdir(mode=0o700, exist_ok=True)
            found = self.folder.stat()
        except OSError as error:
            raise CacheError(f"no folder for copies of shards ({error}); set ISTHMUS_LOCAL to another") from error
        if found.st_uid != os.getuid():
            raise CacheError(f"{self.folder}: belongs to another user; set ISTHMUS_LOCAL to a folder of your own")
        if found.st_mode & 0o022:
            raise CacheError(
                f"{self.folder}: others may write to it, and copies of shards are believed; `chmod 700` it, or set "
                "ISTHMUS_LOCAL to a folder of your own"
            )


def _bytes_of(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    try:
        size = float(text or 0)
    except ValueError:
        size = -1.0
    if not size >= 0:
        raise CacheError(f"{variable}: found {text!r}, expected a number of GiB, 0 or more")
    return int(size * _GIB) if text else None


def open_copy(node: Node, source: UPath, record: ShardRecord, *, ragged: bool) -> Shard:
    """A remote shard, mapped from this node's copy of it, which is made if it is not there.

    The copy is kept from eviction until the shard is let go.

    Raises:
        CacheError: the shard is missing, holds other bytes than its record says, or cannot be fetched.
        NoRoomError: there is no room for it.
    """
    node.make()
    path = node.folder / f"{record.sha256}.tar"
    held = _hold(path, record.size)
    if held is None:
        with FileLock(node.folder / "locks" / f"{record.sha256[:2]}.lock"):
            held = _hold(path, record.size)
            while held is None:  # another process may evict it at once
                held = _fetch(node, source, record, path)
    try:
        shard = Shard(path, record.rows, ragged=ragged, source=source)
    except BaseException:
        os.close(held)
        raise
    weakref.finalize(shard, os.close, held)
    return shard


def _hold(path: Path, size: int) -> int | None:
    """A descriptor that keeps a copy from eviction, and notes that it is used; None if there is no such copy."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    status = os.fstat(descriptor)
    if status.st_nlink and status.st_size == size:
        os.utime(descriptor)
        return descriptor
    if status.st_nlink:  # somebody changed it
        path.unlink(missing_ok=True)
    os.close(descriptor)
    return None


def _fetch(node: Node, source: UPath, record: ShardRecord, path: Path) -> int | None:
    """Make a copy, whole and checked, or none; the descriptor that holds it, unless it was evicted at once."""
    part = path.with_name(f".{record.sha256}.{uuid.uuid4().hex}.part")
    descriptor = _reserve(node, part, record.size)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            download(source, record, file)
            file.flush()
        os.fsync(descriptor)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    os.close(descriptor)
    return _hold(path, record.size)


def download(source: Place, record: ShardRecord, file: BinaryIO) -> None:
    """Write a shard's bytes to a file that can be rewound, and check them.

    Raises:
        CacheError: they are not those that the record names, or cannot be had.
    """

    def write() -> None:
        file.seek(0)
        file.writelines(pieces(source, record))

    patiently(source, write)


def patiently(source: Place, fetch: Callable[[], T]) -> T:
    """Fetch something from a store that may fail for a moment.

    Raises:
        CacheError: it is missing or damaged, or the store fails again and again.
    """
    for attempt in itertools.count(1):
        try:
            with answering(source, CacheError):
                return fetch()
        except FileNotFoundError as error:
            raise DamagedError(f"{source}: is missing; {_MEND}") from error
        except DamagedError:
            raise
        except CacheError:
            if attempt == _TRIES:
                raise
            time.sleep(0.2 * 4**attempt)
    raise AssertionError("never reached")


def pieces(source: Place, record: ShardRecord) -> Iterator[bytes]:
    """The bytes of a shard, some at a time; the last ones are given if all are as they must be.

    Raises:
        DamagedError: they are not those that the record names.
    """
    found = hashlib.sha256()
    for start in range(0, record.size, _PIECE):
        end = min(start + _PIECE, record.size)
        piece = _range(source, start, end)
        found.update(piece)
        if len(piece) != end - start:
            raise DamagedError(f"{source}: has {start + len(piece)} bytes, its manifest says {record.size}; {_MEND}")
        if end == record.size and found.hexdigest() != record.sha256:
            raise DamagedError(
                f"{source}: its bytes have the sha256 {found.hexdigest()[:12]}, its manifest says "
                f"{record.sha256[:12]}: it was changed or damaged; {_MEND}"
            )
        yield piece


def _range(source: Place, start: int, end: int) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    return bytes(source.fs.cat_file(source.path, start=start, end=end))


def _reserve(node: Node, part: Path, size: int) -> int:
    """Open a file that has its room on the disk already, held exclusively; what is used least goes for it.

    Raises:
        NoRoomError: what is in use leaves none.
    """
    with FileLock(node.folder / "locks" / "room.lock"):
        _make_room(node, size)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if size:
                os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            part.unlink()
            os.close(descriptor)
            raise NoRoomError(str(error)) from error
    return descriptor


def _make_room(node: Node, size: int) -> None:
    """Remove copies, and what killed processes left, until there is room."""
    copies: list[tuple[float, int, Path]] = []
    for path in node.folder.iterdir():
        with suppress(FileNotFoundError):
            if path.suffix == ".part":
                _remove_if_unused(path)
            if path.suffix in (".part", ".tar"):
                status = path.stat()
                copies.append((status.st_mtime, status.st_size, path))
    taken = sum(size for _, size, _ in copies)
    for _, length, path in sorted(copies):
        if _lacks_room(node, taken, size) and path.suffix == ".tar" and _remove_if_unused(path):
            taken -= length
    if _lacks_room(node, taken, size):
        free = "" if node.disk is not None else f", with {_free(node)[0]} bytes free on the disk"
        raise NoRoomError(f"{node.folder}: {size} bytes do not fit beside the {taken} that are in use{free}")


def _lacks_room(node: Node, taken: int, size: int) -> bool:
    if node.disk is not None:
        return taken + size > node.disk
    free, kept = _free(node)
    return free - size < kept


def _free(node: Node) -> tuple[int, float]:
    """Bytes that are free on the file system of the copies, and how many of them stay free."""
    status = os.statvfs(node.folder)
    return status.f_bavail * status.f_frsize, min(_FREE * status.f_blocks * status.f_frsize, _MOST_FREE)


def _remove_if_unused(path: Path) -> bool:
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True
