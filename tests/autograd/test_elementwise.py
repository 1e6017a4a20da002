"""Arithmetic where torch's test inputs do not go: numbers on the left, powers at zero, what is kept for backward."""

from __future__ import annotations

import weakref

import pytest
import torch

from entrenar.autograd import ops
from entrenar.autograd.ops._gradient import fit, layout


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "pow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [3, 0.7])
def test_number_on_the_left(name, dtype, number):
    results = []
    for op in (getattr(ops, name), getattr(torch, name)):
        x = torch.tensor([0.5, 2.0, 3.0], dtype=dtype, requires_grad=True)
        y = op(number, x)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("base", [-2, -1.5, 0, 0.0])
def test_power_of_a_number_that_is_not_positive(base):
    results = []
    for op in (ops.pow, torch.pow):
        p = torch.tensor([-1.0, 0.0, 1.0, 2.0, 2.5], requires_grad=True)
        y = op(base, p)
        results.append((y, *torch.autograd.grad(y, p, torch.ones_like(y))))
    torch.testing.assert_close(*results, equal_nan=True)


def power_cases() -> list[torch.Tensor]:
    x = torch.tensor([-2.0, 0.0, 1e-45, 3.0, torch.inf, torch.nan]).repeat_interleave(6)
    return [x, torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, torch.nan]).repeat(6)]


def test_gradients_of_pow_at_zeros_and_infinities():
    results = []
    for op in (ops.pow, torch.pow):
        x, p = (v.requires_grad_() for v in power_cases())
        results.append(torch.autograd.grad(op(x, p).sum(), [x, p]))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("exponent", [-1, 0, 0.0, 0.5, 1, 2, True])
def test_gradient_of_a_power_by_a_number(exponent):
    results = []
    for op in (ops.pow, torch.pow):
        x = torch.tensor([-2.0, 0.0, 3.0, torch.inf, torch.nan], requires_grad=True)
        results.append(torch.autograd.grad(op(x, exponent).sum(), x))
    torch.testing.assert_close(*results, equal_nan=True)


def test_second_derivative_of_a_power_of_zero_is_a_number():
    x, p = torch.tensor(0.0), torch.tensor(2.0, requires_grad=True)
    (dp,) = torch.autograd.grad(ops.pow(x, p), p, create_graph=True)
    assert torch.autograd.grad(dp, p)[0] == 0


def test_gradient_of_a_mixed_dtype_is_in_the_operands_dtype():
    a = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    y = ops.div(ops.mul(a, b), ops.add(b, torch.arange(4)))
    assert y.dtype == torch.float64
    da, db = torch.autograd.grad(y.sum(), [a, b])
    assert (da.shape, da.dtype, db.shape, db.dtype) == (a.shape, a.dtype, b.shape, b.dtype)


def test_fit_needs_no_engine_to_finish_a_gradient():
    operand = torch.zeros(1, 3, dtype=torch.bfloat16)
    fitted = fit(torch.ones(2, 2, 3, dtype=torch.float64), layout(operand))
    torch.testing.assert_close(fitted, torch.full_like(operand, 4))


@pytest.mark.parametrize("op", [ops.mul, ops.div, ops.matmul, ops.linear])
def test_only_what_the_gradient_needs_is_kept(op):
    frozen, trained = torch.randn(6, 6), torch.randn(6, 6, requires_grad=True)
    for inputs in ((trained, frozen), (frozen, trained)):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            op(*inputs)
        # The gradient of a quotient in its divisor needs both.
        expected = (
            {frozen.data_ptr(), trained.data_ptr()} if op is ops.div and inputs[1] is trained else {frozen.data_ptr()}
        )
        assert {t.data_ptr() for t in kept} == expected


@pytest.mark.parametrize("op", [ops.mul, ops.div])
def test_an_operand_that_a_hook_put_elsewhere_is_freed(op):
    x, y = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)
    a, b = 1 + x, 1 + y
    expected = torch.autograd.grad(op(a, b).sum(), [x, y], retain_graph=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy):
        z = op(a, b)
    alive = [weakref.ref(a), weakref.ref(b)]
    del a, b
    assert [ref() for ref in alive] == [None, None]
    assert all(map(torch.equal, torch.autograd.grad(z.sum(), [x, y]), expected))
