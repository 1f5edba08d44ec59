"""The shards of a remote column, opened when they are asked for and let go when others need their room.

What is open is kept for the whole process, by content: columns that are opened twice share it.
"""

import io
import itertools
import logging
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from upath import UPath

from featurize.copies import Node, NoRoomError, open_copy
from featurize.manifest import CacheError, Manifest, ShardRecord
from featurize.places import answering, read
from featurize.shards import Array, Shard, ShardError
from featurize.streams import StreamedShard, stream

_log = logging.getLogger(__name__)
_FETCHES = 4  # at a time
_FEWEST = 16  # shards that are kept open, whatever the limits


class _Open:
    """Open shards of this process; those that were used longest ago are let go first."""

    def __init__(self) -> None:
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._streamed = 0  # bytes
        self._told = False
        self._lock = threading.Lock()

    def get(self, sha256: str) -> Shard | None:
        with self._lock:
            shard = self._shards.get(sha256)
            if shard is not None:
                self._shards.move_to_end(sha256)
            return shard

    def keep(self, sha256: str, shard: Shard, memory: int) -> None:
        """Keep a shard, and no more mapped ones than a process may have files, nor more streamed bytes than `memory`.

        A mapped shard takes two files: numpy's map and the lock.
        """
        most = max(_FEWEST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        with self._lock:
            self._drop(sha256)
            self._shards[sha256] = shard
            self._streamed += _streamed(shard)
            while len(self._shards) > 1 and (len(self._shards) > most or self._streamed > memory):
                self._drop(next(iter(self._shards)))

    def shrink(self) -> bool:
        """Let half of the mapped shards go; whether there were any."""
        with self._lock:
            mapped = [name for name, shard in self._shards.items() if not _streamed(shard)]
            for name in mapped[: -(-len(mapped) // 2)]:
                self._drop(name)
        return bool(mapped)

    def clear(self) -> None:
        """Let everything go."""
        with self._lock:
            self._shards.clear()
            self._streamed = 0
            self._told = False

    def tell(self, error: NoRoomError) -> None:
        """Say, once, that shards stream for want of room."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            _log.warning(
                "%s: shards without a copy are fetched each time they are needed; ISTHMUS_LOCAL is their folder, "
                "ISTHMUS_LOCAL_GIB its limit",
                error,
            )

    def _drop(self, sha256: str) -> None:
        shard = self._shards.pop(sha256, None)
        self._streamed -= _streamed(shard)


def _streamed(shard: Shard | None) -> int:
    return shard.size if isinstance(shard, StreamedShard) else 0


OPEN = _Open()


class RemoteShards:
    """The shards of a finished remote column.

    Args:
        folder: of the column.
        manifest: of the column.
        check: called with the number of a shard and the shard when it is opened first; raises if it is not the one.

    Attributes:
        shape: of a row's numbers; of one part of it where rows are ragged.
        dtype: of the numbers.
    """

    def __init__(self, folder: UPath, manifest: Manifest, check: Callable[[int, Shard], None] | None = None) -> None:
        self.folder = folder
        self.shape = manifest.shape
        self.dtype: np.dtype[Any] = np.dtype("float16" if manifest.dtype == "int8" else manifest.dtype)
        self._manifest = manifest
        self._check = check
        self._checked: set[int] = set()
        self._node = Node.here()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._manifest.shards)

    def __getitem__(self, number: int) -> Shard:
        """One shard.

        Raises:
            CacheError: it is missing, damaged, another column's, or cannot be fetched.
        """
        record = self._manifest.shards[number]
        shard = OPEN.get(record.sha256)
        if shard is None:
            shard = open_remote(self._node, self.folder / f"{number:06d}.tar", record, ragged=self._manifest.ragged)
        if number not in self._checked:
            if (shard.shape, shard.stored) != (self.shape, self._manifest.dtype):
                raise ShardError(
                    f"{shard.path}: holds {shard.stored}{shard.shape}, its manifest says "
                    f"{self._manifest.dtype}{self.shape}; `python -m pipeline cache verify` tells more"
                )
            if self._check is not None:
                self._check(number, shard)
            self._checked.add(number)
        return shard

    def each(self, numbers: Array) -> Iterator[Shard]:
        """Several shards, in this order; while one is used the next are fetched."""
        closed = [number for number in numbers if OPEN.get(self._manifest.shards[number].sha256) is None]
        if len(closed) < 2:
            yield from map(self.__getitem__, numbers)
            return
        with ThreadPoolExecutor(_FETCHES) as pool:
            left = iter(numbers)
            ahead: deque[Future[Shard]] = deque()
            ahead.extend(pool.submit(self.__getitem__, number) for number in itertools.islice(left, _FETCHES))
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(self.__getitem__, number) for number in itertools.islice(left, 1))

    @cached_property
    def longest(self) -> int:
        """L of the longest row of a ragged column, at least 1, by the indexes in the store: no shard is fetched."""

        def length(number: int) -> int:
            path = self.folder / f"{number:06d}.idx.npy"
            with answering(path, CacheError):
                return int(np.load(io.BytesIO(read(path)), allow_pickle=False)[:, 1].max(initial=0))

        with ThreadPoolExecutor(_FETCHES) as pool:
            return max([1, *pool.map(length, range(len(self)))])


def open_remote(node: Node, source: UPath, record: ShardRecord, *, ragged: bool) -> Shard:
    """A remote shard: mapped from a copy on this node, or in memory where there is no room for one.

    Raises:
        CacheError: it is missing, damaged, or cannot be fetched.
    """
    while node.disk != 0:
        try:
            shard = open_copy(node, source, record, ragged=ragged)
        except NoRoomError as error:
            if not OPEN.shrink():  # nothing of this process stands in the way
                OPEN.tell(error)
                break
        else:
            OPEN.keep(record.sha256, shard, node.memory)
            return shard
    shard = stream(source, record, ragged=ragged)
    OPEN.keep(record.sha256, shard, node.memory)
    return shard
