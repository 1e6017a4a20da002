"""The int4 format: its bytes, its error, its limits."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.autograd.ops import int4_dequantize, int4_quantize
from entrenar.autograd.ops.int4 import int4_quantize_reference

BLOCKS = pytest.mark.parametrize("block", [32, 64])


def test_bytes_of_a_known_block():
    values = torch.zeros(1, 32)
    values[0, :3] = torch.tensor([7.0, -7.0, 2.5])
    values[0, 16] = 3.5
    codes, scales = int4_quantize(values, block=32)
    # s = 1; halves round to even: 2.5 -> 2, 3.5 -> 4; element 16 is the high nibble of byte 0.
    assert codes.tolist() == [[15 | (8 + 4) << 4, 1 | 8 << 4, 10 | 8 << 4, *[8 | 8 << 4] * 13]]
    assert scales.view(torch.float16).tolist() == [[1.0]]
    assert int4_dequantize(codes, scales, 32, block=32)[0, [0, 1, 2, 16]].tolist() == [7.0, -7.0, 2.0, 4.0]


def test_float16_scales_and_codes_are_gguf_q4_0():
    weight = torch.randn(5, 96)
    codes, scales = int4_quantize(weight, block=32)
    blocks = torch.cat([scales.view(5, 3, 2), codes.view(5, 3, 16)], dim=-1).reshape(5, -1)
    read_by_gguf = gguf.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(read_by_gguf.copy()), int4_dequantize(codes, scales, 96, block=32).cpu())


def test_error_on_gaussian_weights_is_the_formats():
    weight = torch.randn(4096, 1024)
    error = int4_dequantize(*int4_quantize(weight), 1024) - weight
    assert error.abs().mean().item() == pytest.approx(0.0914, abs=0.0002)
    assert error.square().mean().sqrt().item() == pytest.approx(0.1077, abs=0.0002)


@pytest.mark.parametrize(("scale_dtype", "bits"), [(torch.float16, 4.25), (torch.float32, 4.5)])
def test_bits_of_a_weight(scale_dtype, bits):
    packed = int4_quantize(torch.randn(16, 640), scale_dtype=scale_dtype)
    assert 8 * sum(t.numel() for t in packed) / (16 * 640) == bits


@st.composite
def matrices(draw, largest=4e5):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 150))
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-largest, max_value=largest)
    tiny = st.floats(width=32, min_value=-(2.0**-120), max_value=2.0**-120)
    elements = st.one_of(floats, tiny, st.just(0.0), st.floats(width=32, min_value=-(2.0**-20), max_value=2.0**-20))
    values = draw(st.lists(elements, min_size=1, max_size=40))
    order = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    matrix = torch.tensor(order.choice(np.array(values, dtype=np.float32), size=(columns, rows)))
    return matrix.T if draw(st.booleans()) else matrix.T.contiguous()


@given(matrices(), st.sampled_from([32, 64]), st.sampled_from([torch.float16, torch.float32]))
@settings(max_examples=300, deadline=None)
def test_error_is_at_most_half_a_step(weight, block, scale_dtype):
    columns = weight.shape[1]
    codes, scales = int4_quantize(weight, block=block, scale_dtype=scale_dtype)
    decoded = int4_dequantize(codes, scales, columns, block=block)
    exact = torch.nn.functional.pad(weight.double(), (0, -columns % block)).view(len(weight), -1, block)
    absmax = exact.abs().amax(-1)
    s = scales.view(scale_dtype).double()
    # Half a step, and for the largest values what rounding the scale takes away from seven steps.
    bound = (s / 2 + 7 * (absmax / 7 - s).abs()) * (1 + 1e-6) + 1e-44
    error = (decoded.double() - weight.double()).abs()
    assert (error <= bound.repeat_interleave(block, 1)[:, :columns]).all()
    assert not decoded[weight == 0].any()


@given(matrices(largest=3.4028234663852886e38))
@settings(max_examples=100, deadline=None)
def test_float32_scales_hold_the_largest_values(weight):
    columns = weight.shape[1]
    codes, scales = int4_quantize(weight, scale_dtype=torch.float32)
    decoded = int4_dequantize(codes, scales, columns)
    steps = scales.view(torch.float32).double().repeat_interleave(64, 1)[:, :columns]
    assert ((decoded.double() - weight.double()).abs() <= steps * (0.5 + 1e-6) + 1e-44).all()


def test_scales_round_as_torch_rounds(backend):
    patterns = torch.randint(0, 0x7F800000, (200_000, 1), dtype=torch.int32).view(torch.float32)
    small = torch.rand(200_000, 1) * 2.0**-13
    weight = torch.cat([patterns[patterns < 4e5][:, None], small])
    _, scales = int4_quantize(weight)
    # On the CPU: torch's division by a number is a product with its reciprocal on CUDA.
    assert torch.equal(scales.view(torch.float16).cpu(), (weight.cpu() / 7).half())


@BLOCKS
def test_zero_block_decodes_to_zeros(block):
    weight = torch.randn(2, 2 * block)
    weight[1, block:] = 0
    codes, scales = int4_quantize(weight, block=block)
    assert scales.view(torch.float16)[1, 1] == 0
    assert not int4_dequantize(codes, scales, 2 * block, block=block)[1, block:].any()
    assert torch.equal(codes, int4_quantize_reference(weight, block, torch.float16)[0])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_values_at_and_beside_the_middle_of_two_codes(scale_dtype, backend):
    """In blocks of any scale: a code is the quotient's by the scale, which the scale's inverse may miss there."""
    scales = torch.cat([2.0 ** torch.arange(-14, 8), torch.rand(2026) + 0.01]).to(scale_dtype).float()
    middles = torch.arange(-6.5, 7)
    beside = torch.stack([middles, *(torch.nextafter(middles, middles + step) for step in (-1, 1))]).flatten()
    weight = torch.zeros(len(scales), 64)
    weight[:, 0], weight[:, 1 : 1 + len(beside)] = 7, beside
    weight *= scales[:, None]
    expected = int4_quantize_reference(weight.cpu(), 64, scale_dtype)
    for actual, wanted in zip(int4_quantize(weight, scale_dtype=scale_dtype), expected, strict=True):
        assert torch.equal(actual.cpu(), wanted)


def test_matrix_without_rows():
    codes, scales = int4_quantize(torch.empty(0, 40))
    assert (codes.shape, scales.shape) == ((0, 32), (0, 2))
    assert int4_dequantize(codes, scales, 40).shape == (0, 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weight_is_named(bad, dtype, backend):
    weight = torch.randn(3, 100).to(dtype)
    weight[2, 77] = bad
    with pytest.raises(ValueError, match=rf"blocks\.0\.q\[2, 77\] is {bad}"):
        int4_quantize(weight, name="blocks.0.q")


def test_scale_beyond_float16_is_refused_and_float32_holds_it():
    weight = torch.ones(2, 130)
    weight[1, 67], weight[1, 129] = 1e6, 2e6
    with pytest.raises(ValueError, match=r"weight\[1, 67\] is 1e\+06.*use scale_dtype=torch.float32"):
        int4_quantize(weight)
    codes, scales = int4_quantize(weight, scale_dtype=torch.float32)
    assert int4_dequantize(codes, scales, 130)[1, 67].item() == pytest.approx(1e6, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=torch.ones(4)), "matrix"),
        (dict(weight=torch.ones(4, 4, dtype=torch.int32)), "floating-point"),
        (dict(weight=torch.ones(4, 0)), "nothing to quantize"),
        (dict(weight=torch.ones(4, 4), block=16), "blocks are of 32 or 64"),
        (dict(weight=torch.ones(4, 4), scale_dtype=torch.bfloat16), "scales are float16 or float32"),
    ],
)
def test_bad_arguments_of_quantize(arguments, message):
    with pytest.raises(ValueError, match=message):
        int4_quantize(**arguments)


def test_sizes_that_do_not_belong_together_are_refused():
    codes, scales = int4_quantize(torch.randn(4, 64))
    for wrong in [(codes[:, 1:], scales, 64), (codes, scales[:2], 64), (codes, scales[:, :1], 64), (codes, scales, 96)]:
        with pytest.raises(ValueError, match="are not an int4 matrix with"):
            int4_dequantize(*wrong)
    for wrong in [(codes.int(), scales), (codes, scales.int()), (codes[0], scales), (codes, scales[0])]:
        with pytest.raises(ValueError, match="codes and scales are uint8 matrices"):
            int4_dequantize(*wrong, 64)
    with pytest.raises(ValueError, match="blocks are of 32 or 64 elements, not 16"):
        int4_dequantize(codes, scales, 64, block=16)
    with pytest.raises(ValueError, match="at least one column"):
        int4_dequantize(codes[:, :0], scales[:, :0], 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_decodes_to_any_dtype(dtype):
    codes, scales = int4_quantize(torch.randn(4, 70))
    decoded = int4_dequantize(codes, scales, 70, dtype=dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, int4_dequantize(codes, scales, 70).to(dtype))


def test_the_operator_itself_refuses_wrong_memory():
    codes, scales = int4_quantize(torch.randn(4, 64))
    ops, A = torch.ops.entrenar, torch.randn(3, 64)
    for call in [
        lambda: ops.int4_dequantize(codes, scales, 640, 64, torch.float32),
        lambda: ops.int4_linear(torch.randn(2, 65), codes, scales, None, 64),
        lambda: ops.int4_linear(torch.randn(2, 64), codes, scales, torch.randn(3), 64),
        lambda: ops.int4_linear(torch.randn(2, 64).half(), codes, scales, None, 64),
        lambda: ops.int4_linear_dx(torch.randn(2, 5), codes, scales, 64, 64),
        lambda: ops.int4_linear(torch.randn(2, 0), codes[:, :0].clone(), scales[:, :0].clone(), None, 64),
        lambda: ops.int4_lora_linear(torch.randn(2, 64), codes, scales, None, A[:, 4:], torch.randn(4, 3), 1.0, 64),
    ]:
        with pytest.raises(RuntimeError, match=r"must"):
            call()
