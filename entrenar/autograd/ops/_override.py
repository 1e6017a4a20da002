"""How torch's override protocol sees the ops: tapes and tensor subclasses intercept them like torch's own functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_map_only

from entrenar.autograd.ops._function import run_as_it_is

TRACED = torch.__version__ >= "2.13"
"""Whether torch's compiler looks into the operations.

Older ones return all that a Function computes on its way, and lose the gradient of an output that is among it.
"""

Op = TypeVar("Op", bound=Callable[..., Any])


def overridable(op: Op) -> Op:
    """Offer each call of `op` to the modes and tensor subclasses that override torch functions, before it runs."""
    if not TRACED:
        torch.compiler.allow_in_graph(op)
        run_as_it_is(op, all_within=True)  # where it cannot be in a graph

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            args, kwargs = _distinct((args, kwargs))
        operands = (*args, *kwargs.values())
        if has_torch_function(operands):
            return handle_torch_function(call, operands, *args, **kwargs)
        return op(*args, **kwargs)

    return call  # type: ignore[return-value]


def _distinct(arguments: Any) -> Any:
    """A view in place of each tensor that came before: torch's compiler refuses a Function that takes one twice."""
    before: list[torch.Tensor] = []

    def fresh(x: torch.Tensor) -> torch.Tensor:
        again = any(x is y for y in before)
        before.append(x)
        return x.view_as(x) if again else x

    return tree_map_only(torch.Tensor, fresh, arguments)
