"""layer_norm and rms_norm, against torch's and against float64."""

from __future__ import annotations

import pytest
import torch
from float64 import check_against_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import (
    DTYPES,
    Twin,
    check_derivatives,
    check_errors,
    check_forward,
    check_no_forward_mode,
    check_refuses_complex,
    check_transforms,
    samples,
    twin_params,
)
from torch.nn import functional as F
from torch.testing._internal.opinfo.core import SampleInput

from entrenar.autograd.ops import layer_norm, rms_norm

TWINS = [Twin(layer_norm, "nn.functional.layer_norm"), Twin(rms_norm, "nn.functional.rms_norm", exact=False)]


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, *DTYPES))
def test_forward_is_torchs(twin, dtype):
    for sample in samples(twin, dtype):
        check_forward(twin, sample)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 2**-21), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_rms_norm_is_rounded_once(dtype, step, backend):
    """float32 itself: the sum over a row, the root, and two products, of which each rounds by up to 2^-24."""
    x, weight = torch.randn(20, 576).to(dtype), torch.randn(576).to(dtype)
    expected = F.rms_norm(x.double(), (576,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, (576,), weight, 1e-5).double(), expected, rtol=step + 2**-21, atol=1e-7)


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, *DTYPES))
def test_gradients_are_those_of_float64(twin, dtype):
    for sample in samples(twin, dtype):
        check_against_float64(twin.ours, torch_in_wide(twin, dtype), sample)


def torch_in_wide(twin, dtype):
    """Torch's op as it is for `dtype`: the default eps of rms_norm depends on it."""
    if twin.ours is layer_norm:
        return F.layer_norm
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return lambda x, shape, weight=None, eps=eps: F.rms_norm(x, shape, weight, eps)


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, torch.float64))
def test_derivatives_are_those_of_finite_differences(twin, dtype):
    for sample in samples(twin, dtype):
        check_derivatives(twin, sample)


# Torch's own functional transforms compile with torch.jit when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, torch.float64))
def test_transforms(twin, dtype):
    for sample in samples(twin, dtype):
        check_transforms(twin, sample)
    check_no_forward_mode(twin, sample)


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_refused_input(twin):
    check_refuses_complex(twin, samples(twin, torch.float32)[0])
    check_errors(twin)
    with pytest.raises(RuntimeError, match="expected input with shape"):
        twin.ours(torch.randn(2, 3), (2,))


@given(
    st.booleans(),
    st.lists(st.integers(0, 4), max_size=2),
    st.lists(st.integers(1, 9), min_size=1, max_size=2),
    st.lists(st.sampled_from(["absent", "frozen", "trained"]), min_size=2, max_size=2),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(centred, lead, shape, parameters, sliced, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(*lead, *shape, 2)[..., 0] if sliced else torch.randn(*lead, *shape)
    x = x.to(dtype).requires_grad_()
    weight, bias = (
        None if kind == "absent" else torch.randn(shape).to(dtype).requires_grad_(kind == "trained")
        for kind in parameters
    )
    if centred:
        check_against_float64(layer_norm, F.layer_norm, SampleInput(x, args=(tuple(shape), weight, bias, 1e-3)), 4)
    else:
        check_against_float64(rms_norm, F.rms_norm, SampleInput(x, args=(tuple(shape), weight, 1e-3)), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_sixteen_bits_are_wide(dtype, backend):
    """Sums of 8192 elements in 16 bits would be off by several per cent."""
    x = (torch.randn(4 if backend == "emulated" else 64, 8192) + 30).to(dtype).requires_grad_()
    weight, bias = (torch.randn(8192).to(dtype).requires_grad_() for _ in range(2))
    check_against_float64(layer_norm, F.layer_norm, SampleInput(x, args=((8192,), weight, bias)), factor=4)
    check_against_float64(rms_norm, F.rms_norm, SampleInput(x, args=((8192,), weight, 1e-6)), factor=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_eps_is_that_of_the_wide_dtype(dtype, backend):
    """It shows where the values are about as large as its root."""
    x = (1e-3 * torch.randn(4, 9)).to(dtype).requires_grad_()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    check_against_float64(rms_norm, lambda x, shape: F.rms_norm(x, shape, eps=eps), SampleInput(x, args=((9,),)))


# Torch's rms_norm says that it has no fused kernel for two dtypes.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(layer_norm, F.layer_norm, marks=pytest.mark.cpu("torch's layer_norm takes one dtype on CUDA")),
        (rms_norm, F.rms_norm),
    ],
)
def test_weight_may_be_wider_than_the_input(ours, theirs):
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(8, requires_grad=True)
    assert ours(x, (8,), weight).dtype == theirs(x, (8,), weight).dtype
    check_against_float64(
        ours, theirs, SampleInput(x, args=((8,), weight, *([None] if ours is layer_norm else []), 1e-3))
    )


def test_only_the_input_and_weight_are_kept():
    x, weight, bias = torch.randn(4, 8, requires_grad=True), torch.ones(8), torch.zeros(8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer_norm(x, (8,), weight, bias)
        rms_norm(x, (8,), weight)
    assert set(kept) == {x.data_ptr(), weight.data_ptr()}
