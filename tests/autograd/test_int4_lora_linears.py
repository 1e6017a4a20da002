"""Several LoRA layers at one x: each result is that of its own call, and dx is the sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_linears import assert_near_float64, make

from entrenar.autograd.ops import int4_lora_linear, int4_lora_linears

QKV = (80, (24, 8, 40), (4, 1, 3), (True, False, True))


@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 13), (300,), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_those_of_separate_calls(rows, dtype, backend):
    layers = make(*QKV)
    x = torch.randn(*rows, 80).to(dtype)
    together = int4_lora_linears(x, *layers, 0.5)
    separate = [int4_lora_linear(x, *layer, 0.5) for layer in zip(*layers, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, separate, strict=True))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(data=st.data())
def test_gradients_equal_the_references(backend, data):
    count = data.draw(st.integers(1, 4))
    sizes, ranks = (tuple(data.draw(st.lists(st.integers(1, 70), min_size=count, max_size=count))) for _ in range(2))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150))
    dtype, limit = data.draw(st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 2**-7)]))
    if dtype == torch.bfloat16 and backend in ("cuda", "emulated"):
        limit += count * 2**-9  # a GPU rounds the sum after each product
    torch.manual_seed(0)
    assert_near_float64(rows, columns, sizes, ranks, dtype, limit)


# What the kernels of a GPU cut: the rows among blocks and tensors of partial sums, the columns among blocks, both into
# stages, the ranks into passes.
@pytest.mark.parametrize(
    ("rows", "columns", "size", "rank"),
    [(1100, 70, 24, 5), (2300, 40, 16, 40), (600, 264, 33, 70), (20, 8500, 8, 9), (2, 9000, 8, 70)],
    ids=str,
)
def test_gradients_equal_the_references_at_sizes_that_are_cut(rows, columns, size, rank, backend):
    assert_near_float64(rows, columns, (size,), (rank,), torch.bfloat16, 2**-7 + 2**-9)


@pytest.mark.parametrize("rows", [3, 70, 600])
def test_rows_keep_to_themselves_what_is_not_finite(rows, backend):
    codes, scales, _, (A, _), (B, _) = make(200, (24, 8), (20, 1), (False, False))
    call = torch.ops.entrenar.int4_lora_linear
    x = torch.randn(rows, 200).bfloat16()
    _, u = call(x, codes[0], scales[0], None, A, B, 0.5, 64, None, False)
    x[1, 199] = torch.inf
    _, other = call(x, codes[0], scales[0], None, A, B, 0.5, 64, None, False)
    assert torch.equal(other[1].isfinite(), torch.zeros(20, dtype=torch.bool))
    assert torch.equal(other.isfinite().all(1), torch.arange(rows) != 1)
    assert torch.equal(other[other.isfinite()], u[other.isfinite()])


def test_more_layers_than_a_launch_takes(backend):
    codes, scales, _, lora_A, lora_B = make(80, (8,) * 18, (3,) * 18, (False,) * 18)
    x = torch.randn(5, 80).bfloat16()
    ys, us = torch.ops.entrenar.int4_lora_linears(x, codes, scales, None, lora_A, lora_B, 0.5, 64, False)
    for y, u, *layer in zip(ys, us, codes, scales, lora_A, lora_B, strict=True):
        alone = torch.ops.entrenar.int4_lora_linear(x, *layer[:2], None, *layer[2:], 0.5, 64, None, False)
        assert torch.equal(y, alone[0])
        assert torch.equal(u, alone[1])


@pytest.mark.cpu("int8 activations are the CPU's")
def test_results_in_int8_are_those_of_separate_calls():
    layers = make(*QKV)
    x = torch.randn(40, 80)
    together = int4_lora_linears(x, *layers, 0.5, int8=True)
    separate = [int4_lora_linear(x, *layer, 0.5, int8=True) for layer in zip(*layers, strict=True)]
    exact = int4_lora_linears(x, *layers, 0.5)
    for a, b, other in zip(together, separate, exact, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, other)


def test_result_without_gradient_counts_as_zero():
    layers = make(*QKV)
    x = torch.randn(2, 3, 80, requires_grad=True)
    first = int4_lora_linears(x, *layers, 0.5)[0]
    alone = int4_lora_linear(x, *(each[0] for each in layers), 0.5)
    leaves = [x, layers[3][0], layers[4][0]]
    found = torch.autograd.grad(first.sum(), [*leaves, layers[3][1]])
    expected = torch.autograd.grad(alone.sum(), leaves)
    for a, e in zip(found, expected, strict=False):
        torch.testing.assert_close(a, e)
    assert not found[-1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_adapters_over_no_rows_are_zeros(dtype, backend):
    layers = make(*QKV)
    ys = int4_lora_linears(torch.randn(0, 80).to(dtype), *layers, 0.5)
    gradients = torch.autograd.grad(ys, [*layers[3], *layers[4]], [torch.ones_like(y) for y in ys])
    assert not any(gradient.any() for gradient in gradients)


def test_result_that_leads_nowhere_has_no_gradient():
    codes, scales, _, lora_A, lora_B = make(*QKV)
    x = torch.randn(5, 80, requires_grad=True)
    ys, _ = torch.ops.entrenar.int4_lora_linears(x, codes, scales, None, lora_A, lora_B, 0.5, 64, False)
    (dx,) = torch.autograd.grad(torch._C._functions.UndefinedGrad()(ys[0]).sum(), x)
    assert not dx.any()


def test_opcheck():
    codes, scales, bias, lora_A, lora_B = make(80, (24, 8), (4, 1), (True, True))
    x, ops = torch.randn(80, 5).T.requires_grad_(), torch.ops.entrenar
    arguments = (x, codes, scales, torch.cat(bias), lora_A, lora_B, 0.5, 64, False)
    results = torch.library.opcheck(ops.int4_lora_linears.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    x, *adapters = (x.detach(), [A.detach() for A in lora_A], [B.detach() for B in lora_B])
    ys, us = ops.int4_lora_linears(x, codes, scales, None, *adapters, 0.5, 64, False)
    for needs_dx in (True, False):
        arguments = (ys, x, codes, scales, *adapters, us, 0.5, 64, needs_dx)
        results = torch.library.opcheck(ops.int4_lora_linears_backward.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_graph_breaks():
    layers = make(*QKV)
    x = torch.randn(5, 80, requires_grad=True)
    compiled = torch.compile(lambda x: int4_lora_linears(x, *layers, 0.5), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), int4_lora_linears(x, *layers, 0.5), strict=True):
        assert torch.equal(a, b)
        (da,), (db,) = torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), x, retain_graph=True)
        assert torch.equal(da, db)
        break


def test_autocast_computes_in_its_dtype():
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        ys = int4_lora_linears(torch.randn(5, 80), *make(*QKV), 0.5)
    assert {y.dtype for y in ys} == {torch.bfloat16}


def test_second_derivative_is_refused():
    x = torch.randn(5, 80, requires_grad=True)
    (dx,) = torch.autograd.grad(int4_lora_linears(x, *make(*QKV), 0.5)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^int4_lora_linears has no second derivative: ask for"):
        dx.sum().backward()


def test_derivative_of_the_backward_operator_is_refused():
    codes, scales, _, lora_A, lora_B = make(*QKV)
    x, ops = torch.randn(5, 80), torch.ops.entrenar
    ys, us = ops.int4_lora_linears(x, codes, scales, None, lora_A, lora_B, 0.5, 64, False)
    dys = [torch.ones_like(y).requires_grad_() for y in ys]
    dx, *_ = ops.int4_lora_linears_backward(dys, x, codes, scales, lora_A, lora_B, us, 0.5, 64, True)
    with pytest.raises(RuntimeError, match="int4_lora_linears has no second derivative"):
        dx.sum().backward()


def test_lists_of_different_lengths_are_refused():
    codes, scales, bias, lora_A, lora_B = make(*QKV)
    with pytest.raises(ValueError, match="lists of one length up to 8, not of 3, 3, 3, 2 and 3"):
        int4_lora_linears(torch.randn(5, 80), codes, scales, bias, lora_A[:2], lora_B, 0.5)
    with pytest.raises(ValueError, match="not of 0"):
        int4_lora_linears(torch.randn(5, 80), [], [], [], [], [], 0.5)


def test_adapter_that_does_not_fit_is_refused():
    codes, scales, bias, lora_A, lora_B = make(*QKV)
    with pytest.raises(ValueError, match=r"lora_A \(4, 79\)"):
        int4_lora_linears(torch.randn(5, 80), codes, scales, bias, [lora_A[0][:, 1:], *lora_A[1:]], lora_B, 0.5)


def test_operator_checks_its_lists():
    codes, scales, _, lora_A, lora_B = make(*QKV)
    x, ops = torch.randn(5, 80), torch.ops.entrenar
    with pytest.raises(RuntimeError, match="lists of one length"):
        ops.int4_lora_linears(x, codes, scales[:2], None, lora_A, lora_B, 0.5, 64, False)
    with pytest.raises(RuntimeError, match="one after another: 72 elements"):
        ops.int4_lora_linears(x, codes, scales, torch.zeros(71), lora_A, lora_B, 0.5, 64, False)
    ys, us = ops.int4_lora_linears(x, codes, scales, None, lora_A, lora_B, 0.5, 64, False)
    with pytest.raises(RuntimeError, match="dy and u must be lists of the layers' length"):
        ops.int4_lora_linears_backward(ys, x, codes, scales, lora_A, lora_B, us[:2], 0.5, 64, True)
    with pytest.raises(RuntimeError, match="u must have 5 rows, those of x, of 4"):
        ops.int4_lora_linears_backward(ys, x, codes, scales, lora_A, lora_B, [us[0].T, *us[1:]], 0.5, 64, True)
    with pytest.raises(RuntimeError, match="dy must have 5 rows, those of x, of 24"):
        ops.int4_lora_linears_backward([ys[0].flatten(), *ys[1:]], x, codes, scales, lora_A, lora_B, us, 0.5, 64, True)
    with pytest.raises(RuntimeError, match="dy must have"):
        ops.int4_lora_linears_backward([ys[0][0, 0], *ys[1:]], x, codes, scales, lora_A, lora_B, us, 0.5, 64, True)


@pytest.mark.cpu("on CUDA one product comes after the other")
def test_more_layers_than_a_sum_takes():
    codes, scales, _, lora_A, lora_B = (each * 3 for each in make(*QKV))
    x, ops = torch.randn(5, 80), torch.ops.entrenar
    ys, us = ops.int4_lora_linears(x, codes, scales, None, lora_A, lora_B, 0.5, 64, False)
    with pytest.raises(RuntimeError, match="must have at most 16 products, and has 18"):
        ops.int4_lora_linears_backward(ys, x, codes, scales, lora_A, lora_B, us, 0.5, 64, True)
