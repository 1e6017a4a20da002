"""Activations and softmax of tensors of any shape, dtype and layout, against torch's in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from float64 import TOLERANCE, assert_close, check_against_float64, to_float64
from hypothesis import given
from hypothesis import strategies as st
from op_db import Twin
from strategies import broadcastable, properties, samples, shapes
from torch.nn import functional as F
from torch.testing._internal.opinfo.core import SampleInput

from entrenar.autograd import ops
from entrenar.autograd.ops.swiglu import swiglu_reference

one = shapes().map(lambda shape: (shape,))
SCALES = (0.1, 3.0, 40.0)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
@given(samples(one, scales=SCALES))
@properties
def test_activation(name, sample):
    check_against_float64(getattr(ops, name), getattr(F, name), sample)


@given(samples(one, scales=SCALES))
@properties
def test_gelu_by_tanh(sample):
    ours, theirs = (functools.partial(gelu, approximate="tanh") for gelu in (ops.gelu, F.gelu))
    check_against_float64(ours, theirs, sample)


dims = st.integers(-3, 2)
several = shapes(min_dims=3).map(lambda shape: (shape,))


def check_by_result(twin: Twin, sample: SampleInput) -> None:
    """For gradients that are computed from the result, and so from what rounding left of it, as torch's are."""
    # Torch's softmax rounds 16 bits twice along other dimensions than the last.
    tolerance = 2 * TOLERANCE[sample.input.dtype]
    actual, expected = (op(sample.input, *sample.args) for op in (twin.ours, twin.theirs))
    assert_close(actual, twin.theirs(to_float64(sample.input), *sample.args), tolerance)
    dy = torch.randn(actual.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(1)).to(
        actual.dtype
    )
    gradients = (torch.autograd.grad(y, sample.input, dy)[0] for y in (actual, expected))
    assert_close(next(gradients), next(gradients).double(), tolerance)


@pytest.mark.parametrize("twin", [Twin(ops.sigmoid, "sigmoid"), Twin(ops.tanh, "tanh")], ids=str)
@given(samples(one, scales=SCALES))
@properties
def test_activation_whose_result_is_kept(twin, sample):
    check_by_result(twin, sample)


@pytest.mark.parametrize("twin", [Twin(ops.softmax, "softmax"), Twin(ops.log_softmax, "log_softmax")], ids=str)
@given(samples(several, dims, scales=SCALES))
@properties
def test_softmax(twin, sample):
    check_by_result(twin, sample)


# The forward may round silu(gate) before it multiplies; a broadcast operand's gradient sums what was rounded.
@given(samples(broadcastable(2), scales=SCALES, mixed=True))
@properties
def test_swiglu(sample):
    check_against_float64(ops.swiglu, swiglu_reference, sample, factor=2)
