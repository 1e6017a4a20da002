"""The cross entropy of a module's result, which is never whole: y = CE(head(x), target)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from entrenar.autograd.ops._cross_entropy import losses_of, reduce, refuse_no_class, turn_into_gradient
from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops.linear_cross_entropy import (
    check_rows,
    chunks,
    gradient_factor,
    linear_cross_entropy,
    refuse_second_derivative,
)


def head_cross_entropy(
    head: nn.Module, input: Tensor, target: Tensor, classes: int, *, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """The cross entropy of the logits head(input), of which at most 64 MiB (or one row) exist at a time.

    That is, beside what the head itself allocates, and with logits of input's dtype.

    Args:
        head: maps [1, n, K] to logits [1, n, classes], each row by itself.
        input: [N, K], floating point.
        target: classes, int64 [N].
        classes: how many logits the head gives for a row.
        reduction: "mean", over the targets that are not ignored, or "sum".
        ignore_index: a target that neither counts nor gets a gradient.

    Returns:
        A scalar, in float32 or the logits' dtype if that is wider.

    A head that is just a torch.nn.Linear is left to `linear_cross_entropy`. Any other runs forward and backward on each
    chunk within this function's forward: the gradients in the input and in those of the head's parameters that require
    one, the latter summed over the chunks in float32, are then scaled in the backward. There is no second derivative:
    asking for a gradient with create_graph=True raises RuntimeError. Raises IndexError naming row and value for a
    target that is no class (on CUDA, as in torch, a device-side assertion fails), and ValueError where shapes do not
    match.
    """
    check_rows(input, target, reduction)
    if _is_just_linear(head):
        return linear_cross_entropy(
            input, head.weight, target, linear_bias=head.bias, reduction=reduction, ignore_index=ignore_index
        )
    refuse_no_class(target, classes, ignore_index)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (input.requires_grad or parameters):
        return HeadCrossEntropyFunction.apply(head, input, target, classes, reduction, ignore_index, *parameters)
    losses = [input.new_empty(0, dtype=torch.float32)]
    for part in chunks(len(input), classes * input.element_size()):
        losses.append(losses_of(_logits(head, input[part], classes), target[part], ignore_index))
    return reduce(torch.cat(losses), target, ignore_index, reduction)


def head_cross_entropy_reference(
    head: nn.Module, input: Tensor, target: Tensor, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """`head_cross_entropy` in plain torch."""
    logits = head(input.unsqueeze(0)).squeeze(0)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(wide), target, reduction=reduction, ignore_index=ignore_index)


def _is_just_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the head is nothing but torch's linear map: no subclass, no hook, no forward of its own."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return type(head) is nn.Linear and "forward" not in vars(head) and not any(hooks)


def _logits(head: Callable[[Tensor], Tensor], x: Tensor, classes: int) -> Tensor:
    logits = head(x.unsqueeze(0)).squeeze(0)
    if logits.shape != (len(x), classes):
        raise ValueError(f"the head gives logits {[1, *logits.shape]}, not {[1, len(x), classes]}")
    return logits


def _losses_and_gradients(
    head: nn.Module, x: Tensor, target: Tensor, classes: int, ignore_index: int, parameters: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The losses of some rows, and the gradients of their sum: in x, if it has one, and in the parameters."""
    leaves = [*([x] if x.requires_grad else []), *parameters.values()]
    needed = {x.untyped_storage().data_ptr()}

    def pack(saved: Tensor) -> Tensor:
        needed.add(saved.untyped_storage().data_ptr())
        return saved

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda saved: saved):
        logits = _logits(lambda x: functional_call(head, parameters, x), x, classes)
    values = logits.detach()
    # The gradient takes the place of the logits, unless the head's own backward will look at them.
    if values.untyped_storage().data_ptr() in needed or not values.is_contiguous():
        values = values.clone(memory_format=torch.contiguous_format)
    losses = turn_into_gradient(values, target, ignore_index)
    return losses, [*torch.autograd.grad(logits, leaves, values, materialize_grads=True)]


class HeadCrossEntropyFunction(Function):
    """y = CE(head(x), target), and with it dy/dx and dy/dp for each of the head's trainable parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        input: Tensor,
        target: Tensor,
        classes: int,
        reduction: str,
        ignore_index: int,
        *parameters: Tensor,
    ) -> Tensor:
        wants_input = ctx.needs_input_grad[1]
        dx = torch.empty_like(input) if wants_input else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        names = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
        # Without the parameters' hooks, which are for the gradient of the whole.
        own = {name: p.detach().requires_grad_() for name, p in zip(names, parameters, strict=True)}
        losses = [input.new_empty(0, dtype=torch.float32)]
        for part in chunks(len(input), classes * input.element_size()):
            x = input[part].detach().requires_grad_(wants_input)
            part_losses, gradients = _losses_and_gradients(head, x, target[part], classes, ignore_index, own)
            losses.append(part_losses)
            if dx is not None:
                dx[part] = gradients.pop(0)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
        y = reduce(torch.cat(losses), target, ignore_index, reduction)
        factor = gradient_factor(target, ignore_index, reduction, y.dtype)
        ctx.save_for_backward(
            None if dx is None else dx.mul_(factor),
            *(total.mul_(factor).to(p.dtype) for total, p in zip(sums, parameters, strict=True)),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("head_cross_entropy")
        dx, *rest = (None if gradient is None else gradient * dy for gradient in ctx.saved_tensors)
        return None, dx, None, None, None, None, *rest
