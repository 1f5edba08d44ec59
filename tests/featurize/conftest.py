"""Small data sets and columns without a network."""

import numpy as np
import pytest

from featurize.columns import column_folder
from featurize.datasets.sample import Sample
from featurize.encoder import Output
from featurize.index import index
from featurize.manifest import ShardRecord, identity
from featurize.plan import PlannedColumn
from featurize.shards import row_key, write_shard


def changed(row, place, by):
    """(index) -> the index with something added to one of its numbers."""

    def change(index):
        index[row, place] += by
        return index

    return change


INDEX_DAMAGE = {
    "flat": np.ravel,
    "short": lambda index: index[:-1],
    "of another type": lambda index: index.astype(np.float64),
    "an offset": changed(1, 0, 512),
    "a high bit of an offset": changed(1, 0, 1 << 62),
    "before the beginning": changed(0, 0, -10_000),
    "a length below 0": changed(1, 1, -1),
    "a length beyond all": changed(2, 1, 1 << 60),
    "a length beyond the end": changed(5, 1, 3000),
}
"""What may happen to the index of six ragged rows, so that it cannot be their tar's."""


@pytest.fixture(params=INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def index_damage(request):
    """(index) -> the damaged index."""
    return request.param


@pytest.fixture
def make_samples():
    """(folder, count, content) -> samples with two captions each, their files written."""

    def make(folder, count=6, content=b"picture %d"):
        folder.mkdir(parents=True, exist_ok=True)
        samples = []
        for number in range(count):
            path = folder / f"{number}.jpg"
            path.write_bytes(content % number)
            samples.append(Sample(f"id{number}", str(path), (f"caption {number}", "another"), "train"))
        return samples

    return make


@pytest.fixture
def make_dataset(make_samples, tmp_path):
    """An indexed data set of six images."""

    def make(**options):
        return index(make_samples(tmp_path / "in"), "set", tmp_path / "cache", max_quarantined=0.5, **options)

    return make


@pytest.fixture
def make_column():
    """A finished image column of a data set of six images: its manifest and folder."""

    def make(dataset, name="one.pooled", shards=(4, 2), quarantined=(), values=None, **more):
        made = {"dataset": dataset.id, "encoder": "one", "output": "pooled", "view": "plain", **more}
        folder = column_folder(dataset, name, identity(made))
        folder.mkdir()
        rows = np.arange(18, dtype=np.float16).reshape(6, 3) if values is None else values
        records, start = [], 0
        for number, count in enumerate(shards):
            keys = [row_key(sample.image_id) for sample in dataset.samples[start : start + count]]
            file = write_shard(folder / f"{number:06d}.tar", keys, rows[start : start + count])
            bad = tuple(row - start for row in quarantined if start <= row < start + count)
            records.append(ShardRecord(file.rows, file.size, file.sha256, bad, tuple("DecodeError: cut" for _ in bad)))
            start += count
        column = PlannedColumn(name, "image", "one", Output("pooled", (3,)), "plain", made, folder)
        manifest = column.manifest(shards[0], records)
        manifest.write(folder)
        return manifest, folder

    return make
