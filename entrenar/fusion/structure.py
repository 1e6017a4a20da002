"""What a module consists of, as far as a fused one must know all of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor, nn

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


def require_inputs(module: nn.Module, names: AbstractSet[str]) -> None:
    """Raise NotFusableError unless the module's forward takes inputs of these names, and no others."""
    if (found := _inputs(module)) != names:
        raise NotFusableError(f"takes the inputs {', '.join(sorted(found))}, not {', '.join(sorted(names))}")


def require_one_input(module: nn.Module) -> None:
    """Raise NotFusableError unless the module's forward takes one input, of any name."""
    if len(found := _inputs(module)) != 1:
        raise NotFusableError(f"takes {len(found)} inputs, not one")


def one_input(inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """The input of a call, by position or by whatever name. Raises TypeError unless it is one."""
    if len(inputs) + len(named) != 1:
        raise TypeError(f"takes one input, not {len(inputs)} by position and {[*named]} by name")
    return (*inputs, *named.values())[0]


def _inputs(module: nn.Module) -> set[str]:
    _, *inputs = inspect.signature(type(module).forward).parameters.values()
    return {x.name for x in inputs if x.kind is not x.VAR_KEYWORD}


def refuse_unknown(settings: Iterable[str], harmless: AbstractSet[str]) -> None:
    """Raise NotFusableError where there are other settings than the harmless ones."""
    if unknown := sorted(set(settings) - harmless):
        raise NotFusableError(f"has the settings {', '.join(unknown)}, whose effect is not known")
