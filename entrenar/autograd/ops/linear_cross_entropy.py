"""The cross entropy of a linear map's result, which is never whole: y = CE(x Wᵀ + b, target).

Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._cross_entropy import losses_of, reduce, refuse_no_class, turn_into_gradient
from entrenar.autograd.ops._function import Function, no_second_derivative
from entrenar.autograd.ops._library import define, library
from entrenar.autograd.ops._linear_cross_entropy_rows import has_kernel, linear_cross_entropy_rows
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.ops._product import add_linear_dw, linear_dx_into, linear_into

# Of logits at one time. Each product packs the weight anew, so that chunks much smaller are slower.
CHUNK_BYTES = 64 * 2**20


@overridable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """The cross entropy of the logits input Wᵀ + b, of which at most 64 MiB (or one row) exist at a time.

    Args:
        input: [N, K], floating point. Under autocast it and W are cast as torch.nn.functional.linear casts them.
        linear_weight: W, [C, K], of input's dtype.
        target: classes, int64 [N].
        linear_bias: b, [C] of input's dtype, or None.
        reduction: "mean", over the targets that are not ignored, or "sum".
        ignore_index: a target that neither counts nor gets a gradient.

    Returns:
        A scalar, in float32 or input's dtype if that is wider.

    The gradients are formed in the forward, if anything requires one, and scaled in the backward. With dy divided by
    the number of targets for a mean, and G = softmax(logits) - onehot(target) in input's dtype: dinput = dy G W, dW =
    dy Gᵀ input, db = dy Σ G, the last two summed over the chunks in float32. On a CPU, without a bias and for a W that
    wants no gradient, 128 rows or more, of up to 2 KiB, go through a kernel that has no more than a tile of logits, and
    does not round them. Other products of a dtype that torch multiplies slowly on this CPU (bfloat16 without AVX-512
    BF16) are float32's, of W converted in tiles of at most 8 MiB, and logits, G and dinput are rounded as they are
    elsewhere. There is no second derivative: asking for a gradient with create_graph=True raises RuntimeError. Raises
    IndexError naming row and value for a target that is no class (on CUDA, as in torch, a device-side assertion fails),
    and ValueError where shapes or dtypes do not match.
    """
    x, weight = autocast(input), autocast(linear_weight)
    bias = None if linear_bias is None else autocast(linear_bias)
    check_rows(x, target, reduction)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(f"linear_weight must be {x.dtype} [C, {x.shape[1]}], not {weight.dtype} {[*weight.shape]}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"linear_bias must be {x.dtype} [{weight.shape[0]}], not {bias.dtype} {[*bias.shape]}")
    wanted = [torch.is_grad_enabled() and y is not None and y.requires_grad for y in (x, weight, bias)]
    return torch.ops.entrenar.linear_cross_entropy(x, weight, target, bias, reduction, ignore_index, *wanted)[0]


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """`linear_cross_entropy` in plain torch, computed in float32 or input's dtype if that is wider."""
    wide = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(wide)
    logits = torch.nn.functional.linear(input.to(wide), linear_weight.to(wide), bias)
    return torch.nn.functional.cross_entropy(logits, target, reduction=reduction, ignore_index=ignore_index)


