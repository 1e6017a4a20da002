"""Rotary position embedding, in the layout of halves that Llama's checkpoints use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex
from entrenar.autograd.ops._kernel import has_kernel
from entrenar.autograd.ops._library import define
from entrenar.autograd.ops._override import overridable


@overridable
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of elements of x: y = x cos + R x sin, with R (a, b) = (-b, a) for the halves a and b.

    Args:
        x: [..., T, d] with even d, floating point.
        cos, sin: broadcastable to x with it, their last dimension d; usually [T, d] or [batch, 1, T, d], where the
            second half repeats the first.

    Returns:
        The broadcast shape and the promoted dtype of the three. 16-bit values are computed in float32 and rounded once
        where a kernel takes them (cos and sin broadcast to x, in its dtype), else each product and sum is rounded.

    dx = dy cos - R (dy sin), because Rᵀ = -R; dcos = dy x, dsin = dy R x.
    Raises ValueError for an odd d, TypeError for complex values.

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864; halves instead of neighbours as in transformers'
    `apply_rotary_pos_emb`, to which it is equal.
    """
    refuse_complex("rotary_embedding", x, cos, sin)
    if x.dim() == 0 or x.shape[-1] % 2 or not x.shape[-1] == cos.shape[-1] == sin.shape[-1]:
        raise ValueError(
            "the last dimension of x, cos and sin must be the same even number, not that of "
            f"{tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    return RotaryEmbeddingFunction.apply(x, cos, sin)


def rotary_embedding_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary_embedding` in plain torch."""
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (t.chunk(2, dim=-1) for t in (x, cos, sin))
    return torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b], dim=-1)


def _rotary_embedding_fake(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    y = torch.empty_like(x if x.stride(-1) == 1 else x.contiguous())
    return y if y.stride(-1) == 1 else y.contiguous()  # of elements that overlap it has other strides


# With `transposed` the map from dy to dx. The result lies in memory as x does, if x's rows are contiguous.
define("rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor", _rotary_embedding_fake)


class RotaryEmbeddingFunction(Function):
    """y = x cos + R x sin; dx = dy cos - R (dy sin). It is linear in x, which is kept for dcos and dsin only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if _has_rotary_kernel(x, cos, sin):
            return torch.ops.entrenar.rotary_embedding.default(x, cos, sin, False)
        return x * cos + _turn(x) * sin

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, cos, sin = inputs
        ctx.x = layout(x)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin = ctx.saved_tensors
        dx = dcos = dsin = None
        if ctx.needs_input_grad[0]:
            if dy.shape == ctx.x[0] and _has_rotary_kernel(dy, cos, sin):
                dx = torch.ops.entrenar.rotary_embedding.default(dy, cos, sin, True)
            else:
                dx = fit(dy * cos - _turn(dy * sin), ctx.x)
        if ctx.needs_input_grad[1]:
            dcos = fit(dy * x, layout(cos))
        if ctx.needs_input_grad[2]:
            dsin = fit(dy * _turn(x), layout(sin))
        return dx, dcos, dsin


def _has_rotary_kernel(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether a kernel takes these: cos and sin broadcast to x, and not beyond."""
    return x.dim() <= 4 and has_kernel(x, cos, sin) and all(_broadcasts_to(t.shape, x.shape) for t in (cos, sin))


def _broadcasts_to(shape: torch.Size, to: torch.Size) -> bool:
    """What torch.broadcast_shapes tells, at a fiftieth of the time."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _turn(x: Tensor) -> Tensor:
    """R x: a quarter turn of every pair, counterclockwise."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
