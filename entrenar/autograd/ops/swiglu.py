"""The gated activation of Llama's feed-forward layers."""

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


@overridable
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate by SiLU: y = silu(gate) up, with silu(g) = g σ(g).

    Args:
        gate, up: floating point, broadcastable to each other.

    Returns:
        The broadcast shape and the promoted dtype of the two; 16-bit values are computed in float32 and rounded once
        where a kernel takes them, else silu(gate) is rounded before it is multiplied.

    With σ = σ(gate): dgate = dy up σ (1 + gate (1 - σ)), dup = dy silu(gate). σ is computed anew: only gate and up are
    kept. Raises TypeError for complex values.

    Source: Shazeer, GLU variants improve Transformer, https://arxiv.org/abs/2002.05202.
    """
    refuse_complex("swiglu", gate, up)
    return SwiGLUFunction.apply(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    return gate * torch.sigmoid(gate) * up


def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _swiglu_backward_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_fake(gate, up), _swiglu_fake(gate, up)


define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu_fake)
define("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)", _swiglu_backward_fake)


class SwiGLUFunction(Function):
    """y = g σ(g) u; dg = dy u σ (1 + g (1 - σ)), du = dy g σ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        if gate.shape == up.shape and has_kernel(gate, up):
            return torch.ops.entrenar.swiglu.default(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if gate.shape == up.shape and has_kernel(dy, gate, up):
            return torch.ops.entrenar.swiglu_backward.default(dy, gate, up)
        dgate = dup = None
        g, dy = widen(gate), widen(dy)
        sigma = torch.sigmoid(g)
        silu = g * sigma
        if ctx.needs_input_grad[0]:
            # σ (1 + g (1 - σ)) = silu + σ (1 - silu), in one pass.
            slope = torch.lerp(silu, silu.new_ones(()), sigma)
            dgate = fit(dy * widen(up) * slope, layout(gate))
        if ctx.needs_input_grad[1]:
            dup = fit(dy * silu, layout(up))
        return dgate, dup
