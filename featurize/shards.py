"""The shard format: a webdataset tar that is also an array.

A column (one output of one frozen network over a data set) is a folder of shards `000000.tar`, `000001.tar`, ...
Each shard is a plain POSIX ustar file, so `webdataset.WebDataset(shard).decode()` reads it, and it holds nothing but
one `.npy` member for each row, in row order:

    512 bytes   tar header: name `<key>.npy`, mode 0644, owner 0, mtime 0 (equal input gives equal bytes)
    128 bytes   npy header, version 1.0
    n bytes     the row, C order, little endian
    0-511       zeros up to a multiple of 512

*Fixed* columns: every row has the same shape, hence every member the same size (the stride), hence row i begins at
byte `i * stride + 640`, and the shard opens as one strided array over the mapped file, with nothing to convert.
*Ragged* columns (tokens, lemmas, regions): rows are (L_i, D) or (L_i,) with L_i >= 0; `<shard>.idx.npy` beside the
tar, (rows, 2) int64, holds the byte at which row i's values begin and L_i. It can be rebuilt from the tar alone.

*int8* columns: instead of each vector of D float16 numbers (a row, or a part of one) a record of its scale, float32,
and D signed bytes; number i of the vector is `scale * values[i]`, and the scale is the largest absolute number / 127. A
reader of this module gets float16 numbers; any other gets a structured array. A vector of NaN has the scale NaN.

A key is the row's id with everything but letters, digits, `_` and `-` percent-encoded (so it is never a path, and
webdataset splits it from its extension at the right dot); a caption's key is its image's key, `~` and its number.
Ids too long for a tar header are cut and end in `~~` and 32 hex digits of their sha256.
"""

import errno
import hashlib
import io
import re
import resource
import tarfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from featurize.places import Place, publish, read, replacing

Array = NDArray[Any]

_BLOCK = 512
_KEY_LENGTH = 80  # a tar header holds 100 bytes: the key, `~`, a caption's number, `.npy`


class ShardError(ValueError):
    """A shard is not what its manifest or this format says."""


def row_key(image_id: str, caption: int | None = None) -> str:
    """The tar key of an image's row, or of its caption-th caption's row."""
    key = re.sub(
        rb"[^A-Za-z0-9_-]",
        lambda match: b"%%%02X" % match[0][0],
        image_id.encode("utf-8", "surrogatepass"),
    ).decode("ascii")
    if len(key) > _KEY_LENGTH:
        digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        key = f"{key[: _KEY_LENGTH - 34]}~~{digest}"
    return key if caption is None else f"{key}~{caption}"


class _HashingFile:
    """A file that knows the sha256 and the length of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.length += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.length


@dataclass(frozen=True)
class ShardFile:
    """What was written: `rows` members, `size` bytes, `sha256` of the tar."""

    rows: int
    size: int
    sha256: str


def write_shard(path: Place, keys: Sequence[str], rows: Iterable[Array], *, ragged: bool = False) -> ShardFile:
    """Write one shard whole or not at all.

    Args:
        path: the `.tar` to publish; a ragged column's index is published before it, beside it.
        keys: one key a row, from `row_key`.
        rows: one array a row; of equal shape and dtype, except that ragged rows, (L_i, D), differ in L_i.
        ragged: whether rows differ in length.

    Raises:
        ShardError: rows of different shape or dtype, or not as many rows as keys.
    """
    index = np.zeros((len(keys), 2), np.int64)
    first: Array | None = None
    count = 0
    with replacing(path) as raw:
        file = _HashingFile(raw)
        with tarfile.open(fileobj=cast("Any", file), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, row in zip(keys, rows, strict=True):
                first = row if first is None else first
                same = row.shape[1:] == first.shape[1:] if ragged else row.shape == first.shape
                if not same or row.dtype != first.dtype:
                    raise ShardError(
                        f"{path}: row {count} ({key}) is {row.dtype}{row.shape}, "
                        f"but row 0 is {first.dtype}{first.shape}; one column holds one shape"
                    )
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(row, order="C"), version=(1, 0))
                info = tarfile.TarInfo(f"{key}.npy")
                info.size = buffer.tell()
                index[count] = file.length + _BLOCK + info.size - row.nbytes, len(row) if row.ndim else 0
                buffer.seek(0)
                tar.addfile(info, buffer)
                count += 1
        if ragged:
            buffer = io.BytesIO()
            np.save(buffer, index)
            publish(path.with_suffix(".idx.npy"), buffer.getvalue())
    return ShardFile(count, file.length, file.sha256.hexdigest())


NO_HEADER = (SyntaxError, tokenize.TokenError)
"""What numpy raises, beside ValueError, where a header is damaged."""


def _is_stored(dtype: np.dtype[Any]) -> bool:
    """Whether rows may be of this kind: plain numbers, or the records that `to_int8` makes."""
    if dtype.names is None:
        return dtype.kind in "fi" and not dtype.shape
    return dtype.names == ("scale", "values") and dtype["scale"] == np.float32 and dtype["values"].base == np.int8


def _npy_header(data: Array, start: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and first data byte of the npy member whose tar header begins at `start`."""
    stream = io.BytesIO(data[start + _BLOCK : start + 2 * _BLOCK].tobytes())
    try:
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except NO_HEADER as error:
        raise ShardError(f"no npy header ({error.args[0]})") from error
    if fortran or not _is_stored(dtype) or min(shape, default=0) < 0:
        raise ShardError(f"found {dtype}{shape}, expected numbers, or records of int8, in C order")
    return shape, dtype, start + _BLOCK + stream.tell()


