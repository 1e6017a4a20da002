"""Products that a CPU's kernels cut into tiles: of rows, of columns, and of the contraction, at and beside the cuts."""

from __future__ import annotations

import pytest
import torch
from lora_linears import assert_near_float64


@pytest.mark.cpu("a GPU cuts its products elsewhere")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "sizes", "ranks"),
    [
        (16, 32, (16,), (16,)),
        (17, 576, (64,), (32,)),
        (31, 577, (65,), (33,)),
        (33, 640, (576,), (64,)),
        (48, 2048, (48, 16), (16, 64)),
        (513, 577, (530,), (17,)),
        (530, 1153, (513,), (1,)),
        (1030, 40, (300,), (33,)),
        (64, 1200, (700, 130, 8), (1, 5, 40)),
        (40, 4200, (1100,), (8,)),
        # A few rows of x, and so many that not all of it stays in a cache.
        (3, 97, (33,), (5,)),
        (15, 577, (130,), (33,)),
        (17, 1152, (65, 64), (16, 1)),
        (300, 2100, (650,), (16,)),
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_float64(rows, columns, sizes, ranks, dtype, limit, backend):
    assert_near_float64(rows, columns, sizes, ranks, dtype, limit)
