"""Sums and means over dimensions named in any way."""

from __future__ import annotations

import pytest
import torch

from entrenar.autograd import ops


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, (), 1, -1, (2, 0), [-1, 1], (1, 0, 2)], ids=str)
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_dimensions_in_any_order(name, dim, keepdim):
    x = torch.randn(2, 3, 4, requires_grad=True)
    results = []
    for op in (getattr(ops, name), getattr(torch, name)):
        y = op(x, dim, keepdim)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["sum", "mean"])
def test_dtype_of_the_result_and_of_the_gradient(name):
    x = torch.randn(5, 7).bfloat16().requires_grad_()
    results = []
    for op in (getattr(ops, name), getattr(torch, name)):
        y = op(x, 1, dtype=torch.float64)
        results.append((y, *torch.autograd.grad(y, x, torch.arange(5.0, dtype=torch.float64))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dim", [3, (0, 0), (-4,)])
def test_bad_dimensions_are_refused_as_by_torch(dim):
    x = torch.randn(2, 3, 4, requires_grad=True)
    with pytest.raises((IndexError, RuntimeError)):
        ops.sum(x, dim)


def test_long_sums_of_16_bits_are_those_of_float32():
    x = torch.full((3, 10_000), 0.1, dtype=torch.bfloat16)
    assert torch.equal(ops.sum(x, 1), x.float().sum(1).bfloat16())
    assert torch.equal(ops.mean(x, 1), x.float().mean(1).bfloat16())
