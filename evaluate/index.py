"""An exact index: the nearest items by squared L2 distance, from memory or mapped from disk.

A saved index is a folder:

    vectors.npy      (N, E) float32, read through a memory map
    items.parquet    N rows, one for each vector; columns are the caller's (item, uri, text, offset, ...)
    index.json       format, rows, dimensions, file sizes; written last, so its existence means completeness
"""

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featurize.places import fsync_folder, publish, temporary_name

FORMAT = 1
MANIFEST = "index.json"
VECTORS = "vectors.npy"
ITEMS = "items.parquet"
CHUNK = 1024
LONGEST = 1e37
"""Largest squared norm whose products stay finite in float32."""


class IndexFileError(ValueError):
    """A folder holds no complete index, or cannot take one; the message says which and what to do."""


@dataclass(frozen=True, eq=False)
class Index:
    """N items that can be searched by their embeddings.

    Attributes:
        vectors: (N, E) float32.
        items: N rows that describe the items, in the order of the vectors.

    Raises:
        ValueError: the two do not fit together.
    """

    vectors: NDArray[np.float32]
    items: pd.DataFrame

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.vectors.dtype != np.float32 or not self.vectors.size:
            raise ValueError(
                "index vectors: expected a float32 matrix (items, dimensions) that is not empty, "
                f"found {self.vectors.dtype} of shape {self.vectors.shape}"
            )
        if len(self.items) != len(self.vectors):
            raise ValueError(
                f"index: {len(self.vectors)} vectors, but {len(self.items)} items describe them; "
                "expected one row for each vector"
            )

    @cached_property
    def squared_norms(self) -> NDArray[np.float64]:
        """Squared norms of the vectors (N,), computed once.

        Raises:
            ValueError: a vector is not finite or too long for float32; its row is named.
        """
        return _squared_norms("item", self.vectors)

    def search(
        self, queries: NDArray[np.float32], k: int, tile: int = 2048
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds each query's k nearest items, nearest first; of equally near items the lower row comes first.

        A float32 matrix product proposes; whatever its rounding could have misjudged is measured again in
        float64, in a fixed order of operations. So distances are exact to the last bit of float32, equal
        vectors are equally far, and nothing depends on the tile.

        Args:
            queries: (Q, E) float32.
            k: items wanted for each query; all of them when the index is smaller.
            tile: queries and items compared at once; memory grows with its square.

        Returns:
            Squared distances (Q, k) and rows (Q, k).

        Raises:
            ValueError: the queries' type, shape or values do not fit, k < 1 or tile < 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1] or queries.dtype != np.float32:
            raise ValueError(
                f"queries: expected float32 of shape (queries, {self.vectors.shape[1]}), "
                f"found {queries.dtype} of shape {queries.shape}; "
                "were they embedded by the model that made this index?"
            )
        if k < 1 or tile < 1:
            raise ValueError(f"search: expected k and tile of at least 1, found k = {k}, tile = {tile}")
        norms = _squared_norms("query", queries)
        k = min(k, len(self.vectors))
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        for first in range(0, len(queries), tile):
            part = slice(first, first + tile)
            for row in range(0, len(self.vectors), tile):
                distances[part], rows[part] = self._merge_tile(
                    queries[part], norms[part], distances[part], rows[part], slice(row, row + tile)
                )
        return distances, rows

    def _merge_tile(
        self,
        queries: NDArray[np.float32],
        norms: NDArray[np.float64],
        best: NDArray[np.float32],
        best_rows: NDArray[np.int64],
        part: slice,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Improves the best k items of q queries by a tile of b items; c is the number of candidates.

        Args:
            queries: (q, E).
            norms: (q,) their squared norms.
            best: (q, k) ascending distances so far, infinite where there are none yet.
            best_rows: (q, k) their rows.
            part: the rows of the tile.
        """
        block = np.asarray(self.vectors[part])  # (b, E)
        squared = self.squared_norms[part]  # (b,)
        count, k = best.shape
        rough = norms[:, None] + squared - 2 * (queries @ block.T)  # (q, b)
        # Twice the worst rounding error of a float32 product (Higham 2002, section 3.1), and underflow.
        single = np.finfo(np.float32)
        slack = (block.shape[1] + 8) * single.eps * (np.sqrt(norms) + np.sqrt(squared.max())) ** 2  # (q,)
        slack += block.shape[1] * single.tiny
        limit = best[:, -1] + slack
        if len(block) > k:
            limit = np.minimum(limit, np.partition(rough, k - 1, axis=1)[:, k - 1] + 2 * slack)
        of_query, of_item = np.nonzero(rough <= limit[:, None])  # (c,)

        exact = _distances(queries, block, of_query, of_item)
        merged_query = np.concatenate([np.repeat(np.arange(count), k), of_query])  # (q k + c,)
        merged = np.concatenate([best.ravel(), exact])
        merged_rows = np.concatenate([best_rows.ravel(), of_item + part.start])
        order = np.lexsort((merged, merged_query))  # stable, and both lists are in row order
        begins = np.searchsorted(merged_query[order], np.arange(count))  # (q,)
        keep = order[begins[:, None] + np.arange(k)]  # (q, k)
        return merged[keep], merged_rows[keep]

    def save(self, folder: str | Path) -> None:
        """Writes the index; a reader sees all of it or nothing. An older index in its place is replaced.

        Raises:
            ValueError: a vector is not finite or too long; its row is named.
            IndexFileError: the place holds something that is not an index.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / MANIFEST).exists():
            raise IndexFileError(f"{folder} exists and is not an index; choose another place or remove it")
        _squared_norms("item", self.vectors)
        fresh, old = temporary_name(folder), temporary_name(folder)
        fresh.mkdir(parents=True)
        try:
            np.save(fresh / VECTORS, self.vectors)
            self.items.reset_index(drop=True).to_parquet(fresh / ITEMS)
            manifest = {
                "format": FORMAT,
                "rows": len(self.vectors),
                "dimensions": self.vectors.shape[1],
                "bytes": {name: (fresh / name).stat().st_size for name in (VECTORS, ITEMS)},
            }
            for name in (VECTORS, ITEMS):
                _flush(fresh / name)
            publish(fresh / MANIFEST, json.dumps(manifest, indent=2).encode())
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            fsync_folder(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Maps a saved index; vectors are read from disk as searches touch them.

        Raises:
            IndexFileError: no complete index is there, it has another format, or its files are not those that
                were written.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise IndexFileError(
                f"{folder} holds no complete index ({MANIFEST} is missing); build it again"
                if folder.exists()
                else f"there is no index at {folder}; build it first"
            )
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
        except ValueError as error:
            raise IndexFileError(f"{folder / MANIFEST} is not JSON ({error}); build the index again") from error
        if manifest["format"] != FORMAT:
            raise IndexFileError(
                f"{folder / MANIFEST}: expected format {FORMAT}, found {manifest['format']}; build the index again"
            )
        for name, size in manifest["bytes"].items():
            file = folder / name
            found = f"{file.stat().st_size} bytes" if file.exists() else "no file"
            if found != f"{size} bytes":
                raise IndexFileError(
                    f"{file}: expected {size} bytes, found {found}; the index is damaged, build it again"
                )
        return cls(np.load(folder / VECTORS, mmap_mode="r"), pd.read_parquet(folder / ITEMS))


def _squared_norms(name: str, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared norms (N,) of (N, E); refuses rows that cannot be compared, and names the first."""
    norms = np.empty(len(vectors))
    for first in range(0, len(vectors), CHUNK):
        norms[first : first + CHUNK] = np.square(vectors[first : first + CHUNK], dtype=np.float64).sum(axis=1)
    bad = np.flatnonzero(~(norms <= LONGEST))
    if bad.size:
        found = "NaN or infinity" if not np.isfinite(norms[bad[0]]) else f"a vector {norms[bad[0]] ** 0.5:.1e} long"
        raise ValueError(
            f"{name} row {bad[0]} holds {found} ({bad.size} of {len(vectors)} rows are like it); "
            "look for a diverged training run or damaged features"
        )
    return norms


def _distances(
    queries: NDArray[np.float32],
    block: NDArray[np.float32],
    of_query: NDArray[np.intp],
    of_item: NDArray[np.intp],
) -> NDArray[np.float32]:
    """Squared distances (c,) of c pairs, the same for equal pairs wherever they stand in the list."""
    out = np.empty(len(of_query), dtype=np.float32)
    for first in range(0, len(out), CHUNK):
        some = slice(first, first + CHUNK)
        gaps = queries[of_query[some]].astype(np.float64) - block[of_item[some]]  # (CHUNK, E)
        # A running sum adds one dimension after the other by definition; sum() chooses its own order.
        out[some] = np.add.accumulate(np.square(gaps), axis=1)[:, -1]
    return out


def _flush(path: Path) -> None:
    """Waits until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
