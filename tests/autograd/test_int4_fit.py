"""Scales of least squared error: one on every backend, never worse than absmax / 7, decoded by the same kernels."""

from __future__ import annotations

import math

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_int4 import matrices
from torch import Tensor

from entrenar.autograd.ops import int4_dequantize, int4_linear, int4_quantize
from entrenar.autograd.ops.int4 import int4_quantize_reference
from entrenar.autograd.ops.int4_linear import int4_linear_reference, int8_rows_reference

BLOCKS = pytest.mark.parametrize("block", [32, 64])
SCALES = pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def with_one(value: float, size: int) -> Tensor:
    values = torch.randn(size)
    values[torch.randint(size, (1,))] = value
    return values


KINDS = {
    "gaussian": torch.randn,
    "zero": torch.zeros,
    "equal": lambda size: torch.full((size,), -0.3),
    "one value": lambda size: with_one(-2.0, size) * (torch.arange(size) == size // 3),
    "ties": lambda size: torch.randn(size).clamp(-0.5, 0.5),
    "codes of many scales": lambda size: torch.randint(-8, 9, (size,)).float(),
    "outlier": lambda size: with_one(40.0, size),
    "scales of float16's least value": lambda size: 2e-7 * torch.randn(size),
    "scales subnormal in float16": lambda size: 1e-5 * torch.randn(size),
    "scales zero in float16": lambda size: 1e-9 * torch.randn(size),
    "squares subnormal": lambda size: 1e-20 * torch.randn(size),
    "values subnormal": lambda size: 1e-41 * torch.randn(size),
    "scales almost past float16": lambda size: with_one(4.55e5, size),
    "scales past float16": lambda size: with_one(-4.7e5, size),  # absmax / 7 is, absmax / 8 is not
    "squares infinite": lambda size: 1e21 * torch.randn(size),
    "largest": lambda size: with_one(3.38e38, size),
    "infinite": lambda size: with_one(math.inf, size),
    "minus infinite": lambda size: with_one(-math.inf, size),
    "NaN": lambda size: with_one(math.nan, size),
}


def assert_reference_bits(weight: Tensor, block: int, scale_dtype: torch.dtype) -> None:
    codes, scales = torch.ops.entrenar.int4_quantize(weight, block, scale_dtype, True)
    # On the CPU: torch's division by a number is a product with its reciprocal on CUDA.
    expected_codes, expected_scales = int4_quantize_reference(weight.cpu(), block, scale_dtype, mse=True)
    assert torch.equal(codes.cpu(), expected_codes)
    found, expected = scales.cpu().view(scale_dtype), expected_scales.view(scale_dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@BLOCKS
@SCALES
@DTYPES
@pytest.mark.usefixtures("poisoned")
def test_bits_are_the_references_whatever_a_block_holds(block, scale_dtype, dtype, backend):
    for columns in (5 * block, 5 * block - 13, 4 * block + 3, 1):
        rows = [torch.cat([make(block) for _ in range(5)])[:columns] for make in KINDS.values() for _ in range(4)]
        assert_reference_bits(torch.stack(rows).to(dtype), block, scale_dtype)


@given(matrices(), st.sampled_from([32, 64]), st.sampled_from([torch.float16, torch.float32]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bits_are_the_references(backend, weight, block, scale_dtype):
    assert_reference_bits(weight, block, scale_dtype)


def squared_errors(weight: Tensor, packed: tuple[Tensor, Tensor], block: int) -> Tensor:
    """Of each block, in float64."""
    columns = weight.shape[1]
    error = int4_dequantize(*packed, columns, block=block).double() - weight.double()
    return torch.nn.functional.pad(error, (0, -columns % block)).unflatten(-1, (-1, block)).square().sum(-1)


@given(matrices(), st.sampled_from([32, 64]), st.sampled_from([torch.float16, torch.float32]))
@settings(max_examples=300, deadline=None)
def test_no_block_errs_more_than_with_absmax(weight, block, scale_dtype):
    by_fit = {fit: int4_quantize(weight, block=block, scale_dtype=scale_dtype, fit=fit) for fit in ("absmax", "mse")}
    errors = {fit: squared_errors(weight, packed, block) for fit, packed in by_fit.items()}
    # Each sum that is compared has seen eight additions, a square and a difference rounded to float32. Squares below
    # float32's least normal value lose up to half its least one.
    assert (errors["mse"] <= errors["absmax"] * (1 + 2 * 12 * 2**-24) + 2 * block * 2**-150).all()


def test_error_on_gaussian_weights():
    weight = torch.randn(4096, 1024)
    error = squared_errors(weight, int4_quantize(weight, fit="mse"), 64)
    # 0.0901 was computed apart from this code, to three digits; 65,536 blocks leave a standard error of 0.00003.
    assert math.sqrt(error.sum() / weight.numel()) == pytest.approx(0.0901, abs=0.0002)
    assert error.sum() < 0.71 * squared_errors(weight, int4_quantize(weight), 64).sum()  # (0.0901 / 0.1077)^2 = 0.700


@pytest.mark.parametrize("sign", [1, -1])
def test_bytes_of_a_block_that_uses_every_code(sign, backend):
    values = sign * torch.arange(8.0, -8.0, -1.0).repeat(2).unsqueeze(0)
    codes, scales = int4_quantize(values, block=32, fit="mse")
    # The scale is -8 / 8 or 8 / 8, so that the value 8, or -8, has the code -8 and the nibble 0.
    assert scales.view(torch.float16).tolist() == [[-sign]]
    assert codes.tolist() == [[17 * nibble for nibble in range(16)]]
    assert torch.equal(int4_dequantize(codes, scales, 32, block=32), values)


def test_the_first_of_several_largest_values_gives_the_sign(backend):
    for first in (1, -1):
        values = torch.full((1, 64), 3.0)
        values[0, 5], values[0, 40] = 8 * first, -8 * first
        _, scales = int4_quantize(values, fit="mse")
        # With d = 8, 3 is exact and the second of the largest is off by 1; no other scale does as well.
        assert scales.view(torch.float16).item() == -first


def test_absmax_is_the_default_and_keeps_its_bits():
    weight = torch.randn(7, 100)
    plain, named = int4_quantize(weight), int4_quantize(weight, fit="absmax")
    expected = int4_quantize_reference(weight.cpu(), 64, torch.float16)
    for a, b, c in zip(plain, named, expected, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.cpu(), c)
    assert (plain[1].view(torch.float16) > 0).all()


def test_negative_scales_and_codes_are_gguf_q4_0():
    codes, scales = int4_quantize(torch.randn(64, 96), block=32, fit="mse")
    assert (scales.view(torch.float16) < 0).any()
    assert (codes & 15 == 0).any()
    blocks = torch.cat([scales.view(64, 3, 2), codes.view(64, 3, 16)], dim=-1).reshape(64, -1)
    read_by_gguf = gguf.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(read_by_gguf.copy()), int4_dequantize(codes, scales, 96, block=32).cpu())


@BLOCKS
@SCALES
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 40])
def test_products_are_those_of_the_decoded_weight(rows, block, scale_dtype, backend):
    codes, scales = int4_quantize(torch.randn(70, 200), block=block, scale_dtype=scale_dtype, fit="mse")
    weight = int4_dequantize(codes, scales, 200, block=block).double()
    for dtype, rounding in ((torch.float32, 0), (torch.bfloat16, 2**-8)):
        x = torch.randn(rows, 200).to(dtype).requires_grad_()
        y = int4_linear(x, codes, scales, block=block)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        for found, a, b in ((y, x.detach(), weight.T), (dx, dy, weight)):
            # Sums of float32 in any order; bfloat16 rounds the result, and for many rows or in a gradient the weight.
            terms = a.double().abs() @ b.abs()
            assert ((found.double() - a.double() @ b).abs() <= (208 * 2**-24 + 2 * rounding) * terms).all()


@pytest.mark.cpu("int8 activations are the CPU's")
@BLOCKS
def test_int8_products_are_those_of_the_rounded_rows(block, backend):
    if backend == "emulated":
        pytest.skip("int8 activations are the CPU's")
    codes, scales = int4_quantize(torch.randn(70, 200), block=block, fit="mse")
    x = torch.randn(40, 200)
    y = int4_linear(x, codes, scales, block=block, int8=True)
    expected = int4_linear_reference(int8_rows_reference(x, block).double(), codes, scales, None, block)
    assert (y.double() - expected).abs().max() <= 1e-6 * expected.abs().max()  # as for scales of absmax / 7


def test_what_has_no_scale_is_refused_as_with_absmax(backend):
    weight = torch.ones(2, 64)
    weight[1, 3] = -4.7e5  # whose eighth float16 could hold
    with pytest.raises(ValueError, match=r"weight\[1, 3\] is -470000.*use scale_dtype=torch.float32"):
        int4_quantize(weight, fit="mse")
    codes, scales = int4_quantize(weight, scale_dtype=torch.float32, fit="mse")
    assert int4_dequantize(codes, scales, 64)[1, 3].item() == pytest.approx(-4.7e5, rel=1e-6)
    weight[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"q\[1, 3\] is nan"):
        int4_quantize(weight, fit="mse", name="q")


def test_an_unknown_fit_is_refused_and_the_choices_named():
    with pytest.raises(ValueError, match="fit must be one of 'absmax', 'mse', not 'nf4'"):
        int4_quantize(torch.ones(4, 4), fit="nf4")
