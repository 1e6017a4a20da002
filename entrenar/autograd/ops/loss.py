"""Losses, with the signatures and errors of torch.nn.functional.

Losses of 16-bit tensors and their gradients are computed in float32 and rounded once; under torch.autocast the losses
stay float32. Complex tensors raise TypeError.

The cross entropy of a row of logits, float32 or bfloat16, has kernels where the targets are classes and
neither weighted nor smoothed. Its second derivative, like everything else, is computed by torch's functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops import _cross_entropy
from entrenar.autograd.ops._autocast import autocast_is_on
from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex, widen
from entrenar.autograd.ops._override import overridable


@overridable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy -Σ q_c w_c log softmax(input)_c of C classes.

    Args:
        input: logits, [C], [N, C] or [N, C, d1, ..., dK].
        target: integer classes of the input's shape without C, which make q 1 at the target and 0 elsewhere; or the
            probabilities q themselves, of the input's shape.
        weight: w, [C].
        size_average, reduce: None; torch's older names for `reduction`.
        ignore_index: a target class that neither counts nor gets a gradient.
        reduction: "none"; "sum"; or "mean", the sum divided by that of the targets' weights (for probabilities, by
            the number of targets).
        label_smoothing: ε, for which q becomes (1 - ε) q + ε / C.

    Returns:
        A scalar, or with "none" the losses, of the input's shape without C.

    Gradients, for each target and before reduction: dy (softmax(input) Σ q_c w_c - q w) in the input; and beside
    probabilities, -dy (1 - ε) w log softmax(input) in them and -dy q log softmax(input) in the weight. With classes
    the weight has none: RuntimeError if it requires one. A class that does not exist raises IndexError on the CPU; on
    CUDA, as in torch, a device-side assertion fails.
    """
    refuse_complex("cross_entropy", input, target, weight)
    if size_average is not None or reduce is not None:
        raise TypeError("cross_entropy takes no size_average and no reduce: use reduction")
    input = _autocast_to_float32(input)
    if target.shape == input.shape:
        return ProbabilityCrossEntropyFunction.apply(input, target, weight, ignore_index, reduction, label_smoothing)
    if target.dtype == torch.uint8:
        target = target.long()
    return CrossEntropyFunction.apply(input, target, weight, ignore_index, reduction, label_smoothing)


@overridable
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The squared error w (input - target)².

    Args:
        input, target: of one shape; others are broadcast, with a warning.
        size_average, reduce: None; torch's older names for `reduction`.
        reduction: "none"; "sum"; or "mean", the sum divided by that of the weights.
        weight: w, of the input's shape; None for ones.

    Gradients, before reduction: 2 dy w (input - target), its negative, and dy (input - target)².
    """
    refuse_complex("mse_loss", input, target, weight)
    if size_average is not None or reduce is not None:
        raise TypeError("mse_loss takes no size_average and no reduce: use reduction")
    return MSELossFunction.apply(_autocast_to_float32(input), target, reduction, weight)


mse = mse_loss


def _autocast_to_float32(x: Tensor) -> Tensor:
    return widen(x) if autocast_is_on(x) else x


def _class_dim(x: Tensor) -> int:
    return 1 if x.dim() > 1 else 0


def _has_kernel(input: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> bool:
    return (
        _cross_entropy.has_kernel(input)
        and 1 <= input.dim() <= 2
        and target.shape == input.shape[:-1]
        and target.dtype == torch.int64
        and weight is None
        and label_smoothing == 0
    )


def _along_classes(weight: Tensor, x: Tensor) -> Tensor:
    """The classes' weights, [C], as they broadcast against x."""
    return weight.reshape(-1, *(1 for _ in x.shape[2:]))


