"""Arithmetic, element by element, with torch's broadcasting and type promotion.

An operand is a tensor or a number. Its gradient is summed over the dimensions along which it was broadcast, and
converted to its dtype. Complex values raise TypeError; other errors are those of torch's function of the same name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import Number, Operand, fit, layout, refuse_complex, save, saved
from entrenar.autograd.ops._override import overridable


@overridable
def add(input: Operand, other: Operand, *, alpha: Number = 1) -> Tensor:
    """The sum input + alpha * other. Gradients: dy, and alpha * dy."""
    refuse_complex("add", input, other, alpha)
    return AddFunction.apply(input, other, alpha)


@overridable
def sub(input: Operand, other: Operand, *, alpha: Number = 1) -> Tensor:
    """The difference input - alpha * other. Gradients: dy, and -alpha * dy."""
    refuse_complex("sub", input, other, alpha)
    return SubFunction.apply(input, other, alpha)


@overridable
def mul(input: Operand, other: Operand) -> Tensor:
    """The product input * other. Gradients: dy * other, and dy * input."""
    refuse_complex("mul", input, other)
    return MulFunction.apply(input, other)


@overridable
def div(input: Operand, other: Operand, *, rounding_mode: str | None = None) -> Tensor:
    """The quotient input / other. Gradients: dy / other, and -dy * input / other².

    With `rounding_mode` "trunc" or "floor" the quotient is rounded to an integer, and the gradients are zero.
    """
    refuse_complex("div", input, other)
    return DivFunction.apply(input, other, rounding_mode)


@overridable
def neg(input: Tensor) -> Tensor:
    """The opposite, -input. Gradient: -dy."""
    refuse_complex("neg", input)
    return NegFunction.apply(input)


@overridable
def pow(input: Operand, exponent: Operand) -> Tensor:
    """The power y = input ** exponent, of which at least one is a tensor.

    Gradients: dy * exponent * input ** (exponent - 1), which is 0 where the exponent is 0; and dy * y * log(input),
    which is 0 where the input is 0 and the exponent is not negative.
    """
    refuse_complex("pow", input, exponent)
    return PowFunction.apply(input, exponent)


@overridable
def exp(input: Tensor) -> Tensor:
    """The exponential y = e ** input. Gradient: dy * y."""
    refuse_complex("exp", input)
    return ExpFunction.apply(input)


@overridable
def log(input: Tensor) -> Tensor:
    """The natural logarithm of input. Gradient: dy / input."""
    refuse_complex("log", input)
    return LogFunction.apply(input)


@overridable
def sqrt(input: Tensor) -> Tensor:
    """The square root y = √input. Gradient: dy / 2y."""
    refuse_complex("sqrt", input)
    return SqrtFunction.apply(input)


class AddFunction(Function):
    """y = a + αb; da = dy, db = α dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Operand, other: Operand, alpha: Number) -> Tensor:
        return torch.add(input, other, alpha=alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, other, ctx.alpha = inputs
        ctx.input, ctx.other = layout(input), layout(other)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        da = fit(dy, ctx.input) if needs[0] else None
        db = fit(dy if ctx.alpha == 1 else ctx.alpha * dy, ctx.other) if needs[1] else None
        return da, db, None


class SubFunction(Function):
    """y = a - αb; da = dy, db = -α dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Operand, other: Operand, alpha: Number) -> Tensor:
        return torch.sub(input, other, alpha=alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, other, ctx.alpha = inputs
        ctx.input, ctx.other = layout(input), layout(other)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        da = fit(dy, ctx.input) if needs[0] else None
        db = fit(-ctx.alpha * dy, ctx.other) if needs[1] else None
        return da, db, None


class MulFunction(Function):
    """y = ab; da = b dy, db = a dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Operand, other: Operand) -> Tensor:
        return torch.mul(input, other)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, other = inputs
        needs = ctx.needs_input_grad
        ctx.input, ctx.other = layout(input), layout(other)
        save(ctx, input if needs[1] else None, other if needs[0] else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        a, b = saved(ctx)
        da = fit(dy * b, ctx.input) if needs[0] else None
        db = fit(dy * a, ctx.other) if needs[1] else None
        return da, db


class DivFunction(Function):
    """y = a / b; da = dy / b, db = -dy a / b². Rounded, y is piecewise constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Operand, other: Operand, rounding_mode: str | None) -> Tensor:
        return torch.div(input, other, rounding_mode=rounding_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, other, rounding_mode = inputs
        ctx.input, ctx.other = layout(input), layout(other)
        ctx.rounded = rounding_mode is not None
        if not ctx.rounded:
            save(ctx, input if ctx.needs_input_grad[1] else None, other)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if ctx.rounded:
            zero = torch.zeros_like(dy)
            return fit(zero, ctx.input) if needs[0] else None, fit(zero, ctx.other) if needs[1] else None, None
        a, b = saved(ctx)
        da = fit(dy / b, ctx.input) if needs[0] else None
        # b² may overflow or vanish where a / b / b does not.
        db = fit(-dy * (a / b / b), ctx.other) if needs[1] else None
        return da, db, None


class NegFunction(Function):
    """y = -x; dx = -dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.neg(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class PowFunction(Function):
    """y = xᵖ; dx = dy p xᵖ⁻¹, dp = dy y log x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Operand, exponent: Operand) -> Tensor:
        return torch.pow(input, exponent)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, exponent = inputs
        ctx.input, ctx.exponent = layout(input), layout(exponent)
        save(ctx, input, exponent, output if ctx.needs_input_grad[1] else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        x, p, y = saved(ctx)
        dx = fit(PowFunction.dx(dy, x, p), ctx.input) if needs[0] else None
        dp = fit(PowFunction.dp(dy, x, p, y), ctx.exponent) if needs[1] else None
        return dx, dp

    @staticmethod
    def dx(dy: Tensor, x: Tensor, p: Operand) -> Tensor:
        if isinstance(p, Tensor):
            return torch.where(p == 0, 0, dy * (p * x ** (p - 1)))
        return torch.zeros_like(dy) if p == 0 else dy * (p * x ** (p - 1))

    @staticmethod
    def dp(dy: Tensor, x: Operand, p: Tensor, y: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = x.to(y.dtype)
        elif x == 0:
            x = torch.zeros_like(y)
        else:
            return dy * (y * (math.log(x) if x > 0 else math.nan))
        # log 1 = 0 in place of log 0, of which neither the product nor its own derivatives would be numbers.
        return dy * (y * torch.where((x == 0) & (p >= 0), 1, x).log())


class ExpFunction(Function):
    """y = eˣ; dx = dy y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.exp(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.input = layout(inputs[0])
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return fit(dy * y, ctx.input)


class LogFunction(Function):
    """y = log x; dx = dy / x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.log(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.input = layout(inputs[0])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return fit(dy / x, ctx.input)


class SqrtFunction(Function):
    """y = √x; dx = dy / 2y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.sqrt(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.input = layout(inputs[0])
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return fit(dy / (2 * y), ctx.input)
