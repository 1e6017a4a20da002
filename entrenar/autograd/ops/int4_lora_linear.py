"""A linear map with an int4 weight and a LoRA adapter beside it: y = x Wᵀ + b + scaling (x Aᵀ) Bᵀ.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._function import Function, below_autograd, once_differentiable, refuse_derivative_of_backward
from entrenar.autograd.ops._library import batch_by_loop, define
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.ops.int4_linear import check_linear, int4_linear_reference, wide_bias


@overridable
def int4_lora_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    block: int = 64,
    lora_x: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """Apply y = x Wᵀ + b + scaling (x Aᵀ) Bᵀ in one pass, with W in int4 (`int4_quantize`).

    Args:
        x: [..., K], float32 or bfloat16. Under autocast it is cast as torch.nn.functional.linear casts it.
        codes, scales: the packed W [N, K]; frozen, they get no gradient.
        bias: [N] or None; frozen.
        lora_A: [r, K]; lora_B: [N, r]; floating point, used in x's dtype, with float32 sums.
        scaling: alpha / rank.
        block: elements that share a scale, 64 or 32.
        lora_x: what A sees instead of x, of x's shape: x after dropout.
        int8: round x to int8 for its product with W, as `int4_linear` does.

    Returns:
        [..., N] of x's dtype.

    Differentiable in x, lora_A, lora_B and lora_x. With u = scaling x Aᵀ and du = scaling dy B:
    dx = dy W + du A, dA = duᵀ x, dB = dyᵀ u. Where lora_x is given it stands for x in dA, and du A is its gradient.
    There is no second derivative: asking for one raises.
    Raises ValueError where sizes or dtypes do not match.
    """
    x = autocast(x)
    check_linear(x, codes, scales, bias, block)
    check_lora(x, codes, lora_A, lora_B)
    if lora_x is not None:
        lora_x = autocast(lora_x)
        if lora_x.shape != x.shape or lora_x.dtype != x.dtype:
            raise ValueError(f"lora_x is {tuple(lora_x.shape)} {lora_x.dtype}, and x {tuple(x.shape)} {x.dtype}")
    op = torch.ops.entrenar.int4_lora_linear if torch.compiler.is_compiling() else Int4LoRALinearFunction.apply
    y, _ = op(x, codes, scales, wide_bias(bias), lora_A.float(), lora_B.float(), float(scaling), block, lora_x, int8)
    return y


def check_lora(x: Tensor, codes: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise ValueError where an adapter does not fit beside the weight."""
    rank = lora_A.shape[0]
    if lora_A.shape != (rank, x.shape[-1]) or lora_B.shape != (codes.shape[0], rank):
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} are not [r, K] and [N, r] "
            f"for a weight with N = {codes.shape[0]}, K = {x.shape[-1]}"
        )


def int4_lora_linear_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    block: int,
    lora_x: Tensor | None = None,
) -> Tensor:
    """`int4_lora_linear` in plain torch, computed in float32 or x's dtype if that is wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = scaling * ((x if lora_x is None else lora_x).to(wide) @ lora_A.to(wide).T)
    return (int4_linear_reference(x.to(wide), codes, scales, bias, block) + u @ lora_B.to(wide).T).to(x.dtype)


def _int4_lora_linear_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    block: int,
    lora_x: Tensor | None = None,
    int8: bool = False,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], codes.shape[0]), x.new_empty(*x.shape[:-1], lora_A.shape[0])


def _int4_lora_linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    u: Tensor,
    scaling: float,
    block: int,
    needs_dx: bool,
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like_x(needed: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)

    return like_x(needs_dx), like_x(apart), lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


define(
    "int4_lora_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "float scaling, int block, Tensor? lora_x=None, bool int8=False) -> (Tensor y, Tensor u)",
    _int4_lora_linear_fake,
)
define(
    "int4_lora_linear_backward(Tensor dy, Tensor x, Tensor codes, Tensor scales, Tensor lora_A, Tensor lora_B, "
    "Tensor u, float scaling, int block, bool needs_dx, bool apart) "
    "-> (Tensor dx, Tensor d_lora_x, Tensor dA, Tensor dB)",
    _int4_lora_linear_backward_fake,
)


class Int4LoRALinearFunction(Function):
    """y = x Wᵀ + b + u Bᵀ with u = scaling x Aᵀ, which is kept for dB."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        block: int,
        lora_x: Tensor | None,
        int8: bool,
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.entrenar.int4_lora_linear.default
        return below_autograd(op, x, codes, scales, bias, lora_A, lora_B, scaling, block, lora_x, int8)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, codes, scales, _, lora_A, lora_B, ctx.scaling, ctx.block, lora_x, _ = inputs
        _, u = output
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)
        # With a lora_x of its own, nothing in the backward needs x itself.
        ctx.save_for_backward(x if lora_x is None else lora_x, codes, scales, lora_A, lora_B, u)
        ctx.apart = lora_x is not None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, du: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needs_dx, scaling, block, apart = ctx.needs_input_grad[0], ctx.scaling, ctx.block, ctx.apart

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            op = torch.ops.entrenar.int4_lora_linear_backward.default
            return below_autograd(op, *tensors, scaling, block, needs_dx, apart)

        dx, d_lora_x, dA, dB = once_differentiable("int4_lora_linear", gradients, dy, *ctx.saved_tensors)
        return dx if needs_dx else None, None, None, None, dA, dB, None, None, d_lora_x if apart else None, None


torch.library.register_autograd(
    "entrenar::int4_lora_linear",
    Int4LoRALinearFunction.backward,
    setup_context=Int4LoRALinearFunction.setup_context,
)
refuse_derivative_of_backward("int4_lora_linear")
batch_by_loop(torch.ops.entrenar.int4_lora_linear.default)
batch_by_loop(torch.ops.entrenar.int4_lora_linear_backward.default)