class CrossEntropyFunction(Function):
    """For each target t: y = -Σ v_c log softmax(x)_c with v = w (1 - ε) at t, plus w ε / C; dx = dy (softmax Σ v - v).

    The logits are kept rather than their softmax, which would be new memory of the same size.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        if reduction in _cross_entropy.REDUCTIONS and _has_kernel(input, target, weight, label_smoothing):
            rows = input.reshape(-1, input.shape[-1])
            losses = _cross_entropy.losses_of(rows, target.reshape(-1), ignore_index).view(target.shape)
            return _cross_entropy.reduce(losses, target, ignore_index, reduction).to(input.dtype)
        loss = torch.nn.functional.cross_entropy(
            widen(input),
            widen(target),
            None if weight is None else widen(weight),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return loss.to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, target, weight, ctx.ignore_index, ctx.reduction, ctx.label_smoothing = inputs
        if ctx.needs_input_grad[2]:
            raise RuntimeError("cross_entropy has no gradient in the weight where targets are classes: detach it")
        ctx.save_for_backward(input, target, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight = ctx.saved_tensors
        valid = target != ctx.ignore_index
        if not torch.is_grad_enabled() and _has_kernel(input, target, weight, ctx.label_smoothing):
            if ctx.reduction == "mean":
                dy = dy / valid.sum(dtype=torch.float32)
            rows, dy = input.reshape(-1, input.shape[-1]), widen(dy).expand(target.shape).reshape(-1)
            dx = torch.ops.entrenar.cross_entropy_gradient(rows, target.reshape(-1), dy, ctx.ignore_index)
            return dx.view(input.shape), None, None, None, None, None

        index = target.where(valid, 0)
        weight = None if weight is None else widen(weight)
        at_target = (
            valid.to(torch.promote_types(input.dtype, torch.float32))
            if weight is None
            else weight[index].where(valid, 0)
        )
        if ctx.reduction == "mean":
            dy = dy / at_target.sum()
        dy = widen(dy).where(valid, 0)
        x, dim = widen(input), _class_dim(input)
        smoothing, classes = ctx.label_smoothing, x.shape[dim]
        at_target = (1 - smoothing) * at_target
        total = at_target
        if smoothing:
            everywhere = x.new_full((classes,), smoothing / classes) if weight is None else weight * smoothing / classes
            total = total + everywhere.sum()
        dx = x.softmax(dim) * (dy * total).unsqueeze(dim)
        dx.scatter_add_(dim, index.unsqueeze(dim), -(dy * at_target).unsqueeze(dim))
        if smoothing:
            dx.addcmul_(dy.unsqueeze(dim), _along_classes(everywhere, x), value=-1)
        return dx.to(input.dtype), None, None, None, None, None


class ProbabilityCrossEntropyFunction(Function):
    """y = -Σ w q log p with p = softmax(x), q = (1 - ε) target + ε / C.

    dx = dy (p Σ w q - w q), dtarget = -dy (1 - ε) w log p, dw = -Σ dy q log p.
    """

    generate_vmap_rule = True

    forward = staticmethod(CrossEntropyFunction.forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, target, weight, _, ctx.reduction, ctx.label_smoothing = inputs
        ctx.save_for_backward(input, target, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        x, dim = widen(input), _class_dim(input)
        classes = x.shape[dim]
        log_p = x.log_softmax(dim)
        q = (1 - ctx.label_smoothing) * widen(target) + ctx.label_smoothing / classes
        w = x.new_ones(()) if weight is None else _along_classes(widen(weight), x)
        dy = widen(dy)
        if ctx.reduction == "none":
            dy = dy.unsqueeze(dim)
        elif ctx.reduction == "mean":
            dy = dy / (x.numel() // classes)

        dx = dtarget = dw = None
        if needs[0]:
            wq = w * q
            dx = (dy * (log_p.exp() * wq.sum(dim, keepdim=True) - wq)).to(input.dtype)
        if needs[1]:
            dtarget = (-dy * (1 - ctx.label_smoothing) * w * log_p).to(target.dtype)
        if needs[2]:
            dw = (-dy * q * log_p).movedim(dim, 0).flatten(1).sum(1) if x.dim() > 1 else -dy * q * log_p
            dw = dw.to(weight.dtype)
        return dx, dtarget, dw, None, None, None


class MSELossFunction(Function):
    """y = w (x - t)²; dx = 2 dy w (x - t), dt = -dx, dw = dy (x - t)². Of their mean, y = Σ w (x - t)² / Σ w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        wide = None if weight is None else widen(weight)
        # torch's stub of the function lacks its weight.
        loss = torch.nn.functional.mse_loss(widen(input), widen(target), reduction=reduction, weight=wide)  # type: ignore[call-arg]
        dtype = torch.promote_types(input.dtype, target.dtype)
        return loss.to(dtype if weight is None else torch.promote_types(dtype, weight.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, target, ctx.reduction, weight = inputs
        ctx.input, ctx.target, ctx.weight = layout(input), layout(target), layout(weight)
        ctx.save_for_backward(input, target, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        x, t = widen(input), widen(target)
        difference = x - t.to(torch.promote_types(x.dtype, t.dtype))  # of booleans there is none
        w = None if weight is None else widen(weight)
        dy = widen(dy)
        mean = ctx.reduction == "mean"
        if mean:
            dy = dy / (difference.numel() if w is None else w.sum())
        dx = dt = dw = None
        if needs[0] or needs[1]:
            slope = 2 * dy * difference if w is None else 2 * dy * w * difference
            dx = fit(slope, ctx.input) if needs[0] else None
            dt = fit(-slope, ctx.target) if needs[1] else None
        if needs[3] and w is not None:
            square = difference * difference
            dw = fit(dy * (square - (w * square).sum() / w.sum() if mean else square), ctx.weight)
        return dx, dt, None, dw
