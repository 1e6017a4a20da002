"""Activation functions, and softmax, with torch's signatures and errors.

Gradients of 16-bit tensors are computed in float32 and rounded once. Complex tensors raise TypeError.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex, widen
from entrenar.autograd.ops._kernel import has_kernel
from entrenar.autograd.ops._library import define
from entrenar.autograd.ops._override import overridable


@overridable
def relu(input: Tensor) -> Tensor:
    """The larger of input and 0. Gradient: dy where the input is positive; at 0 it is taken as 0."""
    refuse_complex("relu", input)
    return ReluFunction.apply(input)


@overridable
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit x Φ(x), with Φ the distribution function of the standard normal.

    Args:
        input: x, floating point.
        approximate: "none", or "tanh" for the approximation x/2 (1 + tanh u) with u = √(2/π) (x + 0.044715 x³).

    Gradient: dy (Φ(x) + x φ(x)), with φ the normal density; or dy ((1 + tanh u) / 2 + x/2 (1 - tanh² u) u').
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    """
    refuse_complex("gelu", input)
    return GeluFunction.apply(input, approximate)


@overridable
def silu(input: Tensor) -> Tensor:
    """The sigmoid linear unit x σ(x). Gradient: dy σ(x) (1 + x (1 - σ(x)))."""
    refuse_complex("silu", input)
    return SiluFunction.apply(input)


@overridable
def sigmoid(input: Tensor) -> Tensor:
    """The logistic function y = σ(x) = 1 / (1 + e⁻ˣ). Gradient: dy y (1 - y)."""
    refuse_complex("sigmoid", input)
    return SigmoidFunction.apply(input)


@overridable
def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent y = tanh x. Gradient: dy (1 - y²)."""
    refuse_complex("tanh", input)
    return TanhFunction.apply(input)


@overridable
def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The softmax y = e^x / Σ e^x, with the sum over `dim`.

    `dtype` is what the input is first converted to, and the result's. Gradient: y (dy - Σ dy y).
    """
    refuse_complex("softmax", input, dtype)
    return SoftmaxFunction.apply(input, dim, dtype)


@overridable
def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The logarithm of the softmax, y = x - log Σ e^x, with the sum over `dim`.

    `dtype` is what the input is first converted to, and the result's. Gradient: dy - e^y Σ dy.
    """
    refuse_complex("log_softmax", input, dtype)
    return LogSoftmaxFunction.apply(input, dim, dtype)


def _backward_fake(dy: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


for _name, _kept in (
    ("silu", "x"),
    ("gelu", "x"),
    ("gelu_tanh", "x"),
    ("sigmoid", "y"),
    ("tanh", "y"),
    ("softmax", "y"),
    ("log_softmax", "y"),
):
    define(f"{_name}_backward(Tensor dy, Tensor {_kept}) -> Tensor", _backward_fake)


class ReluFunction(Function):
    """y = max(x, 0); dx = dy where y > 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.relu(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        # Zero where y <= 0, else dy, also for NaN. torch.where would branch on each element, at many times the cost.
        return torch.ops.aten.threshold_backward(dy, y, 0)


class GeluFunction(Function):
    """y = x Φ(x); dx = dy (Φ(x) + x Φ'(x))."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, approximate: str) -> Tensor:
        return torch.nn.functional.gelu(input, approximate=approximate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, ctx.approximate = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        if has_kernel(dy, input):
            ops = torch.ops.entrenar
            op = ops.gelu_tanh_backward if ctx.approximate == "tanh" else ops.gelu_backward
            return op.default(dy, input), None
        x = widen(input)
        if ctx.approximate == "tanh":
            slope = math.sqrt(2 / math.pi)
            t = torch.tanh(slope * (x + 0.044715 * x**3))
            cdf = (1 + t) / 2
            density = (1 - t * t) / 2 * slope * (1 + 3 * 0.044715 * x * x)
        else:
            cdf = (1 + torch.erf(x / math.sqrt(2))) / 2
            density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return (dy * (cdf + x * density)).to(input.dtype), None


class SiluFunction(Function):
    """y = x s with s = σ(x); dx = dy s (1 + x (1 - s))."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.nn.functional.silu(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        if has_kernel(dy, input):
            return torch.ops.entrenar.silu_backward.default(dy, input)
        x = widen(input)
        s = torch.sigmoid(x)
        return (dy * (s * (1 + x * (1 - s)))).to(input.dtype)


class SigmoidFunction(Function):
    """y = σ(x); dx = dy y (1 - y)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.sigmoid(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        if has_kernel(dy, output):
            return torch.ops.entrenar.sigmoid_backward.default(dy, output)
        y = widen(output)
        return (dy * ((1 - y) * y)).to(output.dtype)


class TanhFunction(Function):
    """y = tanh x; dx = dy (1 - y²)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.tanh(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        if has_kernel(dy, output):
            return torch.ops.entrenar.tanh_backward.default(dy, output)
        y = widen(output)
        return (dy * (1 - y * y)).to(output.dtype)


class SoftmaxFunction(Function):
    """y = softmax(x); dx = y (dy - Σ dy y)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return torch.softmax(input, dim, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, ctx.dim, _ = inputs
        ctx.input = layout(input)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        if along_last(ctx, dy) and has_kernel(dy, output):
            return torch.ops.entrenar.softmax_backward.default(dy, output), None, None
        y = widen(output)
        weighted = dy * y
        dx = torch.addcmul(weighted, y, weighted.sum(ctx.dim, keepdim=True), value=-1)
        return fit(dx, ctx.input), None, None


class LogSoftmaxFunction(Function):
    """y = log softmax(x); dx = dy - e^y Σ dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return torch.log_softmax(input, dim, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, ctx.dim, _ = inputs
        ctx.input = layout(input)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if along_last(ctx, dy) and has_kernel(dy, y):
            return torch.ops.entrenar.log_softmax_backward.default(dy, y), None, None
        dy = widen(dy)
        dx = torch.addcmul(dy, widen(y).exp(), dy.sum(ctx.dim, keepdim=True), value=-1)
        return fit(dx, ctx.input), None, None


def along_last(ctx: Any, dy: Tensor) -> bool:
    """Whether the kernels take the gradient of a softmax: along the last dimension, with no conversion."""
    return 0 < dy.dim() == ctx.dim % dy.dim() + 1 and ctx.input[1] is dy.dtype
