"""The base of the operations' Functions."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class Function(torch.autograd.Function):
    """torch.autograd.Function with a short way to the engine, which takes all arguments of `forward` by position.

    Torch's own `apply` first binds the arguments to the signature of `forward`, at several times the cost of the call.
    Only torch.func needs it; there the signature is at least looked up once.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The results of `forward`, as nodes of the graph."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def is_transformed() -> bool:
    """Whether torch.compile or torch.func sees the ops that are called now: it differentiates what is registered."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def below_autograd(op: Any, *args: Any) -> Any:
    """The results of the op's kernel. A Function keeps the graph itself, and torch's part for that takes its time.

    Where a gradient is to be differentiated again, that part has its turn.
    """
    if torch.is_grad_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
