"""Rearranging, joining and indexing tensors, with torch's signatures and errors.

Where torch's function returns a view of its input, so does ours; but where there is a gradient, torch's engine lets
neither the view nor what it was taken from be changed in place: it raises RuntimeError.

Complex tensors raise TypeError.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex, widen
from entrenar.autograd.ops._override import overridable

Item: TypeAlias = int | slice | None

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
MASKS = (torch.bool, torch.uint8)


@overridable
def reshape(input: Tensor, shape: Sequence[int]) -> Tensor:
    """The elements of input, in order, in another shape; a view where strides allow it. Gradient: dy reshaped back."""
    refuse_complex("reshape", input)
    return ReshapeFunction.apply(input, tuple(shape))


@overridable
def transpose(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """A view with two dimensions swapped. Gradient: dy with the same two swapped."""
    refuse_complex("transpose", input)
    return TransposeFunction.apply(input, dim0, dim1)


@overridable
def permute(input: Tensor, dims: Sequence[int]) -> Tensor:
    """A view whose dimension i is the input's `dims[i]`. Gradient: dy permuted back."""
    refuse_complex("permute", input)
    return PermuteFunction.apply(input, tuple(dims))


@overridable
def expand(input: Tensor, size: Sequence[int]) -> Tensor:
    """A view repeated along new leading dimensions and those of size 1; -1 keeps a size. Gradient: dy summed there."""
    refuse_complex("expand", input)
    return ExpandFunction.apply(input, tuple(size))


@overridable
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors joined along `dim`, in the dtype to which they promote. Gradients: the pieces of dy."""
    refuse_complex("cat", *tensors)
    return CatFunction.apply(dim, *tensors)


@overridable
def getitem(input: Tensor, index: Any) -> Tensor:
    """input[index], for every index that torch takes.

    Integers, slices, None and ... give a view, whose gradient is dy amid zeros. Tensors of integers or booleans, and
    lists, pick elements into a new tensor; its gradient adds dy up, in at least float32, at the elements picked.
    """
    refuse_complex("getitem", input)
    basic, picks = _split(input, index)
    picked = any(pick is not None for pick in picks)
    if not picked or any(item != slice(None) for item in basic):
        input = SliceFunction.apply(input, basic)
    return IndexFunction.apply(input, *picks) if picked else input


def _split(input: Tensor, index: Any) -> tuple[tuple[Item, ...], tuple[Tensor | None, ...]]:
    """`index` in two steps: a basic index, and for the dimensions of its result the tensors that index them, or None.

    As torch does it: integers select before tensors pick.
    """
    items = [_item(item, input) for item in (index if isinstance(index, tuple) else (index,))]
    unnamed = input.dim()
    for item in items:
        unnamed -= _dims(item)
    basic: list[Item] = []
    picks: list[Tensor | None] = []
    for item in items:
        if item is Ellipsis:
            basic += unnamed * [slice(None)]
            picks += unnamed * [None]
        elif not isinstance(item, Tensor):
            basic.append(item)
            picks += [] if isinstance(item, int) else [None]
        elif item.dim() == 0:
            # A single boolean adds a dimension, and keeps or drops its one element.
            basic.append(None)
            picks.append(item.unsqueeze(0))
        else:
            basic += _dims(item) * [slice(None)]
            picks.append(item)
    return tuple(basic), tuple(picks)


def _item(item: Any, input: Tensor) -> Any:
    """One item of an index with sequences and booleans made tensors, and single integers numbers."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return item
    if isinstance(item, bool) or (not isinstance(item, Tensor) and hasattr(item, "__len__")):
        item = torch.as_tensor(item, device=input.device)
        return item if item.numel() else item.long()
    single = not isinstance(item, Tensor) or (item.dim() == 0 and item.dtype in INTEGERS)
    return operator.index(item) if single and hasattr(item, "__index__") else item


def _dims(item: Any) -> int:
    """How many dimensions an item of an index names."""
    if isinstance(item, Tensor) and item.dtype in MASKS:
        return item.dim()
    return 0 if item is None or item is Ellipsis else 1


class ReshapeFunction(Function):
    """The same elements in another shape, forward and back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.reshape(input, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy.reshape(ctx.shape), None


class TransposeFunction(Function):
    """A swap is its own inverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim0: int, dim1: int) -> Tensor:
        return torch.transpose(input, dim0, dim1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.dim0, ctx.dim1 = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy.transpose(ctx.dim0, ctx.dim1), None, None


class PermuteFunction(Function):
    """The dimensions in another order; dx by the inverse permutation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dims: tuple[int, ...]) -> Tensor:
        return torch.permute(input, dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        dims = [dim % output.dim() for dim in inputs[1]]
        ctx.inverse = tuple(dims.index(dim) for dim in range(output.dim()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy.permute(ctx.inverse), None


class ExpandFunction(Function):
    """Repetition; dx adds up what became of each element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, size: tuple[int, ...]) -> Tensor:
        return input.expand(size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.input = layout(inputs[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return fit(dy, ctx.input), None


class CatFunction(Function):
    """Joined tensors; each gradient is its piece of dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dim: int, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        dim, *tensors = inputs
        ctx.dim = dim % output.dim()
        ctx.tensors = [layout(tensor) for tensor in tensors]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None]
        start = 0
        for needed, (shape, dtype) in zip(ctx.needs_input_grad[1:], ctx.tensors, strict=True):
            # torch.cat ignores a vector without elements, whatever the rank of the others.
            empty = len(shape) != dy.dim()
            size = 0 if empty else shape[ctx.dim]
            if needed:
                gradients.append((dy.new_zeros(0) if empty else dy.narrow(ctx.dim, start, size)).to(dtype))
            else:
                gradients.append(None)
            start += size
        return tuple(gradients)


class SliceFunction(Function):
    """y = x[index] by integers, slices and None; dx[index] = dy, and 0 elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, index: tuple[Item, ...]) -> Tensor:
        return input[index]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, ctx.index = inputs
        ctx.shape = input.shape

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.new_zeros(ctx.shape)
        dx[ctx.index] = dy
        return dx, None


class IndexFunction(Function):
    """y = x[picks], a None standing for a whole dimension; dx adds dy up at each element picked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, *picks: Tensor | None) -> Tensor:
        return input[tuple(slice(None) if pick is None else pick for pick in picks)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, *picks = inputs
        ctx.shape, ctx.dtype = input.shape, input.dtype
        ctx.save_for_backward(*picks)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy, picks = widen(dy), ctx.saved_tensors  # read once, as checkpointing demands
        # The method of this name takes no None.
        dx = torch.ops.aten.index_put_(dy.new_zeros(ctx.shape), picks, dy, accumulate=True)
        return dx.to(ctx.dtype), *(None for _ in picks)
