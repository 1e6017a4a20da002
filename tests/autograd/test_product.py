"""Products in 16 bits against float64, where torch multiplies them fast and where it does not."""

from __future__ import annotations

import pytest
import torch
from float64 import assert_close
from op_db import DTYPES
from torch.utils._python_dispatch import TorchDispatchMode

from entrenar.autograd.ops import _product
from entrenar.autograd.ops._product import add_linear_dw, linear_dx_into, linear_into, multiplies_fast

HALF = [torch.bfloat16, torch.float16]
# The largest error of one rounding, relative.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
SIZES = [(1, 1, 1), (0, 3, 5), (7, 130, 33), (65, 20, 501)]  # rows, columns of the input, classes


class Products(TorchDispatchMode):
    """Collects the dtypes of the matrices that torch multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    monkeypatch.setattr(_product, "multiplies_fast", lambda dtype, device: request.param)
    return request.param


@pytest.fixture(params=[_product.TILE_BYTES, 9000, 1], ids=["whole", "tiles", "single rows"])
def tile_bytes(request, monkeypatch):
    monkeypatch.setattr(_product, "TILE_BYTES", request.param)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_float64(dtype, size, fast, tile_bytes):
    n, k, c = size
    # Of one sign, so that the error of a sum is no larger beside the sum than those of its terms beside them.
    x, weight, bias, dy = (torch.rand(shape).to(dtype) for shape in ((n, k), (c, k), (c,), (n, c)))
    y, y_biased, dx, dw = x.new_empty(n, c), x.new_empty(n, c), torch.empty_like(x), torch.rand(c, k)
    wide_x, wide_weight, wide_bias, wide_dy, wide_dw = (v.double() for v in (x, weight, bias, dy, dw))
    with Products() as products:
        linear_into(y, x, weight, None)
        linear_into(y_biased, x, weight, bias)
        linear_dx_into(dx, dy, weight)
        add_linear_dw(dw, dy, x)
    assert products.dtypes == {dtype if fast else torch.float32}
    # As many roundings of float32 as there are terms at most; then of the product, and of its sum with the bias.
    within = (max(size) + 1) * ROUNDING[torch.float32]
    assert_close(y, wide_x @ wide_weight.T, within + ROUNDING[dtype])
    assert_close(y_biased, wide_x @ wide_weight.T + wide_bias, within + (2 if fast else 1) * ROUNDING[dtype])
    assert_close(dx, wide_dy @ wide_weight, within + ROUNDING[dtype])
    assert_close(dw, wide_dw + wide_dy.T @ wide_x, within + (ROUNDING[dtype] if fast else 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_gradient_of_its_own_dtype_is_added_within_the_product(dtype, fast):
    dy, x, dw = (torch.randn(shape).to(dtype) for shape in ((7, 33), (7, 20), (33, 20)))
    want = dw.double() + dy.double().T @ x.double()
    add_linear_dw(dw, dy, x)
    assert_close(dw, want, 9 * ROUNDING[dtype])


def test_tiles_cover_all_rows_within_their_bytes(monkeypatch):
    monkeypatch.setattr(_product, "TILE_BYTES", 4000)
    for rows, columns in ((0, 3), (1, 1), (7, 300), (5000, 3), (9, 0), (4, 2000)):
        size = _product._tile_size(rows, columns)
        parts = [range(rows)[tile] for tile in _product._tiles(rows, size)]
        assert [row for part in parts for row in part] == [*range(rows)]
        assert all(4 * columns * len(part) <= 4000 or len(part) == 1 for part in parts)


@pytest.mark.parametrize("columns", [1, 1000, 8191])
def test_tiles_are_the_largest_that_take_8_mebibytes(columns):
    size = _product._tile_size(10**9, columns)
    assert 4 * columns * size <= 8 * 2**20 < 4 * columns * (size + 1)


@pytest.mark.cpu("GPUs have products in 16 bits")
@pytest.mark.parametrize("dtype", HALF)
def test_without_onednn_16_bits_are_slow(dtype):
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not multiplies_fast(dtype, torch.device("cpu"))


def test_what_is_fast_everywhere():
    for dtype in (torch.float32, torch.float64):
        assert multiplies_fast(dtype, torch.device("cpu"))
    for dtype in DTYPES:
        assert multiplies_fast(dtype, torch.device("cuda"))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize(
    ("onednn", "avx512", "avx512_bf16", "expected"),
    [(True, True, True, True), (True, True, False, False), (True, False, False, True), (False, False, False, False)],
    ids=["AVX-512 BF16", "AVX-512 that converts", "no AVX-512, but oneDNN multiplies", "AVX2"],
)
def test_bfloat16_is_fast_where_onednn_need_not_convert(onednn, avx512, avx512_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert multiplies_fast(torch.bfloat16, torch.device("cpu")) is expected


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize("onednn", [True, False])
def test_float16_is_fast_where_onednn_multiplies_it(onednn, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: onednn)
    assert multiplies_fast(torch.float16, torch.device("cpu")) is onednn
