"""What the gradients of many ops share: operands that are numbers, broadcasting, dtypes."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = int | float
Operand: TypeAlias = Tensor | Number
Layout: TypeAlias = tuple[torch.Size, torch.dtype] | None


def refuse_complex(op: str, *values: Any) -> None:
    """Raise TypeError if any of `values` is a complex tensor, number or dtype."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_complex():
                raise _complex_error(op, value.dtype)
        elif isinstance(value, complex):
            raise _complex_error(op, "a complex number")
        elif isinstance(value, torch.dtype) and value.is_complex:
            raise _complex_error(op, value)


def _complex_error(op: str, kind: torch.dtype | str) -> TypeError:
    return TypeError(f"{op} does not take complex values, and was given {kind}: use torch.{op}")


def layout(x: Operand | None) -> Layout:
    """The shape and dtype that the gradient of `x` must have; None for what is no tensor and has no gradient."""
    return (x.shape, x.dtype) if isinstance(x, Tensor) else None


def fit(gradient: Tensor, like: Layout) -> Tensor:
    """The gradient of an operand, given that of the operand as it was broadcast and converted."""
    assert like is not None, "a number has no gradient"
    shape, dtype = like
    if gradient.shape != shape:
        gradient = gradient.sum_to_size(shape)
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


def widen(x: Tensor) -> Tensor:
    """`x` in float32 if it is floating point of 16 bits, so that several steps are rounded once, at their end."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def save(ctx: Any, *values: Operand | None) -> None:
    """Keep tensors for the backward by `save_for_backward`, and the numbers among them beside."""
    ctx.numbers = {i: value for i, value in enumerate(values) if not isinstance(value, Tensor)}
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))


def saved(ctx: Any) -> tuple[Any, ...]:
    """What `save` kept, in its order."""
    return tuple(ctx.numbers.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors))