def check_rows(input: Tensor, target: Tensor, reduction: str) -> None:
    """Raise ValueError unless these are rows with one class each, and a reduction to a scalar."""
    if input.dim() != 2 or not input.is_floating_point():
        raise ValueError(f"input must be floating point [N, K], not {input.dtype} {[*input.shape]}")
    if target.shape != input.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{input.shape[0]}], not {target.dtype} {[*target.shape]}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}')


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """The rows in as few parts as CHUNK_BYTES allows, of equal size but for the last."""
    at_most = max(1, CHUNK_BYTES // max(1, row_bytes))
    parts = max(1, math.ceil(rows / at_most))
    size = max(1, math.ceil(rows / parts))
    return (slice(start, start + size) for start in range(0, rows, size))


def gradient_factor(target: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor | float:
    """What the gradient of the sum of the losses is multiplied by to be that of the reduced loss.

    That is done after the products, for float16 could not hold the logits' gradients divided by their number.
    """
    if reduction == "sum":
        return 1.0
    return (target != ignore_index).sum(dtype=dtype).clamp(min=1).reciprocal()


def refuse_second_derivative(op: str) -> None:
    """Raise RuntimeError in a backward whose result is to be differentiated again."""
    if torch.is_grad_enabled():
        raise no_second_derivative(op)


def _linear_cross_entropy_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    reduction: str,
    ignore_index: int,
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(input.dtype, torch.float32)
    return (
        input.new_empty((), dtype=wide),
        input.new_empty(input.shape if wants_input else 0),
        input.new_empty(linear_weight.shape if wants_weight else 0),
        input.new_empty(linear_weight.shape[:1] if wants_bias else 0),
    )


def _by_chunks(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses, and the gradients of their sum in input, weight and bias where wanted, from chunks of logits."""
    wants_input, wants_weight, wants_bias = wanted
    classes, wide = len(weight), torch.promote_types(input.dtype, torch.float32)
    losses = input.new_empty(len(input), dtype=wide)
    dx = input.new_empty(input.shape if wants_input else 0)
    dw = input.new_zeros(weight.shape if wants_weight else 0, dtype=wide)
    db = input.new_zeros(classes if wants_bias else 0, dtype=wide)
    parts = list(chunks(len(input), classes * input.element_size()))
    # One memory for the logits of every chunk: mapping and faulting it in anew would take a tenth of the time.
    workspace = input.new_empty(len(input[parts[0]]) if parts else 0, classes)
    for part in parts:
        x, t = input[part], target[part]
        logits = workspace[: len(x)]
        linear_into(logits, x, weight, bias)
        if not any(wanted):
            losses[part] = losses_of(logits, t, ignore_index)
            continue
        losses[part] = turn_into_gradient(logits, t, ignore_index)
        if wants_input:
            linear_dx_into(dx[part], logits, weight)
        if wants_weight:
            add_linear_dw(dw, logits, x)
        if wants_bias:
            db += logits.sum(0, dtype=wide)
    return losses, dx, dw, db


class LinearCrossEntropyFunction(Function):
    """y = CE(x Wᵀ + b), and with it dy/dx, dy/dW and dy/db where they are wanted, else nothing in their place."""

    @staticmethod
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        reduction: str,
        ignore_index: int,
        wants_input: bool,
        wants_weight: bool,
        wants_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        refuse_no_class(target, len(linear_weight), ignore_index)
        frozen = linear_bias is None and not (wants_weight or wants_bias)
        if frozen and has_kernel(input, linear_weight):
            losses, dx = linear_cross_entropy_rows(input, linear_weight, target, ignore_index, wants_input)
            dw, db = input.new_empty(0), input.new_empty(0)
        else:
            wanted = wants_input, wants_weight, wants_bias
            losses, dx, dw, db = _by_chunks(input, linear_weight, target, linear_bias, ignore_index, wanted)
        factor = gradient_factor(target, ignore_index, reduction, losses.dtype)
        dx, dw, db = (gradient.mul_(factor).to(input.dtype) for gradient in (dx, dw, db))
        return reduce(losses, target, ignore_index, reduction), dx, dw, db

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad
        dx, dw, db = (
            gradient * dy if needs[i] else None for i, gradient in zip((0, 1, 3), ctx.saved_tensors, strict=True)
        )
        return dx, dw, None, db, None, None, None, None, None


define(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, str reduction, "
    "int ignore_index, bool wants_input, bool wants_weight, bool wants_bias) "
    "-> (Tensor y, Tensor dx, Tensor dw, Tensor db)",
    _linear_cross_entropy_fake,
)
library.impl("linear_cross_entropy", LinearCrossEntropyFunction.forward, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "entrenar::linear_cross_entropy",
    LinearCrossEntropyFunction.backward,
    setup_context=LinearCrossEntropyFunction.setup_context,
)
