"""The residual sum and the norm after it, as a decoder block takes them: h = x + residual, y = rms_norm(h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex, widen
from entrenar.autograd.ops._kernel import has_kernel
from entrenar.autograd.ops._library import define
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.ops.norm import rms_norm_reference


@overridable
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add, and scale the sum's rows to their root mean square: h = x + residual, y = ĥ w, ĥ = h / sqrt(mean(h²) + eps).

    Args:
        x, residual: [..., n], floating point, of one shape and dtype.
        weight: w, [n], or None for 1.
        eps: is added to the mean square, inside the root.

    Returns:
        (h, y), both of x's shape and dtype. h is rounded to it before it is normalized.

    With r = 1 / sqrt(mean(h²) + eps) and g = w dy: dx = dresidual = dh + r (g - ĥ mean(g ĥ)), dw = Σ dy ĥ.
    ĥ and r are computed anew from h. Raises ValueError where shapes or dtypes do not match, TypeError for complex
    values.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    refuse_complex("add_rms_norm", x, residual, weight)
    if x.dim() == 0 or x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x and residual must have one shape [..., n] and dtype, not {tuple(x.shape)} of {x.dtype} "
            f"and {tuple(residual.shape)} of {residual.dtype}"
        )
    if weight is not None and (weight.shape != x.shape[-1:] or weight.dtype != x.dtype):
        raise ValueError(f"weight must be [{x.shape[-1]}] of {x.dtype}, not {list(weight.shape)} of {weight.dtype}")
    return AddRMSNormFunction.apply(x, residual, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    h = x + residual
    return h, rms_norm_reference(h, weight, eps)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(y), y


define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor h, Tensor y)",
    _add_rms_norm_fake,
)


class AddRMSNormFunction(Function):
    """h = x + residual, y = ĥ w; dx = dresidual = dh + r (g - ĥ mean(g ĥ)) with g = w dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        if has_kernel(x, residual, weight):
            return torch.ops.entrenar.add_rms_norm.default(x, residual, weight, eps)
        h = x + residual
        return h, F.rms_norm(h, h.shape[-1:], weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _, _, weight, ctx.eps = inputs
        h, _ = output
        ctx.save_for_backward(h, weight)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad
        if has_kernel(dy, dh, h, weight):
            dx, dw = torch.ops.entrenar.rms_norm_backward.default(dy, h, weight, dh, ctx.eps, needs_weight)
        else:
            wide, dy = widen(h), widen(dy)
            r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
            h_hat = wide * r
            g = dy if weight is None else dy * widen(weight)
            dx = (dh + r * (g - h_hat * (g * h_hat).mean(-1, keepdim=True))).to(h.dtype)
            dw = fit(dy * h_hat, layout(weight)) if needs_weight else None
        return dx if needs_x else None, dx if needs_residual else None, dw if needs_weight else None, None
