"""Imports: a shard's rows of an HDF5 file as `featurize.imports` reads them, against one row at a time as they come.

    python benchmarks/bench_imports.py

single: `dataset[row]` in the data set's order. listed: `dataset[[rows, ascending]]`, h5py's own selection of rows.
ours: ascending rows in contiguous slices. Each reads the same 256 rows, from a file without chunks and from one whose
chunks h5py chose, compressed; near: rows of one stretch of the file, as when both have the data set's order but for
some gaps; far: rows all over the file. Interleaved; the file is in the system's memory, so the disk is not measured.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from featurize.imports.hdf5 import open_h5

ROWS, BOXES, WIDTH, SHARD = 2048, 36, 512, 256
Rows = NDArray[np.int64]


def write(path: Path, *, chunked: bool) -> None:
    """Regions of images as in bottom-up attention's conversions, a quarter as wide; half of the numbers are 0."""
    features = np.maximum(np.random.default_rng(0).normal(size=(ROWS, BOXES, WIDTH)), 0).astype(np.float32)
    with h5py.File(path, "w") as file:
        options = {"chunks": True, "compression": "lzf"} if chunked else {}
        file.create_dataset("image_features", data=features, **options)


def single(path: Path, rows: Rows) -> None:
    """One row at a time, as it is asked for."""
    with h5py.File(path, "r") as file:
        for row in rows:
            file["image_features"][row]


def listed(path: Path, rows: Rows) -> None:
    """All rows by h5py's selection."""
    with h5py.File(path, "r") as file:
        file["image_features"][np.sort(rows)]


def ours(path: Path, rows: Rows) -> None:
    """As a shard's task reads them."""
    for _ in open_h5(path, "image").features[0].read(np.sort(rows)):
        pass


VARIANTS: dict[str, Callable[[Path, Rows], None]] = {"single": single, "listed": listed, "ours": ours}


def measure(repeats: int) -> dict[str, float]:
    """Median milliseconds of each variant, and its ratio to ours."""
    rng = np.random.default_rng(1)
    orders = {
        "near": 700 + rng.permutation(rng.choice(300, SHARD, replace=False)),
        "far": rng.choice(ROWS, SHARD, replace=False),
    }
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("plain", "chunked"):
            path = Path(folder, f"{layout}.h5")
            write(path, chunked=layout == "chunked")
            for order, rows in orders.items():
                times: dict[str, list[float]] = {name: [] for name in VARIANTS}
                for _ in range(repeats):
                    for name, variant in VARIANTS.items():
                        start = time.perf_counter()
                        variant(path, rows)
                        times[name].append(1000 * (time.perf_counter() - start))
                medians = {name: statistics.median(values) for name, values in times.items()}
                found |= {f"{layout}, {order}: {name} (ms)": value for name, value in medians.items()}
                for name in ("single", "listed"):
                    found[f"{layout}, {order}: {name} / ours"] = medians[name] / medians["ours"]
    return found


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"imports, {SHARD} of {ROWS} rows of {BOXES} x {WIDTH}")
    for name, value in measure(options.repeats).items():
        print(f"  {name:<34} {value:10.2f}")


if __name__ == "__main__":
    main()
