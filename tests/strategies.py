"""Tensors of any shape, dtype and layout in memory, for property tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_shapes
from op_db import DTYPES
from torch import Tensor
from torch.testing._internal.opinfo.core import SampleInput

Shape = tuple[int, ...]

properties = settings(max_examples=60, deadline=None, derandomize=True)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(["contiguous", "reversed", "with gaps", "offset", "repeated", "overlapping"])


def shapes(min_dims: int = 0, max_dims: int = 3) -> st.SearchStrategy[Shape]:
    """Shapes with sides from 0 to 4."""
    return numpy_shapes.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=0, max_side=4)


def broadcastable(count: int) -> st.SearchStrategy[tuple[Shape, ...]]:
    """That many shapes that broadcast to one."""
    shapes = numpy_shapes.mutually_broadcastable_shapes(num_shapes=count, max_dims=3, min_side=0, max_side=4)
    return shapes.map(lambda found: found.input_shapes)


@st.composite
def tensors(draw: st.DrawFn, shape: Shape, dtype: torch.dtype, scales: Sequence[float] = (0.1, 3.0)) -> Tensor:
    """A tensor of normally distributed values, of which some are 0, times one of `scales`."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**32 - 1)))
    layout, scale = draw(layouts), draw(st.sampled_from(scales))
    count = sum(n - 1 for n in shape) + 1 if layout == "overlapping" else math.prod(shape)
    values = scale * torch.randn(max(count, 0), generator=generator, dtype=torch.float64)
    values *= torch.rand(values.shape, generator=generator) > 0.1
    values = values.to(dtype)
    if layout == "overlapping":
        return values.as_strided(shape, [1] * len(shape)) if math.prod(shape) else values.new_empty(shape)
    return laid_out(values.view(shape), layout)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The contiguous `values` in another layout; "repeated" is their first row again and again."""
    if layout == "reversed":
        dims = tuple(reversed(range(values.dim())))
        return values.permute(dims).contiguous().permute(dims)
    if layout == "with gaps":
        # Whatever reads the gaps shows it.
        return values.new_full((*values.shape, 2), torch.nan)[..., 0].copy_(values)
    if layout == "offset":
        return torch.cat([values.new_full((1,), torch.nan), values.flatten()])[1:].view(values.shape)
    if layout == "repeated" and values.dim():
        return values[:1].expand_as(values)
    return values


@st.composite
def samples(
    draw: st.DrawFn,
    shapes: st.SearchStrategy[tuple[Shape, ...]],
    *args: st.SearchStrategy,
    scales: Sequence[float] = (0.1, 3.0),
    mixed: bool = False,
    **kwargs: st.SearchStrategy,
) -> SampleInput:
    """Tensors of the shapes drawn, as the first arguments of an op, and then what `args` and `kwargs` draw.

    The gradient of at least one tensor is wanted. They have one dtype, unless `mixed`.
    """
    found = draw(shapes)
    chosen = [draw(dtypes)] * len(found) if not mixed else [draw(dtypes) for _ in found]
    wanted = draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found)).filter(any))
    x, *rest = (
        draw(tensors(shape, dtype, scales)).requires_grad_(want)
        for shape, dtype, want in zip(found, chosen, wanted, strict=True)
    )
    settings = {name: draw(strategy) for name, strategy in kwargs.items()}
    return SampleInput(x, args=(*rest, *map(draw, args)), kwargs=settings)
