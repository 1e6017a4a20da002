"""Arithmetic and matrix products on tensors of any shape, dtype and layout, against torch's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_db import Twin, check_forward, check_gradients
from strategies import broadcastable, properties, samples, shapes

from entrenar.autograd import ops

DIV = Twin(ops.div, "div", "no_rounding_mode")


@pytest.mark.parametrize("twin", [Twin(ops.add, "add"), Twin(ops.sub, "sub")], ids=str)
@given(samples(broadcastable(2), alpha=st.sampled_from([1, 0, -2]), mixed=True))
@properties
def test_sums(twin, sample):
    check_forward(twin, sample)
    check_gradients(twin, sample)


@pytest.mark.parametrize("twin", [Twin(ops.mul, "mul"), Twin(ops.pow, "pow")], ids=str)
@given(samples(broadcastable(2), mixed=True))
@properties
def test_products(twin, sample):
    check_forward(twin, sample)
    check_gradients(twin, sample)


@given(samples(broadcastable(2), rounding_mode=st.sampled_from([None, "trunc", "floor"]), mixed=True))
@properties
def test_quotients(sample):
    check_forward(DIV, sample)
    check_gradients(DIV, sample)


UNARY = [Twin(ops.neg, "neg"), Twin(ops.exp, "exp"), Twin(ops.log, "log"), Twin(ops.sqrt, "sqrt")]


@pytest.mark.parametrize("twin", UNARY, ids=str)
@given(samples(shapes().map(lambda shape: (shape,))))
@properties
def test_unary(twin, sample):
    check_forward(twin, sample)
    check_gradients(twin, sample)
