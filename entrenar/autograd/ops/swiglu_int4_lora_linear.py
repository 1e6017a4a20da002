"""`int4_lora_linear` of what SwiGLU gives: the second half of Llama's feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._function import Function, below_autograd, once_differentiable, refuse_derivative_of_backward
from entrenar.autograd.ops._library import batch_by_loop, define
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.ops.int4_linear import check_linear, wide_bias
from entrenar.autograd.ops.int4_lora_linear import check_lora, int4_lora_linear_reference
from entrenar.autograd.ops.swiglu import swiglu_reference


@overridable
def swiglu_int4_lora_linear(
    gate: Tensor,
    up: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    block: int = 64,
    int8: bool = False,
) -> Tensor:
    """Apply y = x Wᵀ + b + scaling (x Aᵀ) Bᵀ to x = silu(gate) up, with W in int4 (`int4_quantize`).

    The same bits as `swiglu` and `int4_lora_linear` one after the other, but x is not kept for the backward: it is
    computed anew, in the pass that computes dgate and dup.

    Args:
        gate, up: [..., K] of one shape, float32 or bfloat16. Under autocast both are cast.
        codes, scales, bias, lora_A, lora_B, scaling, block, int8: as `int4_lora_linear` takes them.

    Returns:
        [..., N] of the dtype of gate and up.

    Differentiable in gate, up, lora_A and lora_B, by the formulas of the two operations. There is no second derivative:
    asking for one raises. Raises ValueError where sizes or dtypes do not match.
    """
    gate, up = autocast(gate), autocast(up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must have one shape and dtype"
        )
    check_linear(gate, codes, scales, bias, block)
    check_lora(gate, codes, lora_A, lora_B)
    compiling = torch.compiler.is_compiling()
    op = torch.ops.entrenar.swiglu_int4_lora_linear if compiling else SwiGLUInt4LoRALinearFunction.apply
    y, _ = op(gate, up, codes, scales, wide_bias(bias), lora_A.float(), lora_B.float(), float(scaling), block, int8)
    return y


def swiglu_int4_lora_linear_reference(
    gate: Tensor,
    up: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    block: int,
) -> Tensor:
    """`swiglu_int4_lora_linear` in plain torch, computed in float32 or gate's dtype if that is wider."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    x = swiglu_reference(gate.to(wide), up.to(wide)).to(gate.dtype)
    return int4_lora_linear_reference(x, codes, scales, bias, lora_A, lora_B, scaling, block)


def _swiglu_int4_lora_linear_fake(
    gate: Tensor,
    up: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    block: int,
    int8: bool = False,
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(*gate.shape[:-1], codes.shape[0]), gate.new_empty(*gate.shape[:-1], lora_A.shape[0])


def _swiglu_int4_lora_linear_backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    codes: Tensor,
    scales: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    u: Tensor,
    scaling: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    return dgate, dup, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


define(
    "swiglu_int4_lora_linear(Tensor gate, Tensor up, Tensor codes, Tensor scales, Tensor? bias, Tensor lora_A, "
    "Tensor lora_B, float scaling, int block, bool int8=False) -> (Tensor y, Tensor u)",
    _swiglu_int4_lora_linear_fake,
)
define(
    "swiglu_int4_lora_linear_backward(Tensor dy, Tensor gate, Tensor up, Tensor codes, Tensor scales, Tensor lora_A, "
    "Tensor lora_B, Tensor u, float scaling, int block) -> (Tensor dgate, Tensor dup, Tensor dA, Tensor dB)",
    _swiglu_int4_lora_linear_backward_fake,
)


class SwiGLUInt4LoRALinearFunction(Function):
    """y = x Wᵀ + b + u Bᵀ for x = silu(gate) up, which is not kept, with u = scaling x Aᵀ, which is, for dB."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gate: Tensor,
        up: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        block: int,
        int8: bool,
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.entrenar.swiglu_int4_lora_linear.default
        return below_autograd(op, gate, up, codes, scales, bias, lora_A, lora_B, scaling, block, int8)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        gate, up, codes, scales, _, lora_A, lora_B, ctx.scaling, ctx.block, _ = inputs
        _, u = output
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up, codes, scales, lora_A, lora_B, u)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, du: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        scaling, block = ctx.scaling, ctx.block

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            op = torch.ops.entrenar.swiglu_int4_lora_linear_backward.default
            return below_autograd(op, *tensors, scaling, block)

        dgate, dup, dA, dB = once_differentiable("swiglu_int4_lora_linear", gradients, dy, *ctx.saved_tensors)
        return dgate, dup, None, None, None, dA, dB, None, None, None


torch.library.register_autograd(
    "entrenar::swiglu_int4_lora_linear",
    SwiGLUInt4LoRALinearFunction.backward,
    setup_context=SwiGLUInt4LoRALinearFunction.setup_context,
)
refuse_derivative_of_backward("swiglu_int4_lora_linear")
batch_by_loop(torch.ops.entrenar.swiglu_int4_lora_linear.default)
batch_by_loop(torch.ops.entrenar.swiglu_int4_lora_linear_backward.default)
