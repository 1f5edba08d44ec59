"""Both formats of the real Flickr8K say the same."""

from collections import Counter

import pytest

from featurize.config import DataConfig
from featurize.datasets.load import load

pytestmark = pytest.mark.flickr8k


def words(samples):
    return {s.image_id: (s.split, [" ".join(c.split()) for c in s.captions]) for s in samples}


def test_official_files_and_karpathys_json_agree(flickr8k_root, tmp_path):
    official = load(DataConfig("flickr8k-tokens", str(flickr8k_root)), tmp_path)
    karpathy = load(DataConfig("karpathy", str(flickr8k_root)), tmp_path)
    assert Counter(sample.split for sample in official) == {"train": 6000, "val": 1000}
    assert words(official) == words(karpathy)
    assert {sample.image for sample in official} == {sample.image for sample in karpathy}
    assert load(DataConfig("flickr8k", str(flickr8k_root)), tmp_path) == karpathy
    assert {len(sample.captions) for sample in karpathy} == {5}
    for sample in karpathy[::1000]:
        assert sample.read().startswith(b"\xff\xd8")
