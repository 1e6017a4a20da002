from __future__ import annotations

import pytest
import torch

from entrenar.autograd.gradcheck import GradientError, check_gradient


class Scaled(torch.autograd.Function):
    """x² with a gradient that is off by a factor, or at one element."""

    @staticmethod
    def forward(ctx, x, factor, element):
        ctx.save_for_backward(x)
        ctx.factor, ctx.element = factor, element
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        gradient = 2 * x * dy
        if ctx.element is None:
            return gradient * ctx.factor, None, None
        gradient.view(-1)[ctx.element] *= ctx.factor
        return gradient, None, None


X = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.1, -1.5]])


def test_right_gradients_pass_and_are_counted():
    report = check_gradient(lambda x, y: (torch.sin(x) * y, y.exp()), [X, X.flip(0)])
    assert report.ok
    assert report.checked == 12
    assert report.worst.error < 1e-8
    assert report.kinks == []


@pytest.mark.parametrize("factor", [1.0001, 0.0, -1.0, 2.0])
def test_wrong_gradient_is_caught_and_its_worst_element_named(factor):
    with pytest.raises(GradientError, match=r"input 0\[1, 0\]: gradient .*, difference .* above the threshold 1e-06"):
        check_gradient(lambda x: Scaled.apply(x, factor, 3), X)


def test_errors_of_several_elements_do_not_cancel():
    # The sum of all partial derivatives stays right when two outputs are exchanged.
    class Exchanged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * torch.tensor([1.0, 2.0], dtype=x.dtype)

        @staticmethod
        def backward(ctx, dy):
            return dy * torch.tensor([2.0, 1.0], dtype=dy.dtype)

    with pytest.raises(GradientError):
        check_gradient(Exchanged.apply, torch.ones(2))


def test_the_chapters_settings_in_float32():
    check_gradient(lambda x: x * x, torch.tensor([1.0, 2.0]), 1e-3, 0.2, dtype=torch.float32)
    check_gradient(lambda x: Scaled.apply(x, 1.1, None), torch.tensor([1.0, 2.0]), dtype=torch.float32)
    with pytest.raises(GradientError):
        check_gradient(lambda x: Scaled.apply(x, 1.5, None), torch.tensor([1.0, 2.0]), 1e-3, 0.2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("fn", "point", "kink"),
    [
        (torch.relu, [-1.0, 0.0, 1.0], "[1]"),
        (torch.abs, [0.5, 0.0], "[1]"),
        (lambda x: x.amax(), [1.0, 3.0, 3.0], "[1]"),
        (lambda x: torch.nn.functional.leaky_relu(x, 0.5), [0.0], "[0]"),
    ],
)
def test_kinks_are_reported_and_neither_pass_nor_fail(fn, point, kink):
    report = check_gradient(fn, torch.tensor(point))
    assert f"input 0{kink}" in [found.where for found in report.kinks]
    assert report.checked == len(point) - len(report.kinks)
    assert f"not compared, at a kink: input 0{kink}" in str(report)


def test_a_sharp_but_smooth_bend_is_no_kink():
    report = check_gradient(lambda x: torch.nn.functional.softplus(x, beta=200.0), torch.tensor([0.0, 1e-3]))
    assert report.checked == 2


def test_large_inputs_are_checked_along_directions():
    x = torch.randn(50, 60)
    report = check_gradient(lambda x: x.square(), x, directions=5)
    assert report.checked == 5
    with pytest.raises(GradientError, match="random direction"):
        check_gradient(lambda x: Scaled.apply(x, 1.01, None), x)


def test_strided_inputs():
    assert check_gradient(lambda x: x * x, X.T).checked == 6


def test_random_functions_repeat_their_numbers():
    state = torch.get_rng_state()
    check_gradient(lambda x: torch.nn.functional.dropout(x * x, 0.5), X)
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_stay_as_they_are():
    x = X.clone().requires_grad_()
    check_gradient(lambda x: x.exp(), x)
    assert x.grad is None
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    ("fn", "inputs", "message"),
    [
        (torch.sum, torch.ones(2, dtype=torch.int64), r"input 0 is torch\.int64, which has no real gradient"),
        (torch.sum, torch.ones(2, dtype=torch.complex64), r"input 0 is torch\.complex64"),
        (torch.add, [torch.ones(2), 3.0], "input 1 is a float, not a tensor"),
        (
            lambda x: x.detach(),
            torch.ones(2),
            "the function's result does not depend on its inputs in a differentiable way",
        ),
        (lambda x: x > 0, torch.ones(2), "the function returns no floating-point tensor"),
        (torch.log, -torch.ones(2), "the function's result is not finite"),
    ],
)
def test_what_has_no_gradient_is_refused(fn, inputs, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_gradient(fn, inputs)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"float64 or float32, not torch\.bfloat16"):
        check_gradient(torch.sum, torch.ones(2), dtype=torch.bfloat16)


@pytest.mark.parametrize("max_elements", [1000, 1])
def test_does_not_depend_on_the_default_device(max_elements):
    x = torch.randn(3, dtype=torch.float64)
    with torch.device("meta"):
        assert check_gradient(lambda x: torch.nn.functional.dropout(x, 0.5).exp(), x, max_elements=max_elements).ok
