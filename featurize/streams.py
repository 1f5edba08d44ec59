"""Shards that are never a file on this machine: read by webdataset from the store into memory."""

import io
import tarfile
from collections.abc import Iterator

import numpy as np
from upath import UPath

from featurize.copies import DamagedError, patiently, pieces
from featurize.manifest import CacheError, ShardRecord
from featurize.shards import NO_HEADER, Array, Shard, numbers


class StreamedShard(Shard):
    """A shard in memory; the same rows as a mapped one.

    Args:
        source: the tar in the store.
        record: what it must be.
        ragged: whether rows differ in length.

    Attributes:
        size: bytes that it takes.
    """

    def __init__(self, source: UPath, record: ShardRecord, *, ragged: bool) -> None:
        from webdataset.tariterators import tar_file_iterator

        self.path = source
        self.rows = record.rows
        self.index: Array | None = None
        self._keys: list[str] = []
        values: list[Array] = []
        file = _Stream(pieces(source, record))
        try:
            for member in tar_file_iterator(file):
                self._keys.append(member["fname"].removesuffix(".npy"))
                values.append(np.load(io.BytesIO(member["data"]), allow_pickle=False))
        except CacheError:
            raise
        except (tarfile.TarError, ValueError, EOFError, *NO_HEADER) as error:
            file.drain()  # a wrong checksum says it better
            raise DamagedError(f"{source}: cannot be read as a shard ({error})") from error
        file.drain()
        if len(values) != record.rows:
            raise DamagedError(f"{source}: holds {len(values)} rows, its manifest says {record.rows}")
        self.size = sum(value.nbytes for value in values)
        self._describe(values[0].shape[1:] if ragged else values[0].shape, values[0].dtype)
        self._values: list[Array] | None = values if ragged else None
        if not ragged:
            self.array = np.stack(values)

    def key(self, row: int) -> str:
        """The tar key of a row."""
        return self._keys[row]

    def row(self, row: int) -> Array:
        """One row, (*shape) or ragged (L, *shape)."""
        return numbers(self.array[row] if self._values is None else self._values[row])


class _Stream(io.RawIOBase):
    """Pieces of bytes, read like a file once from its beginning to its end."""

    def __init__(self, made: Iterator[bytes]) -> None:
        self._made = made
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # of the kinds of buffer the one that is used
        if not self._rest:
            self._rest = next(self._made, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def drain(self) -> None:
        """Read what follows the tar's end mark, so that all bytes are checked."""
        for _ in self._made:
            pass


def stream(source: UPath, record: ShardRecord, *, ragged: bool) -> StreamedShard:
    """A remote shard in memory.

    Raises:
        CacheError: it is missing, holds other bytes than its record says, or cannot be fetched.
    """
    return patiently(source, lambda: StreamedShard(source, record, ragged=ragged))
