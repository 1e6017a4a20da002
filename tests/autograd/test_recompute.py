"""Values that a backward computes anew."""

from __future__ import annotations

import gc
import weakref

import torch
from torch.utils.checkpoint import checkpoint

from entrenar.autograd.recompute import recomputed


class Counter:
    """Squares, and counts how often."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * x


def test_backward_calls_the_function_and_keeps_no_value():
    square, x = Counter(), torch.randn(5, requires_grad=True)
    w = torch.randn(5, requires_grad=True)
    value = square(x)
    with recomputed(value, square, x):
        y = value * w
    alive = weakref.ref(value)
    del value
    gc.collect()
    assert alive() is None
    dx, dw = torch.autograd.grad(y.sum(), [x, w])
    assert square.calls == 2
    torch.testing.assert_close(dw, x.detach() ** 2)
    torch.testing.assert_close(dx, 2 * (x * w).detach())


def test_second_derivative_goes_through_the_value():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def f(x, w):
        value = x * x
        with recomputed(value, torch.square, x):
            return (value * w).sin()

    assert torch.autograd.gradgradcheck(f, (x, w))


def test_other_tensors_are_kept_as_they_are():
    x = torch.randn(5, requires_grad=True)
    value = x * x
    with recomputed(value, lambda _: torch.full((5,), torch.nan), x):
        y = x.exp()
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, x.detach().exp())


def test_value_of_another_shape_is_given_back_in_it():
    x = torch.randn(2, 3, requires_grad=True)
    w = torch.randn(6, requires_grad=True)
    value = x * x
    with recomputed(value, torch.square, x):
        y = value.flatten() * w
    (dw,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(dw, (x.detach() ** 2).flatten())


def test_checkpointing_decides_instead():
    square, x = Counter(), torch.randn(5, requires_grad=True)

    def block(x):
        value = square(x)
        with recomputed(value, square, x):
            return value * value

    y = checkpoint(block, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert square.calls == 2  # in the forward, and in the segment's second run
    torch.testing.assert_close(dx, 4 * x.detach() ** 3)


def test_nothing_happens_without_gradients():
    x = torch.randn(5)
    with recomputed(x * x, torch.square, x):
        y = x * 2
    assert torch.equal(y, 2 * x)


def test_a_value_that_nothing_is_learnt_through_is_kept():
    square, x, w = Counter(), torch.randn(5), torch.randn(5, requires_grad=True)
    value = square(x)
    with recomputed(value, square, x):
        y = value * w
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], x**2)
    assert square.calls == 1
