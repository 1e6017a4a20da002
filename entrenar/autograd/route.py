"""Which of torch's functions are which of our operations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entrenar.autograd import ops

Function = Callable[..., Any]


def route(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function | None:
    """The operation of ours that does what `func` does with these arguments, taking them as they are; or None."""
    target = ROUTES.get(func)
    if target is None or not _takes(target, args, kwargs):
        return None
    if any(isinstance(x, complex) or (isinstance(x, Tensor) and x.is_complex()) for x in args):
        return None
    accepts = CONDITIONS.get(target)
    return target if accepts is None or accepts(*args, **kwargs) else None


def _takes(target: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `target` has these parameters: torch's functions take more, and some under several names."""
    try:
        _signature(target).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature = functools.cache(inspect.signature)


def _rsub(input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    return ops.sub(other, input, alpha=alpha)


def _rdiv(input: Tensor, other: Any) -> Tensor:
    return ops.div(other, input)


def _rpow(input: Tensor, other: Any) -> Tensor:
    return ops.pow(other, input)


def _rmatmul(input: Tensor, other: Tensor) -> Tensor:
    return ops.matmul(other, input)


def _softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    return ops.softmax(input, dim, dtype)


def _log_softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    return ops.log_softmax(input, dim, dtype)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return ops.relu(input)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return ops.silu(input)


def _has_dim(input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> bool:
    return dim is not None


def _not_in_place(input: Tensor, inplace: bool = False) -> bool:
    return not inplace


def _dropout_not_in_place(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return not inplace


def _plain_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> bool:
    return max_norm is None and not scale_grad_by_freq and not sparse


def _plain_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    *args: Any,
    **kwargs: Any,
) -> bool:
    return size_average is None and reduce is None


def _plain_mse(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, *args: Any, **kw: Any
) -> bool:
    return size_average is None and reduce is None and input.shape == target.shape and kw.get("weight") is None


def _of_torch(name: str) -> list[Function]:
    homes = (torch, Tensor, F)
    return [getattr(home, name) for home in homes if hasattr(home, name)]


SAME_SIGNATURE = [
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "exp",
    "log",
    "sqrt",
    "sigmoid",
    "tanh",
    "sum",
    "mean",
    "matmul",
    "linear",
    "cat",
    "gelu",
    "layer_norm",
    "rms_norm",
]

# Views (reshape, transpose, indexing, ...) stay torch's: a view made by a function of ours could not be written to.
ROUTES: dict[Function, Function] = {
    **{func: getattr(ops, name) for name in SAME_SIGNATURE for func in _of_torch(name)},
    **dict.fromkeys([*_of_torch("pow"), Tensor.__pow__], ops.pow),
    **dict.fromkeys([*_of_torch("true_divide"), *_of_torch("divide"), Tensor.__truediv__], ops.div),
    **dict.fromkeys([*_of_torch("multiply"), Tensor.__mul__, Tensor.__rmul__], ops.mul),
    **dict.fromkeys([*_of_torch("subtract"), Tensor.__sub__], ops.sub),
    **dict.fromkeys([Tensor.__add__, Tensor.__radd__], ops.add),
    **dict.fromkeys([*_of_torch("negative"), Tensor.__neg__], ops.neg),
    **dict.fromkeys([torch.rsub, Tensor.__rsub__], _rsub),
    **dict.fromkeys([Tensor.__rdiv__, Tensor.__rtruediv__], _rdiv),
    Tensor.__rpow__: _rpow,
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys([*_of_torch("mm"), *_of_torch("bmm"), Tensor.__matmul__], ops.matmul),
    **dict.fromkeys(_of_torch("relu"), _relu),
    F.silu: _silu,
    **dict.fromkeys([torch.softmax, Tensor.softmax], ops.softmax),
    **dict.fromkeys([torch.log_softmax, Tensor.log_softmax], ops.log_softmax),
    F.softmax: _softmax,
    F.log_softmax: _log_softmax,
    F.scaled_dot_product_attention: ops.scaled_dot_product_attention,
    F.embedding: ops.embedding,
    F.dropout: ops.dropout,
    F.cross_entropy: ops.cross_entropy,
    F.mse_loss: ops.mse_loss,
}

# Where torch's function can do more than the operation, when the operation stands for it.
CONDITIONS: dict[Function, Callable[..., bool]] = {
    _relu: _not_in_place,
    _silu: _not_in_place,
    ops.dropout: _dropout_not_in_place,
    _softmax: _has_dim,
    _log_softmax: _has_dim,
    ops.embedding: _plain_embedding,
    ops.cross_entropy: _plain_cross_entropy,
    ops.mse_loss: _plain_mse,
}
