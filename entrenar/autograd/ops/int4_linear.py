"""A linear map whose weight is int4: y = x Wᵀ + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._function import Function, below_autograd
from entrenar.autograd.ops._library import batch_by_loop, define
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.ops.int4 import check_packed, int4_dequantize_reference


@overridable
def int4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    block: int = 64,
    int8: bool = False,
) -> Tensor:
    """Apply y = x Wᵀ + b, with W in int4 (`int4_quantize`).

    Args:
        x: [..., K], float32 or bfloat16. Under autocast it is cast as torch.nn.functional.linear casts it.
        codes, scales: the packed W [N, K]; frozen, they get no gradient.
        bias: [N] or None; frozen.
        block: elements that share a scale, 64 or 32.
        int8: round x to int8, in blocks of its rows with a scale each (`int8_rows_reference`), and multiply in whole
            numbers: faster but with AMX, and off by about 0.6 % on Gaussian x. The gradient stays that of the exact
            product. Up to 16 rows, which are bound by memory, are multiplied as without it. The CPU's alone: on CUDA
            it raises RuntimeError.

    Returns:
        [..., N] of x's dtype. Products are accumulated in float32; for bfloat16 each decoded weight may first be
        rounded to bfloat16.

    Differentiable in x: dx = dy W, from the same packed codes. Raises ValueError where sizes or dtypes do not match.
    """
    x = autocast(x)
    check_linear(x, codes, scales, bias, block)
    op = torch.ops.entrenar.int4_linear if torch.compiler.is_compiling() else Int4LinearFunction.apply
    return op(x, codes, scales, wide_bias(bias), block, int8)


def int4_linear_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """`int4_linear` in plain torch, computed in float32 or x's dtype if that is wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = int4_dequantize_reference(codes, scales, x.shape[-1], block, x.dtype).to(wide)
    return torch.nn.functional.linear(x.to(wide), weight, bias if bias is None else bias.to(wide)).to(x.dtype)


def int8_rows_reference(x: Tensor, block: int) -> Tensor:
    """Round x [..., K] to int8: by blocks of a row, x = s q with s = absmax / 127 and q = round_half_even(x / s).

    In float32, with x / s computed as x (127 / absmax). An absmax below 1e-30 counts as zero.
    """
    wide = x.float()
    blocks = torch.nn.functional.pad(wide, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    absmax = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax >= 1e-30, 127 / absmax, 0)
    return ((blocks * inverse).round() * (absmax / 127)).flatten(-2)[..., : x.shape[-1]]


def check_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, block: int) -> None:
    """Raise ValueError unless x can be multiplied by the int4 matrix."""
    if x.dim() == 0 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"x must be [..., K] of float32 or bfloat16, not {tuple(x.shape)} of {x.dtype}; "
            "for a model in another dtype call its .bfloat16() or .float() before it is wrapped"
        )
    check_packed(codes, scales, x.shape[-1], block)
    if bias is not None and bias.shape != codes.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the weight {codes.shape[0]} rows")


def wide_bias(bias: Tensor | None) -> Tensor | None:
    """The frozen bias in float32, as the kernels add it."""
    return None if bias is None else bias.detach().float()


def _int4_linear_fake(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, block: int, int8: bool = False
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _int4_linear_dx_fake(dy: Tensor, codes: Tensor, scales: Tensor, in_features: int, block: int) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], in_features)


define(
    "int4_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int block, bool int8=False) -> Tensor",
    _int4_linear_fake,
)
define(
    "int4_linear_dx(Tensor dy, Tensor codes, Tensor scales, SymInt in_features, int block) -> Tensor",
    _int4_linear_dx_fake,
)


class Int4LinearFunction(Function):
    """y = x Wᵀ + b; dx = dy W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, block: int, int8: bool = False
    ) -> Tensor:
        return below_autograd(torch.ops.entrenar.int4_linear.default, x, codes, scales, bias, block, int8)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, codes, scales, _, ctx.block, _ = inputs
        ctx.in_features = x.shape[-1]
        ctx.save_for_backward(codes, scales)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        dx = Int4LinearDxFunction.apply(dy, codes, scales, ctx.in_features, ctx.block)
        return dx, None, None, None, None, None


class Int4LinearDxFunction(Function):
    """dx = dy W is linear in dy, so its own derivative is the forward map again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, codes: Tensor, scales: Tensor, in_features: int, block: int) -> Tensor:
        return below_autograd(torch.ops.entrenar.int4_linear_dx.default, dy, codes, scales, in_features, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, codes, scales, _, ctx.block = inputs
        ctx.save_for_backward(codes, scales)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        return Int4LinearFunction.apply(ddx, codes, scales, None, ctx.block, False), None, None, None, None


for _op, _function in (("int4_linear", Int4LinearFunction), ("int4_linear_dx", Int4LinearDxFunction)):
    torch.library.register_autograd(f"entrenar::{_op}", _function.backward, setup_context=_function.setup_context)
    batch_by_loop(getattr(torch.ops.entrenar, _op).default)
