"""Matrix products of tensors of any rank, dtype and layout, against torch's and against float64."""

from __future__ import annotations

from float64 import check_against_float64
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from op_db import Twin, check_forward
from strategies import Shape, properties, samples, shapes
from torch.nn import functional as F

from entrenar.autograd import ops

SIDES = st.integers(0, 4)
MATMUL, LINEAR = Twin(ops.matmul, "matmul"), Twin(ops.linear, "nn.functional.linear")

matrices = mutually_broadcastable_shapes(signature="(m?,n),(n,p?)->(m?,p?)", max_dims=2, min_side=0, max_side=4)


# Where a batch of products belongs to one operand, they are rounded before they are summed.
@given(samples(matrices.map(lambda found: found.input_shapes)))
@properties
def test_matmul(sample):
    check_forward(MATMUL, sample)
    check_against_float64(ops.matmul, MATMUL.theirs, sample, factor=2)


@st.composite
def linear_shapes(draw: st.DrawFn) -> tuple[Shape, ...]:
    lead, k, n = draw(shapes()), draw(SIDES), draw(SIDES)
    return (*lead, k), (n, k), *draw(st.sampled_from([(), ((n,),)]))


@given(samples(linear_shapes()))
@properties
def test_linear(sample):
    check_forward(LINEAR, sample)
    check_against_float64(ops.linear, F.linear, sample, factor=2)
