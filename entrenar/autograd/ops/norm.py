"""Normalization over the last dimensions, with statistics of at least float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex, widen
from entrenar.autograd.ops._kernel import has_kernel
from entrenar.autograd.ops._library import define
from entrenar.autograd.ops._override import overridable

FLOAT32_EPS = torch.finfo(torch.float32).eps


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

    The same as torch.nn.functional.rms_norm, but that 16-bit values are rounded once, at the end.

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


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm` over the last dimension in plain torch, computed in float32 or x's dtype if that is wider."""
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight).to(x.dtype)


def over_last(x: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether the kernels can normalize x: over its last dimension only, with parameters of that size."""
    shape = x.shape[-1:]
    return bool(shape) and tuple(normalized_shape) == shape and all(p is None or p.shape == shape for p in parameters)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_norm_fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _contiguous_like(x)


def _rms_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, dsum: Tensor | None, eps: float, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(x), x.new_empty(x.shape[-1] if needs_dw else 0)


def _layer_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, needs_dw: bool, needs_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-1]
    return _contiguous_like(x), x.new_empty(n if needs_dw else 0), x.new_empty(n if needs_db else 0)


# Over the last dimension. dsum, a gradient that flows into x beside dy, is added to dx.
define("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", _rms_norm_fake)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? dsum, float eps, bool needs_dw) "
    "-> (Tensor dx, Tensor dw)",
    _rms_norm_backward_fake,
)
define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, bool needs_dw, bool needs_db) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    _layer_norm_backward_fake,
)


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
        ctx.over_last = over_last(input, normalized_shape)
        ctx.bias = layout(bias)
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if ctx.over_last and has_kernel(dy, input, weight):
            dx, dw, db = torch.ops.entrenar.layer_norm_backward.default(
                dy, input, weight, ctx.eps, needs_weight, needs_bias
            )
            return dx, None, dw if needs_weight else None, db if needs_bias else None, None
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
        if over_last(input, normalized_shape, weight) and has_kernel(input, weight):
            return torch.ops.entrenar.rms_norm.default(input, weight, FLOAT32_EPS if eps is None else eps)
        return F.rms_norm(input, normalized_shape, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, normalized_shape, weight, ctx.eps = inputs
        ctx.dims = tuple(range(-len(normalized_shape), 0))
        ctx.over_last = over_last(input, normalized_shape)
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, _, needs_weight, _ = ctx.needs_input_grad
        if ctx.over_last and has_kernel(dy, input, weight):
            eps = FLOAT32_EPS if ctx.eps is None else ctx.eps
            dx, dw = torch.ops.entrenar.rms_norm_backward.default(dy, input, weight, None, eps, needs_weight)
            return dx, None, dw if needs_weight else None, None
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
