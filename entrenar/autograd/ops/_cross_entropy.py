"""Cross-entropy of rows of logits with one right class each, and its gradient: kernels where there are, else torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._kernel import DEVICES
from entrenar.autograd.ops._library import define, library

REDUCTIONS = ("none", "sum", "mean")


def has_kernel(logits: Tensor) -> bool:
    """Whether the kernels take these logits."""
    return logits.device.type in DEVICES and logits.dtype in (torch.float32, torch.bfloat16)


def losses_of(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The losses [n] of logits [n, C] and int64 targets [n], in float32 or wider; 0 for ignored targets.

    Raises IndexError, naming row and value, for a target that is no class; on CUDA a device-side assertion fails.
    """
    if not has_kernel(logits):
        return cross_entropy_losses_reference(logits, target, ignore_index)
    try:
        return torch.ops.entrenar.cross_entropy_losses(logits, target, ignore_index)
    except RuntimeError:
        refuse_no_class(target, logits.shape[-1], ignore_index)
        raise


def turn_into_gradient(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Overwrite contiguous logits [n, C] with the gradient of the sum of their losses; return the losses.

    Raises IndexError, naming row and value, for a target that is no class; the logits are then as they were. On CUDA
    a device-side assertion fails.
    """
    if has_kernel(logits):
        try:
            return torch.ops.entrenar.cross_entropy_gradient_(logits, target, ignore_index)
        except RuntimeError:
            refuse_no_class(target, logits.shape[-1], ignore_index)
            raise
    losses = cross_entropy_losses_reference(logits, target, ignore_index)
    logits.copy_(cross_entropy_gradient_reference(logits, target, torch.ones_like(losses), ignore_index))
    return losses


def reduce(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The losses as they are ("none"), their "sum", or their "mean" over the targets that are not ignored."""
    if reduction == "none":
        return losses
    return losses.sum() / (target != ignore_index).sum() if reduction == "mean" else losses.sum()


def refuse_no_class(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError, naming row and value, if a target is no class. Cannot be traced.

    Not on CUDA, where that would wait for the device: there the kernels, and torch's, assert it.
    """
    if target.is_cuda:
        return
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    for row in outside.nonzero().flatten()[:1].tolist():
        raise IndexError(f"Target {target[row].item()} is out of bounds: row {row} has {classes} classes") from None


def cross_entropy_losses_reference(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The losses [n] in plain torch, computed in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, target, ignore_index=ignore_index, reduction="none")


def cross_entropy_gradient_reference(logits: Tensor, target: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    """The gradient scale (softmax(logits) - onehot(target)) in plain torch, computed in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    valid = (target != ignore_index).unsqueeze(-1)
    gradient = logits.to(wide).softmax(-1)
    gradient.scatter_add_(-1, target.unsqueeze(-1).where(valid, 0), gradient.new_full(valid.shape, -1.0))
    return (gradient * scale.to(wide).unsqueeze(-1)).masked_fill_(~valid, 0).to(logits.dtype)


def _losses_fake(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _gradient_fake(logits: Tensor, target: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


define("cross_entropy_losses(Tensor logits, Tensor target, int ignore_index) -> Tensor", _losses_fake)
define("cross_entropy_gradient(Tensor logits, Tensor target, Tensor scale, int ignore_index) -> Tensor", _gradient_fake)
define("cross_entropy_gradient_(Tensor(a!) logits, Tensor target, int ignore_index) -> Tensor", _losses_fake)


def _over_rows(op: Any) -> Any:
    """The rule by which vmap batches an op that treats each row alone: a batch of rows is more rows."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        def flatten(x: Tensor, dim: int | None) -> Tensor:
            batch = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return batch.flatten(0, 1)

        *tensors, ignore_index = args
        rows = [flatten(x, dim) for x, dim in zip(tensors, in_dims[:-1], strict=True)]
        return op(*rows, ignore_index).unflatten(0, (info.batch_size, -1)), 0

    return rule


for _name in ("cross_entropy_losses", "cross_entropy_gradient"):
    torch.library.register_vmap(f"entrenar::{_name}", _over_rows(getattr(torch.ops.entrenar, _name)), lib=library)
