"""How torch's override protocol sees the ops: tapes and tensor subclasses intercept them like torch's own functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.overrides import handle_torch_function, has_torch_function

Op = TypeVar("Op", bound=Callable[..., Any])


def overridable(op: Op) -> Op:
    """Offer each call of `op` to the modes and tensor subclasses that override torch functions, before it runs."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        operands = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(operands):
            return handle_torch_function(call, operands, *args, **kwargs)
        return op(*args, **kwargs)

    return call  # type: ignore[return-value]
