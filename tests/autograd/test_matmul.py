"""Every pair of ranks of matmul and linear, and autocast."""

from __future__ import annotations

import itertools

import pytest
import torch

from entrenar.autograd import ops

LEFT = [(4,), (3, 4), (2, 3, 4), (1, 3, 4), (5, 1, 3, 4), (5, 2, 3, 4)]
RIGHT = [(4,), (4, 6), (2, 4, 6), (1, 4, 6), (5, 2, 4, 6), (1, 2, 4, 1)]
INTEGERS = pytest.param(torch.int64, marks=pytest.mark.cpu("torch has no products of integers on CUDA"))
EMPTY = [
    ((0, 4), (4, 6)),
    ((3, 0), (0, 6)),
    ((2, 3, 4), (4, 0)),
    ((0,), (0,)),
    ((0, 3, 4), (4, 6)),
    ((3, 4), (0, 4, 2)),
]


def gradients(op, *shapes, dtype=torch.float64):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    y = op(*inputs)
    return (y, *torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=generator).to(y.dtype)))


@pytest.mark.parametrize(("left", "right"), [*itertools.product(LEFT, RIGHT), *EMPTY], ids=str)
def test_matmul_of_every_rank(left, right):
    torch.testing.assert_close(gradients(ops.matmul, left, right), gradients(torch.matmul, left, right))


@pytest.mark.parametrize("x", [*LEFT, (0, 4), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("rest", [((6, 4),), ((6, 4), (6,)), ((4,),), ((4,), ()), ((0, 4), (0,))], ids=str)
def test_linear_of_every_rank(x, rest):
    if rest == ((4,), ()) and len(x) == 2:
        pytest.skip("torch refuses a bias here")
    linear = torch.nn.functional.linear
    torch.testing.assert_close(gradients(ops.linear, x, *rest), gradients(linear, x, *rest))


@pytest.mark.cpu("it is the CPU's memory that is measured")
def test_gradient_of_a_matrix_shared_by_a_batch_is_one_product():
    x, w = torch.randn(64, 2, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    for y, shared in ((ops.matmul(x, w), w), (ops.matmul(w.mT, x.mT), w)):
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(y, shared, torch.ones_like(y))
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert largest <= 4 * y.numel() + 4 * x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, INTEGERS])
def test_autocast_casts_as_torchs(dtype):
    x, w = torch.randn(3, 8).to(dtype), torch.randn(8, 8).to(dtype)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(ops.matmul(x, w), torch.matmul(x, w))
        assert torch.equal(ops.linear(x, w), torch.nn.functional.linear(x, w))


def test_autocast_returns_gradients_in_the_parameters_dtype():
    x, w, b = torch.randn(3, 8), torch.randn(8, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    results = []
    for linear in (ops.linear, torch.nn.functional.linear):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            y = linear(x, w, b)
        results.append(torch.autograd.grad(y.float().square().sum(), [w, b]))
    assert all(g.dtype == torch.float32 for g in results[0])
    torch.testing.assert_close(*results)
