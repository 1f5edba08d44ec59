"""What a query's features become before a model reads them."""

import numpy as np
import pytest

from evaluate.search import _stored
from train.batches import ColumnRef


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float16", [0.0999755859375, np.inf]), ("float32", [0.1, 1e5]), ("int8", [0.1, 1e5])]
)
def test_a_query_is_rounded_where_the_cache_was(dtype, expected):
    ref = ColumnRef("one.pooled", "0" * 64, "one", "0" * 64, "pooled", "plain", dtype)
    with np.errstate(over="ignore"):
        assert _stored(np.array([0.1, 1e5], np.float32), ref).tolist() == pytest.approx(expected, rel=1e-6)
