"""Arithmetic and matrix products on tensors of any shape, dtype and layout, against torch's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_db import Twin, check_forward, check_gradients
from strategies import broadcastable, properties, samples, shapes

from entrenar.autograd import ops


@pytest.mark.parametrize("twin", [Twin(ops.add, "add"), Twin(ops.sub, "sub")], ids=str)
@given(samples(broadcastable(2), alpha=st.sampled_from([1, 0, -2]), mixed=True))
@properties
def test_sums(twin, sample):
    check_forward(twin, sample)
    check_gradients(twin, sample)


BINARY = [
    Twin(ops.mul, "mul"),
    Twin(ops.div, "div", "no_rounding_mode"),
    Twin(ops.div, "div", "trunc_rounding"),
    Twin(ops.div, "div", "floor_rounding"),
    Twin(ops.pow, "pow"),
]


@pytest.mark.parametrize("twin", BINARY, ids=str)
@given(samples(broadcastable(2), mixed=True))
@properties
def test_binary(twin, sample):
    check_forward(twin, sample)
    check_gradients(twin, sample)


UNARY = [Twin(ops.neg, "neg"), Twin(ops.exp, "exp"), Twin(ops.log, "log"), Twin(ops.sqrt, "sqrt")]


@pytest.mark.parametrize("twin", UNARY, ids=str)
@given(samples(shapes().map(lambda shape: (shape,))))
@properties
def test_unary(twin, sample):
    check_forward(twin, sample)
    check_gradients(twin, sample)