def _key_at(data: Array, start: int) -> str:
    name = data[start : start + 100].tobytes().split(b"\0", 1)[0]
    return name.decode("ascii", "replace").removesuffix(".npy")


def largest_number(dtype: str) -> float:
    """The largest feature that a type of columns holds; int8 is made of float16."""
    return float(np.finfo(np.float32 if dtype == "float32" else np.float16).max)


def to_int8(values: Array) -> Array:
    """Numbers (..., D) as records (...,) of a float32 scale and D int8 values, by the largest absolute number."""
    exact = values.astype(np.float32)
    scale = np.abs(exact).max(-1, initial=0.0) / 127
    records = np.empty(scale.shape, [("scale", "<f4"), ("values", "i1", exact.shape[-1:])])
    records["scale"] = scale
    with np.errstate(divide="ignore", invalid="ignore"):
        records["values"] = np.nan_to_num(np.rint(exact / scale[..., None]))  # 0 where the scale is 0 or NaN
    return records


def numbers(stored: Array) -> Array:
    """What stored values stand for: records of int8 as float16, anything else as it is."""
    if stored.dtype.names is None:
        return stored
    numbers: Array = (stored["values"] * stored["scale"][..., None]).astype(np.float16)
    return numbers


def index_of(data: Array) -> Array:
    """The index of a ragged shard, made of the tar alone: (bytes,) uint8 -> (rows, 2) int64 places and lengths.

    Raises:
        ShardError: it is no whole tar of npy members of one dtype.
    """
    found: list[tuple[int, int]] = []
    start = 0
    inner: tuple[tuple[int, ...], np.dtype[Any]] | None = None
    while start < len(data) and data[start]:
        try:
            shape, dtype, begin = _npy_header(data, start)
            size = int(data[start + 124 : start + 135].tobytes(), 8)
        except ValueError as error:
            raise ShardError(f"the member at byte {start} is no npy array ({error})") from error
        inner = inner or (shape[1:], dtype)
        end = start + _BLOCK + size
        if (shape[1:], dtype) != inner or begin + int(np.prod(shape)) * dtype.itemsize != end:
            raise ShardError(f"the member at byte {start} is not like the first, or cut")
        found.append((begin, shape[0] if shape else 0))
        start += _BLOCK - (-size // _BLOCK) * _BLOCK
    if start + 2 * _BLOCK > len(data):
        raise ShardError(f"no end mark at byte {start}; the tar was cut")
    return np.array(found, np.int64).reshape(-1, 2)


def read_index(path: Place) -> Array:
    """The index that stands beside a ragged shard: (rows, 2) int64, if it is one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no array.
    """
    try:
        found: Array = np.lib.format.read_array(io.BytesIO(read(path)), allow_pickle=False)
    except (EOFError, *NO_HEADER) as error:
        raise ValueError(f"no npy array ({error.args[0]})") from error
    return found


class Shard:
    """A mapped shard: rows without reading the tar.

    Args:
        path: of the tar, on this machine.
        rows: that it must hold.
        ragged: whether rows differ in length.
        source: what the file is a copy of, which then has no index beside it.

    Attributes:
        path: of what it holds, for messages.
        array: (rows, *shape) strided view of what is stored in the mapped file (fixed columns only).
        stored: dtype of what is stored: "float16", "float32", "int8", "int32".
        dtype: of the numbers.
        shape: of a row's numbers; of one part of them where rows are ragged.
    """

    def __init__(self, path: Path, rows: int, *, ragged: bool = False, source: Place | None = None) -> None:
        self.path: Place = source or path
        self.rows = rows
        self.index: Array | None = None
        try:
            self._data: Array = np.memmap(path, np.uint8, "r")
            shape, self._item, begin = _npy_header(self._data, 0)
            if ragged:
                self.index = index_of(self._data) if source else read_index(path.with_suffix(".idx.npy"))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                raise ShardError(_too_many(self.path)) from error
            raise ShardError(
                f"{self.path}: cannot be opened as a shard ({error}); `python -m pipeline cache verify` tells more"
            ) from error
        self._header = begin  # bytes before a member's values, the same for all: npy headers leave room for L
        self._describe(tuple(shape[1:]) if ragged else tuple(shape), self._item)
        if self.index is not None:
            self._check(self.index)
            return
        length = int(np.prod(shape)) * self._item.itemsize
        self.stride = -(-(begin + length) // _BLOCK) * _BLOCK
        if len(self._data) < rows * self.stride:
            raise ShardError(
                f"{self.path}: {len(self._data)} bytes hold fewer than the {rows} rows of {self.stride} bytes "
                "that its manifest promises; it was cut or belongs to another column"
            )
        table = self._data[: rows * self.stride].reshape(rows, self.stride)
        self.array: Array = table[:, begin : begin + length].view(self._item).reshape(rows, *shape)

    def _describe(self, inner: tuple[int, ...], item: np.dtype[Any]) -> None:
        """Say what rows hold: (L, *inner) or (*inner) items."""
        vector = () if item.names is None else item["values"].shape
        self.stored = "int8" if vector else item.name
        self.dtype = np.dtype(np.float16) if vector else item
        self.shape = inner + vector
        self._inner = inner

    @property
    def _part(self) -> int:
        """Bytes of one part of a ragged row."""
        return int(np.prod(self._inner)) * self._item.itemsize

    def _check(self, index: Array) -> None:
        """Refuse an index that cannot be this tar's, without reading the tar.

        Members follow one another without gaps, so that lengths say where each begins.
        """
        problem = ""
        if index.dtype != np.int64 or index.shape != (self.rows, 2):
            problem = f"found {index.dtype}{index.shape}, expected int64{(self.rows, 2)}"
        else:
            begins, lengths = index.T
            possible = lengths.clip(0, len(self._data))
            members = _BLOCK + -(-(self._header - _BLOCK + possible * self._part) // _BLOCK) * _BLOCK
            expected = self._header + np.cumsum(members) - members
            outside = (possible != lengths) | (expected + possible * self._part > len(self._data))
            wrong = np.flatnonzero((begins != expected) | outside)
            if len(wrong):
                row = int(wrong[0])
                problem = (
                    f"row {row} is said to begin at byte {begins[row]} with {lengths[row]} parts, expected to begin at "
                    f"{expected[row]} and to end within {len(self._data)} bytes"
                )
        if problem:
            raise ShardError(
                f"{self.path}: the index beside it is another's, or one of them is cut or damaged ({problem}); "
                "`python -m pipeline cache repair` makes both again"
            )

    def has_its_index(self) -> bool:
        """Whether the index of a ragged shard says of each row what its tar header says; reads them all."""
        assert self.index is not None, "a fixed column has no index"
        starts = self.index[:, :1] - self._header
        digits = self._data[starts + np.arange(124, 135)].astype(np.int64) - ord("0")
        sizes = digits @ 8 ** np.arange(10, -1, -1)
        return np.array_equal(sizes, self._header - _BLOCK + self.index[:, 1] * self._part)

    def key(self, row: int) -> str:
        """The tar key of a row."""
        if self.index is None:
            return _key_at(self._data, row * self.stride)
        return _key_at(self._data, int(self.index[row, 0]) - self._header)

    def row(self, row: int) -> Array:
        """One row, (*shape) or ragged (L, *shape); not quantised it is a view of the mapped file."""
        if self.index is None:
            return numbers(self.array[row])
        begin, length = (int(value) for value in self.index[row])
        size = length * self._part
        return numbers(self._data[begin : begin + size].view(self._item).reshape(length, *self._inner))

    def gather(self, rows: Array) -> Array:
        """Rows of a fixed column: (N,) int64 -> (N, *shape)."""
        return numbers(self.array[rows])


def _too_many(path: Place) -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"{path}: cannot be opened, for this process has the {limit} files open that it may have, and each shard of a "
        "column is one; raise the limit (`ulimit -n 65536`), or extract with more rows in a shard "
        "(--featurize.rows_per_shard) into another --cache"
    )


class Shards(Protocol):
    """The shards of a column that are opened when they are asked for.

    Attributes:
        shape: as a shard's.
        dtype: as a shard's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, number: int) -> Shard:
        """One shard."""
        ...

    def each(self, numbers: Array) -> Iterator[Shard]:
        """Several, in this order; while one is used the next are fetched."""
        ...

    @property
    def longest(self) -> int:
        """L of the longest row of a ragged column, at least 1."""
        ...


class _Opened(list[Shard]):
    """Local shards, all open."""

    def __init__(self, folder: Place, shard_rows: Sequence[int], *, ragged: bool) -> None:
        assert isinstance(folder, Path), "remote shards are copied first"
        rows = enumerate(shard_rows)
        super().__init__(Shard(folder / f"{number:06d}.tar", count, ragged=ragged) for number, count in rows)
        shapes = {(shard.shape, shard.stored) for shard in self}
        if len(shapes) != 1:
            raise ShardError(f"{folder}: shards of different shape or dtype: {sorted(shapes)}; expected one")
        self.shape = self[0].shape
        self.dtype = self[0].dtype

    def each(self, numbers: Array) -> Iterator[Shard]:
        return map(self.__getitem__, numbers)

    @property
    def longest(self) -> int:
        return max([1, *(int(shard.index[:, 1].max(initial=0)) for shard in self if shard.index is not None)])


class Column:
    """One encoder output over a whole data set: shards end to end, rows by number.

    Args:
        name: as in the cache.
        folder: of the shards.
        shard_rows: how many each shard holds.
        ragged: whether rows differ in length.
        shards: what opens them; None: they lie in the folder and are all opened now.

    Attributes:
        name: as in the cache, e.g. "efficientnet-lite0.pooled".
        rows: number of rows.
        shape: of a row; of one part of it where `ragged`.
        ragged: whether rows are (L_i, *shape).
    """

    def __init__(
        self,
        name: str,
        folder: Place,
        shard_rows: Sequence[int],
        *,
        ragged: bool = False,
        shards: Shards | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.ragged = ragged
        self.starts = np.concatenate([[0], np.cumsum(shard_rows)]).astype(np.int64)
        self.rows = int(self.starts[-1])
        self.shards: Shards = shards or _Opened(folder, shard_rows, ragged=ragged)
        self.shape = self.shards.shape
        self.dtype = self.shards.dtype

    def _split(self, rows: Array) -> Iterable[tuple[Shard, Array, Array]]:
        """Rows of one shard at a time: the shard, rows inside it, their places in the answer."""
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        owners, firsts = np.unique(owner[order], return_index=True)
        for shard, number, places in zip(self.shards.each(owners), owners, np.split(order, firsts[1:]), strict=True):
            yield shard, rows[places] - self.starts[number], places

    def prepare(self, rows: Array) -> None:
        """Open the shards of rows (N,), so that they are at hand."""
        for _ in self._split(rows):
            pass

    def row(self, row: int) -> Array:
        """One row, (*shape) or ragged (L, *shape)."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[shard].row(row - int(self.starts[shard]))

    @property
    def longest(self) -> int:
        """L of the longest row of a ragged column, at least 1."""
        return self.shards.longest

    def gather(self, rows: Array) -> Array:
        """Rows of a fixed column in the order asked for: (N,) int64 -> (N, *shape)."""
        out = np.empty((len(rows), *self.shape), self.dtype)
        for shard, inside, places in self._split(rows):
            out[places] = shard.gather(inside)
        return out

    def gather_padded(self, rows: Array) -> tuple[Array, Array]:
        """Rows of a ragged column, zero-padded: (N,) int64 -> (N, K, *shape), mask (N, K), K = longest, at least 1."""
        parts: list[tuple[Array, int]] = []
        for shard, inside, places in self._split(rows):
            parts.extend((shard.row(int(row)), int(place)) for row, place in zip(inside, places, strict=True))
        longest = max([1, *(len(part) for part, _ in parts)])
        out = np.zeros((len(rows), longest, *self.shape), self.dtype)
        mask = np.zeros((len(rows), longest), np.bool_)
        for part, place in parts:
            out[place, : len(part)] = part
            mask[place, : len(part)] = True
        return out, mask
