"""swiglu against its reference and finite differences."""

from __future__ import annotations

import pytest
import torch
from float64 import check_against_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import DTYPES
from torch.nn import functional as F
from torch.testing._internal.opinfo.core import SampleInput

from entrenar.autograd.ops import swiglu
from entrenar.autograd.ops.swiglu import swiglu_reference


def test_forward_in_float64_is_torchs():
    gate, up = (10 * torch.randn(5, 33, dtype=torch.float64) for _ in range(2))
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)


# float32 itself: the exponential, a sum, a quotient and two products, of which each rounds by up to 2^-23 or 2^-24.
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_forward_is_rounded_once(dtype, step, backend):
    gate, up = (3 * torch.randn(5, 333).to(dtype) for _ in range(2))
    expected = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(swiglu(gate, up).double(), expected, rtol=step + 2**-21, atol=2**-25)


@given(
    st.sampled_from([((), ()), ((3, 5), (3, 5)), ((4, 1, 5), (2, 5)), ((0, 3), (3,))]),
    st.tuples(st.booleans(), st.booleans()),
    st.booleans(),
    st.sampled_from([0.1, 3.0, 40.0]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(shapes, gradients, sliced, size, dtype, seed):
    torch.manual_seed(seed)
    gate, up = (
        (size * (torch.randn(*shape, 2)[..., 0] if sliced else torch.randn(shape))).to(dtype).requires_grad_(wanted)
        for shape, wanted in zip(shapes, gradients, strict=True)
    )
    if any(gradients):
        # Where shapes differ, the forward rounds silu(gate) to 16 bits before it multiplies.
        check_against_float64(swiglu, swiglu_reference, SampleInput(gate, args=(up,)), factor=2)


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_gradients_are_rounded_once(dtype, step, backend):
    gate, up, dy = (torch.randn(1000).to(dtype).requires_grad_() for _ in range(3))
    gradients = torch.autograd.grad(swiglu(gate, up), (gate, up), dy)
    wide = [x.detach().double().requires_grad_() for x in (gate, up, dy)]
    expected = torch.autograd.grad(swiglu_reference(*wide[:2]), wide[:2], wide[2])
    for actual, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=step, atol=1e-6)


def test_derivatives_are_those_of_finite_differences():
    gate, up = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.autograd.gradgradcheck(swiglu, (gate, up))


def test_dtypes_are_promoted():
    gate, up = torch.randn(3, dtype=torch.bfloat16, requires_grad=True), torch.randn(3, requires_grad=True)
    y = swiglu(gate, up)
    assert y.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (gate, up))] == [torch.bfloat16, torch.float32]


def test_only_gate_and_up_are_kept():
    gate, up = (torch.randn(4, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


def test_vmap():
    gate, up = torch.randn(4, 3), torch.randn(3)
    torch.testing.assert_close(torch.func.vmap(swiglu, (0, None))(gate, up), swiglu(gate, up))

    def gradient(gate):
        return torch.func.grad(lambda gate: swiglu(gate, up).sin().sum())(gate)

    torch.testing.assert_close(torch.func.vmap(gradient)(gate), gradient(gate))


def test_complex_values_are_refused():
    with pytest.raises(TypeError, match="complex"):
        swiglu(torch.ones(2), torch.ones(2, dtype=torch.cfloat))
