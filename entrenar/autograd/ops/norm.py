"""Normalization over the last dimensions, with statistics of at least float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex, widen
from entrenar.autograd.ops._override import overridable


@overridable
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Standardize, scale and shift: y = x̂ w + b with x̂ = (x - mean(x)) / sqrt(var(x) + eps).

    The same as torch.nn.functional.layer_norm.

    Args:
        input: x, [..., *normalized_shape], floating point.
        normalized_shape: the last dimensions, over which mean and (biased) variance are taken.
        weight, bias: w and b, [*normalized_shape], or None for 1 and 0.
        eps: is added to the variance, inside the root.

    Returns:
        y, of x's shape and dtype.

    With r = 1 / sqrt(var(x) + eps) and g = w dy:
    dx = r (g - mean(g) - x̂ mean(g x̂)), dw = Σ dy x̂, db = Σ dy.
    x̂ and r are computed anew from x, which is all that is kept. Raises what torch raises; TypeError for complex values.
    """
    refuse_complex("layer_norm", input, weight, bias)
    return LayerNormFunction.apply(input, normalized_shape, weight, bias, eps)


@overridable
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Scale to the root mean square: y = x̂ w with x̂ = x / sqrt(mean(x²) + eps).

    The same as torch.nn.functional.rms_norm.

    Args:
        input: x, [..., *normalized_shape], floating point.
        normalized_shape: the last dimensions, over which the mean is taken.
        weight: w, [*normalized_shape], or None for 1.
        eps: is added to the mean square, inside the root; None stands for the smallest step from 1 of the dtype
            that the mean is taken in (float64 for float64, float32 for all others).

    Returns:
        y, of x's shape and torch's result dtype.

    With r = 1 / sqrt(mean(x²) + eps) and g = w dy: dx = r (g - x̂ mean(g x̂)), dw = Σ dy x̂.
    x̂ and r are computed anew from x, which is all that is kept. Raises what torch raises; TypeError for complex values.
    """
    refuse_complex("rms_norm", input, weight)
    return RMSNormFunction.apply(input, normalized_shape, weight, eps)


class LayerNormFunction(Function):
    """dx = r (g - mean(g) - x̂ mean(g x̂)) with g = w dy: what dy has of the constant and of x̂ moves neither."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, normalized_shape, weight, bias, ctx.eps = inputs
        ctx.dims = tuple(range(-len(normalized_shape), 0))
        ctx.bias = None if bias is None else layout(bias)
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dw = db = None
        dy = widen(dy)
        if needs_input or needs_weight:
            x = widen(input)
            # Not torch.var_mean, which takes several times as long on the CPU.
            centred = x - x.mean(ctx.dims, keepdim=True)
            r = torch.rsqrt(centred.square().mean(ctx.dims, keepdim=True) + ctx.eps)
            x_hat = centred * r
        if needs_input:
            g = dy if weight is None else dy * widen(weight)
            projection = g.mean(ctx.dims, keepdim=True) + x_hat * (g * x_hat).mean(ctx.dims, keepdim=True)
            dx = (r * (g - projection)).to(input.dtype)
        if needs_weight:
            dw = fit(dy * x_hat, layout(weight))
        if needs_bias:
            db = fit(dy, ctx.bias)
        return dx, None, dw, db, None


class RMSNormFunction(Function):
    """dx = r (g - x̂ mean(g x̂)) with g = w dy: what dy has of x̂ itself does not move it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
        return F.rms_norm(input, normalized_shape, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, normalized_shape, weight, ctx.eps = inputs
        ctx.dims = tuple(range(-len(normalized_shape), 0))
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, _, needs_weight, _ = ctx.needs_input_grad
        dx = dw = None
        x, dy = widen(input), widen(dy)
        eps = torch.finfo(x.dtype).eps if ctx.eps is None else ctx.eps
        r = torch.rsqrt(x.square().mean(ctx.dims, keepdim=True) + eps)
        x_hat = x * r
        if needs_input:
            g = dy if weight is None else dy * widen(weight)
            dx = (r * (g - x_hat * (g * x_hat).mean(ctx.dims, keepdim=True))).to(input.dtype)
        if needs_weight:
            dw = fit(dy * x_hat, layout(weight))
        return dx, None, dw, None
