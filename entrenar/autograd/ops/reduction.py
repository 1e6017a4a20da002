"""Sums and means over some or all dimensions, with torch's signatures, errors and type promotion.

16-bit values are added in float32, and their sum is rounded once. Complex values raise TypeError.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import refuse_complex
from entrenar.autograd.ops._override import overridable

Dims: TypeAlias = int | tuple[int, ...] | list[int] | None


@overridable
def sum(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over `dim`: a dimension, several, or all (None, or none named).

    Args:
        input: of any real dtype; integers are added as int64.
        keepdim: keep the summed dimensions, with size 1.
        dtype: convert `input` to this first; also the result's dtype.

    Gradient: dy, repeated along the summed dimensions.
    """
    refuse_complex("sum", input, dtype)
    return SumFunction.apply(input, _dims(dim), keepdim, dtype)


@overridable
def mean(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The mean over `dim`: a dimension, several, or all (None, or none named).

    Args:
        input: floating point, unless `dtype` is.
        keepdim: keep the averaged dimensions, with size 1.
        dtype: convert `input` to this first; also the result's dtype.

    Gradient: dy / n, repeated along the averaged dimensions, n being the number of elements of each mean.
    """
    refuse_complex("mean", input, dtype)
    return MeanFunction.apply(input, _dims(dim), keepdim, dtype)


def _dims(dim: Dims) -> tuple[int, ...]:
    """`dim` as torch's reductions take it, where no dimension means all of them."""
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _repeat(dy: Tensor, shape: torch.Size, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """`dy`, of a reduction over `dims`, expanded to the shape that was reduced."""
    if dims and not keepdim:
        for dim in sorted(dim % len(shape) for dim in dims if shape):
            dy = dy.unsqueeze(dim)
    return dy.expand(shape)


class SumFunction(Function):
    """y = Σ xᵢ; dxᵢ = dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype | None) -> Tensor:
        return torch.sum(input, dims, keepdim, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, ctx.dims, ctx.keepdim, _ = inputs
        ctx.shape, ctx.dtype = input.shape, input.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _repeat(dy.to(ctx.dtype), ctx.shape, ctx.dims, ctx.keepdim), None, None, None


class MeanFunction(Function):
    """y = Σ xᵢ / n; dxᵢ = dy / n."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype | None) -> Tensor:
        return torch.mean(input, dims, keepdim, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, ctx.dims, ctx.keepdim, _ = inputs
        ctx.shape, ctx.dtype = input.shape, input.dtype
        ctx.count = input.numel() // max(output.numel(), 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _repeat((dy / ctx.count).to(ctx.dtype), ctx.shape, ctx.dims, ctx.keepdim), None, None, None
