"""Several `int4_lora_linear` at the same x: queries, keys and values; gate and up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._function import Function, below_autograd, once_differentiable, refuse_derivative_of_backward
from entrenar.autograd.ops._library import batch_by_loop, define
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.ops.int4_linear import check_linear
from entrenar.autograd.ops.int4_lora_linear import check_lora, int4_lora_linear_reference

MOST_LAYERS = 8


@overridable
def int4_lora_linears(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: float,
    *,
    block: int = 64,
    int8: bool = False,
) -> list[Tensor]:
    """The results of `int4_lora_linear` at one x, for lists of up to 8 weights that share scaling, block and int8.

    On the CPU the same bits as one call each; a GPU may take the sums in another order. x is read once for all x Aᵀ,
    and its gradient is one sum: dx = Σ dy_i W_i + du_i A_i, du_i = scaling dy_i B_i, dA_i = du_iᵀ x, dB_i = dy_iᵀ u_i.
    The CPU rounds that sum once, and so does Hopper's kernel; else CUDA, in bfloat16, after each dy_i W_i. Arguments,
    dtypes and errors are those of `int4_lora_linear`, with a list for each that differs between the weights. There is
    no second derivative: asking for one raises.
    """
    x = autocast(x)
    if not 0 < len(codes) <= MOST_LAYERS or any(len(each) != len(codes) for each in (scales, bias, lora_A, lora_B)):
        raise ValueError(
            f"codes, scales, bias, lora_A and lora_B must be lists of one length up to {MOST_LAYERS}, not of "
            f"{len(codes)}, {len(scales)}, {len(bias)}, {len(lora_A)} and {len(lora_B)}"
        )
    for c, s, b, A, B in zip(codes, scales, bias, lora_A, lora_B, strict=True):
        check_linear(x, c, s, b, block)
        check_lora(x, c, A, B)
    lists = [*codes], [*scales], [A.float() for A in lora_A], [B.float() for B in lora_B]
    joined = _joined(bias, codes)
    if torch.compiler.is_compiling():
        codes, scales, lora_A, lora_B = lists
        ys, _ = torch.ops.entrenar.int4_lora_linears(
            x, codes, scales, joined, lora_A, lora_B, float(scaling), block, int8
        )
        return ys
    results = Int4LoRALinearsFunction.apply(x, joined, float(scaling), block, int8, *itertools.chain(*lists))
    return [*results[: len(codes)]]


def _joined(bias: Sequence[Tensor | None], codes: Sequence[Tensor]) -> Tensor | None:
    """The biases one after another, zeros for those that are None; None if all are."""
    if all(b is None for b in bias):
        return None
    return torch.cat(
        [c.new_zeros(len(c), dtype=torch.float32) if b is None else b.float() for b, c in zip(bias, codes, strict=True)]
    )


def int4_lora_linears_reference(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: float,
    block: int,
) -> list[Tensor]:
    """`int4_lora_linears` in plain torch, with the biases one after another."""
    biases = [None] * len(codes) if bias is None else bias.split([len(c) for c in codes])
    layers = zip(codes, scales, biases, lora_A, lora_B, strict=True)
    return [int4_lora_linear_reference(x, *layer, scaling, block) for layer in layers]


def _int4_lora_linears_fake(
    x: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    bias: Tensor | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: float,
    block: int,
    int8: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    ys = [x.new_empty(*x.shape[:-1], c.shape[0]) for c in codes]
    return ys, [x.new_empty(*x.shape[:-1], A.shape[0]) for A in lora_A]


def _int4_lora_linears_backward_fake(
    dy: list[Tensor],
    x: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    u: list[Tensor],
    scaling: float,
    block: int,
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)
    return dx, [A.new_empty(A.shape) for A in lora_A], [B.new_empty(B.shape) for B in lora_B]


define(
    "int4_lora_linears(Tensor x, Tensor[] codes, Tensor[] scales, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, "
    "float scaling, int block, bool int8) -> (Tensor[] y, Tensor[] u)",
    _int4_lora_linears_fake,
)
define(
    "int4_lora_linears_backward(Tensor[] dy, Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] lora_A, "
    "Tensor[] lora_B, Tensor[] u, float scaling, int block, bool needs_dx) -> (Tensor dx, Tensor[] dA, Tensor[] dB)",
    _int4_lora_linears_backward_fake,
)


class Int4LoRALinearsFunction(Function):
    """y_i = x W_iᵀ + b_i + u_i B_iᵀ with u_i = scaling x A_iᵀ, which are kept for dB_i.

    A Function takes no lists: its last arguments are all codes, all scales, all A, all B, its results all y, all u.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, scaling: float, block: int, int8: bool, *layers: Tensor
    ) -> tuple[Tensor, ...]:
        codes, scales, lora_A, lora_B = _parts(layers, 4)
        op = torch.ops.entrenar.int4_lora_linears.default
        ys, us = below_autograd(op, x, codes, scales, bias, lora_A, lora_B, scaling, block, int8)
        return *ys, *us

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, _, ctx.scaling, ctx.block, _, *layers = inputs
        _, us = _parts(output, 2)
        _keep(ctx, x, layers, us)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dys, _ = _parts(gradients, 2)
        dx, dA, dB = _gradients(ctx, dys)
        return dx, None, None, None, None, *[None] * (2 * len(dys)), *dA, *dB


def _parts(values: Sequence[Any], count: int) -> list[list[Any]]:
    """The values in `count` lists of one length."""
    size = len(values) // count
    return [[*values[i * size : (i + 1) * size]] for i in range(count)]


def _keep(ctx: Any, x: Tensor, layers: Sequence[Tensor], us: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(*us)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *layers, *us)


def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    x, *saved = ctx.saved_tensors
    needs_dx, scaling, block = ctx.needs_input_grad[0], ctx.scaling, ctx.block

    def gradients(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        dys, codes, scales, lora_A, lora_B, us = _parts(tensors, 6)
        op = torch.ops.entrenar.int4_lora_linears_backward.default
        dx, dA, dB = below_autograd(op, dys, x, codes, scales, lora_A, lora_B, us, scaling, block, needs_dx)
        return dx, *dA, *dB

    codes = saved[: len(dys)]
    whole = [x.new_zeros(*x.shape[:-1], len(c)) if dy is None else dy for dy, c in zip(dys, codes, strict=True)]
    dx, *rest = once_differentiable("int4_lora_linears", gradients, x, *whole, *saved)
    dA, dB = _parts(rest, 2)
    return dx if needs_dx else None, dA, dB


def _setup_op_context(ctx: Any, inputs: tuple, output: tuple[list[Tensor], list[Tensor]]) -> None:
    x, codes, scales, _, lora_A, lora_B, ctx.scaling, ctx.block, _ = inputs
    _keep(ctx, x, [*codes, *scales, *lora_A, *lora_B], output[1])


def _op_backward(ctx: Any, dys: list[Tensor | None], dus: list[None]) -> tuple[Any, ...]:
    dx, dA, dB = _gradients(ctx, dys)
    frozen = [None] * len(dys)
    return dx, frozen, frozen, None, dA, dB, None, None, None


torch.library.register_autograd(
    "entrenar::int4_lora_linears",
    _op_backward,
    setup_context=_setup_op_context,
)
refuse_derivative_of_backward("int4_lora_linears")
batch_by_loop(torch.ops.entrenar.int4_lora_linears.default)
batch_by_loop(torch.ops.entrenar.int4_lora_linears_backward.default)
