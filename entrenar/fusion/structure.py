"""What a module consists of, as far as a fused one must know all of it."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn

# Set by torch on every module, and by transformers on every module that it initialized.
_BOOKKEEPING = {*vars(nn.Module()), "_is_hf_initialized"}


class NotFusableError(Exception):
    """The module is not what the fused one computes; the message says why."""


def own_settings(module: nn.Module) -> dict[str, Any]:
    """The attributes that the module's class gave it, other than parameters, buffers and children."""
    return {name: value for name, value in vars(module).items() if name not in _BOOKKEEPING}


def require_children(module: nn.Module, required: set[str], optional: AbstractSet[str] = frozenset()) -> None:
    """Raise NotFusableError unless the module has these children, no others, and no tensors of its own."""
    children = set(module._modules)
    if not required <= children <= required | optional or module._parameters or module._buffers:
        raise NotFusableError(f"does not consist of {', '.join(sorted(required))}")
