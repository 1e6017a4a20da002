"""Results and gradients held against the same computation in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from op_db import arguments, as_function_of_leaves
from torch import Tensor
from torch.testing._internal.opinfo.core import SampleInput
from torch.utils._pytree import tree_flatten

# Of the largest element: several roundings of float64 and float32; for 16 bits the one of the result, and little more.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def check_against_float64(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], sample: SampleInput, factor: float = 1.0
) -> None:
    """`ours` and its gradients on the sample equal those of `theirs` on the same values in float64.

    The tolerance is that of the coarsest dtype times `factor`.
    """
    function, inputs = as_function_of_leaves(ours, sample)
    result = function(*inputs)
    dy = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(result)
    gradients = torch.autograd.grad(result, inputs, dy)

    function, wide_inputs = as_function_of_leaves(theirs, sample.transform(to_float64))
    wide_result = function(*wide_inputs)
    wide_gradients = torch.autograd.grad(wide_result, wide_inputs, dy.double())
    tensors = [x for x in tree_flatten(arguments(sample))[0] if isinstance(x, Tensor) and x.is_floating_point()]
    tolerance = factor * max(TOLERANCE[x.dtype] for x in tensors)
    assert_close(result, wide_result, tolerance)
    for gradient, wide_gradient, x in zip(gradients, wide_gradients, inputs, strict=True):
        assert gradient.dtype == x.dtype
        assert_close(gradient, wide_gradient, tolerance)


def to_float64(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double().requires_grad_(x.requires_grad)
    return x


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every error is at most `tolerance` times the largest expected value.

    That counts as at least 0.1: where a gradient is 0 in theory, float64 has noise as well.
    """
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    assert torch.equal(actual.isnan(), expected.isnan())
    expected = expected.nan_to_num()
    error = (actual.double().nan_to_num() - expected).abs().max()
    largest = expected.abs().max()
    assert error <= tolerance * max(largest, 0.1), f"off by {error:.3g} where the largest value is {largest:.3g}"
