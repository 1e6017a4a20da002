"""int4_linear and int4_lora_linear as their callers use them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.autograd.ops import int4_dequantize, int4_linear, int4_lora_linear, int4_quantize
from entrenar.autograd.ops._library import LEVELS
from entrenar.autograd.ops.int4_linear import int4_linear_reference, int8_rows_reference


@pytest.fixture
def packed():
    return int4_quantize(torch.randn(24, 80))


def lora(rank: int = 4):
    return torch.randn(rank, 80, requires_grad=True), torch.randn(24, rank, requires_grad=True)


EXACT_ROWS = dict.fromkeys(LEVELS, 8) | {"amx": 2}
"""Up to so many rows of bfloat16 a level of the CPU rounds no weight."""
GPU = ("cuda", "emulated")


@given(
    st.sampled_from([*range(1, 19), 40]),
    st.sampled_from([1, 5, 15, 16, 17, 33, 70]),
    st.sampled_from([1, 31, 32, 33, 64, 97, 127, 130, 257, 1100]),
    st.sampled_from([32, 64]),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_error_is_that_of_float32_sums_and_one_rounding(backend, m, n, k, block, scale_dtype, dtype, seed):
    torch.manual_seed(seed)
    codes, scales = int4_quantize(torch.randn(n, k), block=block, scale_dtype=scale_dtype)
    codes = torch.randint_like(codes, 256)  # the code -8 too, and what lies past the last column
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
    weight = int4_dequantize(codes, scales, k, block=block).double()
    expected = x.double() @ weight.T + bias
    # Sums of k products of float32, in any order, and a few roundings more: of the scaled sum, and of the bias.
    terms = x.double().abs() @ weight.abs().T + bias.abs()
    bound = (k + 8) * 2**-24 * terms
    if dtype == torch.bfloat16:
        bound += 2**-8 * expected.abs() * (1 + 2**-8)
        if m > EXACT_ROWS.get(backend, 0):
            bound += 2**-8 * terms
    y = int4_linear(x, codes, scales, bias, block=block)
    assert ((y.double() - expected).abs() <= bound).all()


@given(
    st.integers(1, 16),
    st.one_of(st.integers(1, 40), st.sampled_from([127, 129, 300])),
    st.one_of(st.integers(1, 300), st.sampled_from([512, 576, 1000, 1023, 1024, 2047, 4096, 5000])),
    st.sampled_from([32, 64]),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_few_rows_lose_no_more_than_float32_sums_do(backend, m, n, k, block, scale_dtype, dtype, biased, seed):
    if dtype == torch.bfloat16 and backend in LEVELS:
        m = min(m, EXACT_ROWS[backend])
    torch.manual_seed(seed)
    codes, scales = int4_quantize(torch.randn(n, k), block=block, scale_dtype=scale_dtype)
    codes = torch.randint_like(codes, 256)
    x = (torch.randn(m, k) * torch.randn(m, k).exp()).to(dtype)
    bias = torch.randn(n) if biased else None
    weight = int4_dequantize(codes, scales, k, block=block).double()
    expected, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, terms = expected + bias, terms + bias.abs()
    bound = (k + 8) * 2**-24 * terms
    if dtype == torch.bfloat16:
        bound += 2**-8 * expected.abs() * (1 + 2**-8)
    y = int4_linear(x, codes, scales, bias, block=block)
    assert ((y.double() - expected).abs() <= bound).all()


@given(
    st.integers(1, 9),
    st.sampled_from([1, 15, 31, 33, 64, 300, 1100, 2100]),
    st.sampled_from([1, 31, 64, 97, 130, 200]),
    st.sampled_from([32, 64]),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradient_of_few_rows_errs_as_rounded_weights_do(backend, m, n, k, block, scale_dtype, dtype, seed):
    torch.manual_seed(seed)
    codes, scales = int4_quantize(torch.randn(n, k), block=block, scale_dtype=scale_dtype)
    codes = torch.randint_like(codes, 256)
    weight = int4_dequantize(codes, scales, k, block=block).double()
    x, dy = torch.zeros(m, k, dtype=dtype, requires_grad=True), torch.randn(m, n).to(dtype)
    expected, terms = dy.double() @ weight, dy.double().abs() @ weight.abs()
    bound = (n + 8) * 2**-24 * terms
    if dtype == torch.bfloat16:
        bound += 2**-8 * (expected.abs() + terms)
    (dx,) = torch.autograd.grad(int4_linear(x, codes, scales, block=block), x, dy)
    assert ((dx.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 4e37, 1e-40])
def test_rows_keep_to_themselves_what_is_not_finite(backend, value):
    codes, scales = int4_quantize(torch.eye(64))
    x = torch.ones(5, 64)
    x[1, 7] = value
    y = int4_linear(x, codes, scales)
    exact = x.double() @ int4_dequantize(codes, scales, 64).double().T
    others = torch.arange(5) != 1
    torch.testing.assert_close(y[others].double(), exact[others])
    torch.testing.assert_close(y[1].double(), exact[1], equal_nan=True)


def test_a_column_does_not_depend_on_what_lies_beside_it(backend):
    if backend in GPU:
        pytest.skip("torch's products choose the order of their sums by the sizes")
    codes, scales = int4_quantize(torch.randn(100, 200))
    for rows in (1, 3, 8, 16):
        x = torch.randn(rows, 200).bfloat16()
        whole = int4_linear(x, codes, scales)
        for begin in (0, 16, 48):
            part = int4_linear(x, codes[begin : begin + 52], scales[begin : begin + 52])
            assert torch.equal(part, whole[:, begin : begin + 52])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_without_outputs_the_gradient_is_zero(rows, dtype, backend):
    codes, scales = int4_quantize(torch.randn(0, 80))
    x = torch.randn(rows, 80).to(dtype).requires_grad_()
    y = int4_linear(x, codes, scales, torch.randn(0))
    assert y.shape == (rows, 0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_autocast_computes_in_its_dtype(packed):
    x = torch.randn(5, 80)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y, with_lora = int4_linear(x, *packed), int4_lora_linear(x, *packed, None, *lora(), 1.0)
    assert y.dtype == with_lora.dtype == torch.bfloat16
    assert torch.equal(y, int4_linear(x.bfloat16(), *packed))


def test_second_derivative_of_int4_linear_is_that_of_the_decoded_weight(packed):
    x = torch.randn(5, 80, requires_grad=True)
    v = torch.randn(5, 24, requires_grad=True)
    (dx,) = torch.autograd.grad(int4_linear(x, *packed), x, v, create_graph=True)
    (dv,) = torch.autograd.grad((dx**2).sum(), v)
    weight = int4_dequantize(*packed, 80)
    torch.testing.assert_close(dv, 2 * (v @ weight) @ weight.T, rtol=1e-5, atol=1e-3)


def test_second_derivative_through_lora_is_refused(packed):
    x = torch.randn(5, 80, requires_grad=True)
    (dx,) = torch.autograd.grad(int4_lora_linear(x, *packed, None, *lora(), 1.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^int4_lora_linear has no second derivative: ask for"):
        dx.sum().backward()


def test_derivative_of_the_backward_operator_is_refused(packed):
    x, dy, (A, B) = torch.randn(5, 80), torch.randn(5, 24, requires_grad=True), lora()
    backward = torch.ops.entrenar.int4_lora_linear_backward
    dx, *_ = backward(dy, x, *packed, A, B, x @ A.T, 1.0, 64, True, False)
    with pytest.raises(RuntimeError, match="int4_lora_linear has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_opcheck_of_the_backward_operator(packed, needs_dx, apart):
    x, dy, adapter = torch.randn(80, 5).T, torch.randn(5, 24), [y.detach() for y in lora()]
    arguments = (dy, x, *packed, *adapter, x @ adapter[0].T, 1.0, 64, needs_dx, apart)
    results = torch.library.opcheck(torch.ops.entrenar.int4_lora_linear_backward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_backward_keeps_packed_weights_only(packed):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        int4_lora_linear(torch.randn(5, 80, requires_grad=True), *packed, None, *lora(), 1.0)
    assert sorted(t.numel() for t in kept if t.dtype == torch.uint8) == sorted(t.numel() for t in packed)
    assert max(t.numel() for t in kept if t.is_floating_point()) == 5 * 80


def test_x_without_gradient_still_trains_the_adapter(packed):
    A, B = lora()
    int4_lora_linear(torch.randn(5, 80), *packed, None, A, B, 1.0).sum().backward()
    assert A.grad.abs().sum() > 0
    assert B.grad.abs().sum() > 0


def test_compiles_without_graph_breaks(packed):
    A, B = lora()
    back = int4_quantize(torch.randn(80, 24))

    def step(x):
        y = int4_lora_linear(x, *packed, None, A, B, 0.5)
        return int4_linear(torch.nn.functional.silu(y), *back).square().sum()

    x = torch.randn(3, 80, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = (torch.autograd.grad(f(x), [x, A, B]) for f in (step, compiled))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 40), "are not an int4 matrix"),
        (torch.randn(2, 80).double(), "float32 or bfloat16"),
        (torch.tensor(1.0), r"\[\.\.\., K\]"),
    ],
)
def test_bad_input_is_refused(packed, x, message):
    with pytest.raises(ValueError, match=message):
        int4_linear(x, *packed)


def test_bad_bias_and_adapter_are_refused(packed):
    x = torch.randn(2, 80)
    with pytest.raises(ValueError, match="bias has shape"):
        int4_linear(x, *packed, torch.randn(23))
    with pytest.raises(ValueError, match="are not"):
        int4_lora_linear(x, *packed, None, torch.randn(4, 80), torch.randn(24, 5), 1.0)
    for lora_x in (x[:1], x.bfloat16()):
        with pytest.raises(ValueError, match=r"lora_x is \([12], 80\) torch\.\w+, and x \(2, 80\) torch.float32"):
            int4_lora_linear(x, *packed, None, *lora(), 1.0, lora_x=lora_x)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_memory_may_begin_anywhere(rows, dtype, limit, backend):
    A, B = lora()
    packed, x = int4_quantize(torch.randn(24 * 80 + 1)[1:].view(24, 80)), torch.randn(rows, 80).to(dtype)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(rows, 80)
    shifted_A = torch.cat([A.new_zeros(1), A.detach().flatten()])[1:].view(4, 80).requires_grad_()
    results = []
    for leaf, own in ((x, A), (shifted, A), (x, shifted_A)):
        y = int4_lora_linear(leaf.requires_grad_(), *packed, None, own, B, 0.5)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, own, B])))
    for a, *others in zip(*results, strict=True):
        for b in others:
            assert (a - b).abs().max() <= limit * a.abs().max()


def skip_where_int8_is_refused(backend):
    if backend in GPU:
        pytest.skip("int8 activations are the CPU's")


@pytest.mark.parametrize(("rows", "alone"), [(16, True), (17, False)])
def test_int8_leaves_up_to_16_rows_alone(rows, alone, backend):
    skip_where_int8_is_refused(backend)
    codes, scales = int4_quantize(torch.randn(40, 100))
    x = torch.randn(rows, 100)
    assert torch.equal(int4_linear(x, codes, scales, int8=True), int4_linear(x, codes, scales)) is alone


def test_int8_is_refused_where_it_has_no_kernel(backend):
    if backend not in GPU:
        pytest.skip("the CPU has one")
    packed, x = int4_quantize(torch.randn(24, 80)), torch.randn(40, 80)
    for call in (
        lambda: int4_linear(x, *packed, int8=True),
        lambda: int4_lora_linear(x, *packed, None, *lora(), 1.0, int8=True),
    ):
        with pytest.raises(RuntimeError, match="int8 activations must be off on CUDA"):
            call()


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("sizes", [(20, 70, 100), (33, 5, 1100), (301, 130, 576), (17, 1, 1), (40, 16, 2000)], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str)
def test_int8_product_equals_that_of_the_rounded_rows(dtype, limit, sizes, block, backend):
    skip_where_int8_is_refused(backend)
    rows, outputs, columns = sizes
    codes, scales = int4_quantize(torch.randn(outputs, columns), block=block)
    x = torch.randn(1, rows, 2 * columns)[..., ::2].to(dtype)
    x[0, 1] = 0
    bias = torch.randn(outputs)
    y = int4_linear(x, codes, scales, bias, block=block, int8=True)
    expected = int4_linear_reference(int8_rows_reference(x, block).double(), codes, scales, bias, block)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= limit * expected.abs().max()


def test_int8_rounds_half_to_even_and_keeps_what_is_not_finite(backend):
    skip_where_int8_is_refused(backend)
    x = torch.zeros(20, 64)
    x[:, 0] = 127
    x[:, 1:5] = torch.tensor([0.5, 1.5, -2.5, 3.4])
    x[1, 7], x[2, 7] = torch.inf, torch.nan
    x[3] = 1e-40
    codes, scales = int4_quantize(torch.eye(64))
    y = int4_linear(x, codes, scales, int8=True)
    weight = int4_dequantize(codes, scales, 64).diagonal()
    torch.testing.assert_close(y[0, :5] / weight[:5], torch.tensor([127.0, 0, 2, -2, 3]))
    assert not y[1].isfinite().any()
    assert y[2].isnan().all()
    assert not y[3].any()


@pytest.mark.cpu("int8 activations are the CPU's")
def test_int8_leaves_gradients_and_few_rows_exact(packed):
    A, B = lora()
    for rows in (2, 40):
        x = torch.randn(rows, 80, requires_grad=True)
        plain, rounded = (int4_lora_linear(x, *packed, None, A, B, 0.5, int8=int8) for int8 in (False, True))
        assert torch.equal(plain, rounded) == (rows == 2)
        dy = torch.randn_like(plain)
        for a, b in zip(*(torch.autograd.grad(y, [x, A, B], dy) for y in (plain, rounded)), strict=True):
            assert torch.equal(a, b)


# Sizes that threads share by rows, by columns because they are many, and in blocks that each takes from the others.
@pytest.mark.cpu("a GPU has none of the CPU's threads")
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1100, 130, 700), (400, 3300, 70), (40, 70, 3300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(rows, outputs, columns, dtype):
    packed = int4_quantize(torch.randn(outputs, columns))
    x, dy = torch.randn(rows, columns, dtype=dtype, requires_grad=True), torch.randn(rows, outputs, dtype=dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y = int4_linear(x, *packed)
        results.append([y, int4_linear(x, *packed, int8=True), *torch.autograd.grad(y, x, dy)])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("columns", "rank"), [(80, 4), (80, 700), (1700, 16)])
def test_int8_does_not_touch_the_adapters_part(columns, rank, backend):
    skip_where_int8_is_refused(backend)
    packed, A, B = int4_quantize(torch.randn(130, columns)), torch.randn(rank, columns), torch.randn(130, rank)
    x = torch.randn(40, columns)
    adapter = [int4_lora_linear(x, *packed, None, A, B, s, int8=True) for s in (0.0, 0.5)]
    expected = 0.5 * (x.double() @ A.T.double() @ B.T.double())
    error = (adapter[1] - adapter[0]).double() - expected
    assert error.abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.cpu("int8 activations are the CPU's")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.integers(5, 200), outputs=st.integers(1, 80), columns=st.integers(1, 300))
def test_int8_error_stays_within_half_a_step_of_every_element(rows, outputs, columns):
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    codes, scales = int4_quantize(torch.randn(outputs, columns))
    exact = int4_linear_reference(x.double(), codes, scales, None, 64)
    weight = int4_dequantize(codes, scales, columns).double().abs()
    steps = torch.nn.functional.pad(x.abs(), (0, -columns % 64)).unflatten(-1, (-1, 64)).amax(-1) / 127
    per_element = steps.repeat_interleave(64, -1)[:, :columns].double() / 2
    error = (int4_linear(x, codes, scales, int8=True) - exact).abs()
    assert (error <= per_element @ weight.T + 1e-5 * exact.abs().max()).all()
