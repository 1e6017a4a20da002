"""Reductions, views, joins and indices of tensors of any shape, dtype and layout, against torch's."""

from __future__ import annotations

import pytest
import torch
from float64 import check_against_float64
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_shapes
from op_db import Twin, check_forward, check_gradients
from strategies import dtypes, properties, samples, shapes, tensors
from torch.testing._internal.opinfo.core import SampleInput

from entrenar.autograd import ops


def check(twin: Twin, x: torch.Tensor, *args: object, **kwargs: object) -> None:
    sample = SampleInput(x, args=args, kwargs=kwargs)
    check_forward(twin, sample)
    check_gradients(twin, sample)


@st.composite
def leaves(draw: st.DrawFn, min_dims: int = 0, min_side: int = 0) -> torch.Tensor:
    shape = draw(shapes(min_dims).filter(lambda shape: min(shape, default=1) >= min_side))
    return draw(tensors(shape, draw(dtypes))).requires_grad_()


@pytest.mark.parametrize("twin", [Twin(ops.sum, "sum"), Twin(ops.mean, "mean")], ids=str)
@given(leaves(), st.data(), st.booleans(), st.none() | dtypes)
@properties
def test_reduction(twin, x, data, keepdim, dtype):
    if x.dim():
        dims = data.draw(st.none() | st.lists(st.integers(0, x.dim() - 1), unique=True))
        dims = dims and [data.draw(st.sampled_from([dim, dim - x.dim()])) for dim in dims]
    else:
        dims = data.draw(st.sampled_from([None, 0, -1]))
    check(twin, x, dims, keepdim, dtype=dtype)


@given(leaves(), st.data())
@properties
def test_reshape(x, data):
    shape = data.draw(shapes(max_dims=4).filter(lambda shape: torch.Size(shape).numel() == x.numel()) | st.just((-1,)))
    assume(x.numel() or -1 not in shape)
    check(Twin(ops.reshape, "reshape"), x, shape)


@given(leaves(min_dims=1), st.data())
@properties
def test_transpose_and_permute(x, data):
    dims = data.draw(st.permutations(range(-x.dim(), 0)))
    check(Twin(ops.permute, "permute"), x, dims)
    check(Twin(ops.transpose, "transpose"), x, dims[0], dims[-1])


@given(leaves(), st.lists(st.integers(0, 3), max_size=2), st.data())
@properties
def test_expand(x, lead, data):
    sides = [data.draw(st.sampled_from([-1, n, *([5] if n == 1 else [])])) for n in x.shape]
    check(Twin(ops.expand, "expand"), x, (*lead, *sides))


@given(shapes(max_dims=2), st.lists(st.tuples(st.integers(0, 4), dtypes), min_size=1, max_size=3), st.data())
@properties
def test_cat(rest, pieces, data):
    dim = data.draw(st.integers(0, len(rest)))
    shaped = [((*rest[:dim], size, *rest[dim:]), dtype) for size, dtype in pieces]
    parts = [data.draw(tensors(*piece)).requires_grad_() for piece in shaped]
    check(Twin(ops.cat, "cat"), parts, data.draw(st.sampled_from([dim, dim - len(rest) - 1])))


GETITEM = Twin(ops.getitem, "__getitem__")


@given(leaves(), st.data())
@properties
def test_basic_index(x, data):
    index = data.draw(numpy_shapes.basic_indices(tuple(x.shape), allow_newaxis=True))
    items = index if isinstance(index, tuple) else (index,)
    assume(all(item.step is None or item.step > 0 for item in items if isinstance(item, slice)))
    check(GETITEM, x, index)


# Torch's gradient adds up in 16 bits where an element is picked several times.
@given(leaves(min_dims=1, min_side=1), st.data())
@properties
def test_index_of_integers(x, data):
    picks = data.draw(numpy_shapes.integer_array_indices(tuple(x.shape)))
    sample = SampleInput(x, args=(tuple(map(torch.from_numpy, picks)),))
    check_forward(GETITEM, sample)
    check_against_float64(GETITEM.ours, GETITEM.theirs, sample)


@given(leaves(min_dims=1), st.data())
@properties
def test_index_of_booleans(x, data):
    lead = tuple(x.shape[: data.draw(st.integers(1, x.dim()))])
    check(GETITEM, x, torch.from_numpy(data.draw(numpy_shapes.arrays(bool, lead))))


@given(samples(st.tuples(st.tuples(st.integers(1, 4), st.integers(0, 4)))), shapes(), st.data())
@properties
def test_embedding(sample, shape, data):
    rows = sample.input.shape[0]
    index = torch.from_numpy(data.draw(numpy_shapes.arrays("int64", shape, elements=st.integers(0, rows - 1))))
    padding = data.draw(st.none() | st.integers(-rows, rows - 1))
    ours, theirs = (
        lambda weight, embedding=embedding: embedding(index, weight, padding)
        for embedding in (ops.embedding, torch.nn.functional.embedding)
    )
    check_against_float64(ours, theirs, sample)


@given(leaves(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 100))
@properties
def test_dropout(x, p, seed):
    results = []
    for dropout in (ops.dropout, torch.nn.functional.dropout):
        torch.manual_seed(seed)
        y = dropout(x, p)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(*results)
