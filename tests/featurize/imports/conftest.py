"""A data set of seven images, and files as others write them."""

import numpy as np
import pytest

from featurize.datasets.sample import Sample
from featurize.imports import open_import
from featurize.index import index

NONE_LOST = frozenset()


@pytest.fixture
def samples(tmp_path):
    """Five images of train and two of val, with five captions each; ids are file names without extension."""
    made = []
    for number in range(7):
        path = tmp_path / f"picture-{number}.jpg"
        path.write_bytes(b"picture %d" % number)
        captions = tuple(f"Caption {k}, of image {number}." for k in range(5))
        made.append(Sample(f"picture-{number}", str(path), captions, "train" if number < 5 else "val"))
    return made


@pytest.fixture
def dataset(samples, tmp_path):
    return index(samples, "set", tmp_path / "cache", max_quarantined=0)


@pytest.fixture
def opened(tmp_path):
    """(path, modality) -> the import."""
    return lambda path, modality="image": open_import(f"import:{path}", modality, tmp_path / "cache")


@pytest.fixture
def imported(opened, samples):
    """(path, output name, modality) -> what the data set's rows get, and why some get nothing."""

    def read(path, name, modality="image", of=None):
        features = opened(path, modality)
        output = next(output for output in features.card.outputs if output.name == name)
        answers, failed = features.read([output], features.places(of or samples, NONE_LOST))
        return answers[name], failed

    return read


@pytest.fixture
def values():
    """(shape) -> numbers that float16 holds exactly."""
    return lambda *shape: (np.random.default_rng(7).integers(-2000, 2000, shape) / 8).astype(np.float32)
