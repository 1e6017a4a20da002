"""Losses of tensors of any shape, dtype and layout, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
from float64 import check_against_float64
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, properties, samples, shapes, tensors
from torch.nn import functional as F
from torch.testing._internal.opinfo.core import SampleInput

from entrenar.autograd import ops

reductions = st.sampled_from(["none", "sum", "mean"])


@given(st.data(), shapes(max_dims=2), st.integers(1, 5), dtypes, reductions, st.sampled_from([0.0, 0.2]))
@properties
def test_cross_entropy_of_classes(data, batch, classes, dtype, reduction, smoothing):
    x = data.draw(tensors((*batch[:1], classes, *batch[1:]), dtype)).requires_grad_()
    target = torch.randint(
        classes,
        batch,
        generator=torch.Generator(torch.get_default_device()).manual_seed(data.draw(st.integers(0, 100))),
    )
    weight = torch.rand(classes).to(dtype) + 0.5 if data.draw(st.booleans()) else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": data.draw(st.integers(-1, 2))}
    sample = SampleInput(x, args=(target, weight), kwargs=options)
    check_against_float64(ops.cross_entropy, F.cross_entropy, sample, factor=2)


@given(
    samples(
        shapes(min_dims=1).filter(lambda shape: shape[min(1, len(shape) - 1)] > 0).map(lambda shape: (shape, shape)),
        reduction=reductions,
        label_smoothing=st.sampled_from([0.0, 0.2]),
    )
)
@properties
def test_cross_entropy_of_probabilities(sample):
    check_against_float64(ops.cross_entropy, F.cross_entropy, sample, factor=2)


@pytest.mark.filterwarnings("ignore:Using a target size")
@given(samples(shapes().map(lambda shape: (shape, shape)), reduction=reductions, mixed=True))
@properties
def test_mse_loss(sample):
    check_against_float64(ops.mse_loss, F.mse_loss, sample, factor=2)
