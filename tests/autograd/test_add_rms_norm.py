"""add_rms_norm against its reference, against the two ops that it stands for, and finite differences."""

from __future__ import annotations

import pytest
import torch
from float64 import assert_close, check_against_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import DTYPES
from torch.testing._internal.opinfo.core import SampleInput

from entrenar.autograd import ops
from entrenar.autograd.ops import add_rms_norm
from entrenar.autograd.ops.add_rms_norm import add_rms_norm_reference


@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 40),
    st.sampled_from(["absent", "frozen", "trained"]),
    st.tuples(st.booleans(), st.booleans()),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(lead, n, weight_kind, gradients, sliced, dtype, seed):
    torch.manual_seed(seed)
    x, residual = (
        (torch.randn(*lead, n, 2)[..., 0] if sliced else torch.randn(*lead, n)).to(dtype).requires_grad_(wanted)
        for wanted in gradients
    )
    weight = None if weight_kind == "absent" else torch.randn(n).to(dtype).requires_grad_(weight_kind == "trained")
    if any(gradients) or weight_kind == "trained":
        # Of 16 bits the sum is rounded before it is normalized, and 1 / r may be as small as the root of eps.
        check_against_float64(
            lambda *args: torch.stack(add_rms_norm(*args)),
            lambda *args: torch.stack(add_rms_norm_reference(*args)),
            SampleInput(x, args=(residual, weight, 1e-3)),
            factor=32,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_add_and_rms_norm_with_both_gradients(dtype, backend):
    x, residual, weight = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((4, 9), (4, 9), (9,)))
    h, y = add_rms_norm(x, residual, weight, 1e-6)
    sum = x + residual
    normed = ops.rms_norm(sum, (9,), weight, 1e-6)
    assert torch.equal(h, sum)
    torch.testing.assert_close(y, normed)
    dh, dy = (torch.randn(4, 9).to(dtype) for _ in range(2))
    actual = torch.autograd.grad((h, y), (x, residual, weight), (dh, dy))
    expected = torch.autograd.grad((sum, normed), (x, residual, weight), (dh, dy))
    for a, e in zip(actual, expected, strict=True):
        # The two parts of dx are rounded once here, and there each and their sum.
        assert_close(a.double(), e.double(), 4 * torch.finfo(dtype).eps)


def test_derivatives_are_those_of_finite_differences():
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))
    assert torch.autograd.gradgradcheck(add_rms_norm, (x, residual, weight))


def test_only_the_sum_and_weight_are_kept():
    x, residual, weight = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.ones(8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        h, _ = add_rms_norm(x, residual, weight)
    assert set(kept) == {h.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("i", [0, 1])
def test_one_result_alone_has_a_gradient(i):
    x, residual = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    dy = torch.randn(2, 3)
    actual = torch.autograd.grad(add_rms_norm(x, residual)[i], (x, residual), dy)
    expected = torch.autograd.grad(add_rms_norm_reference(x, residual, None, 1e-6)[i], (x, residual), dy)
    torch.testing.assert_close(actual, expected)


def test_vmap():
    x, residual, weight = torch.randn(4, 2, 3), torch.randn(2, 3), torch.randn(3)
    expected = add_rms_norm(x, residual.expand(4, 2, 3), weight)
    torch.testing.assert_close(torch.func.vmap(add_rms_norm, (0, None, None))(x, residual, weight), expected)

    def gradient(x):
        return torch.func.grad(lambda x: add_rms_norm(x, residual, weight)[1].sin().sum())(x)

    torch.testing.assert_close(torch.func.vmap(gradient)(x), torch.stack([gradient(row) for row in x]))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (3,), (3,)), "one shape"),
        (((), (), ()), "one shape"),
        (((1, 2, 3), (1, 2, 3), (2,)), r"weight must be \[3\] of torch.float32, not \[2\]"),
    ],
)
def test_bad_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        add_rms_norm(*map(torch.ones, shapes))


def test_bad_dtypes_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="dtype"):
        add_rms_norm(x, x.bfloat16())
    with pytest.raises(ValueError, match="weight must be"):
        add_rms_norm(x, x, torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="complex"):
        add_rms_norm(x.cfloat(), x.cfloat())
