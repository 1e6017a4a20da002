"""rotary_embedding against its reference, transformers, and finite differences."""

from __future__ import annotations

import pytest
import torch
from float64 import check_against_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import DTYPES
from torch.testing._internal.opinfo.core import SampleInput
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from entrenar.autograd.ops import rotary_embedding
from entrenar.autograd.ops.rotary import rotary_embedding_reference


def tables(length: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# transformers rounds two products and their sum to 16 bits, each by up to the step; here the result is rounded once.
@pytest.mark.parametrize(
    ("dtype", "step"),
    [(torch.float64, 0), (torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
def test_equals_transformers_but_for_rounding(dtype, step, backend):
    q = torch.randn(2, 7, 3, 8).to(dtype).transpose(1, 2)
    cos, sin = (table.expand(2, 7, 8) for table in tables(7, 8, dtype))
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin)
    y = rotary_embedding(q, cos.unsqueeze(1), sin.unsqueeze(1))
    assert y.stride() == q.stride()
    exact = rotary_embedding_reference(*(x.double() for x in (q, cos.unsqueeze(1), sin.unsqueeze(1))))
    # The two products may cancel: an error is up to the step of each.
    size = (q.double() * cos.unsqueeze(1)).abs() + (q.double().roll(4, -1) * sin.unsqueeze(1)).abs()
    assert ((y.double() - theirs.double()).abs() <= 4 * step * size).all()
    assert ((y.double() - exact).abs() <= step * exact.abs() + 2**-23 * size * (step > 0)).all()


@given(
    st.sampled_from([(), (3,), (2, 3)]),
    st.integers(0, 5),
    st.integers(0, 4),
    st.sampled_from(["rows", "whole", "one"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(lead, length, half, broadcast, gradients, dtype, seed):
    torch.manual_seed(seed)
    d = 2 * half
    shape = {"rows": (length, d), "whole": (*lead, length, d), "one": (1, d)}[broadcast]
    tensors = [torch.randn(*lead, length, d), torch.randn(shape), torch.randn(shape)]
    tensors = [t.to(dtype).requires_grad_(wanted) for t, wanted in zip(tensors, gradients, strict=True)]
    if any(gradients):
        # Where the gradients of the tables are wanted, each product and each sum of 16-bit values is rounded.
        check_against_float64(
            rotary_embedding, rotary_embedding_reference, SampleInput(tensors[0], args=tuple(tensors[1:])), factor=3
        )


def test_derivatives_are_those_of_finite_differences():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(rotary_embedding, (x, cos, sin))
    assert torch.autograd.gradgradcheck(rotary_embedding, (x, cos, sin))


def test_lengths_are_kept_and_positions_are_relative():
    x, y = torch.randn(2, 16, dtype=torch.float64).repeat_interleave(9, 0).view(2, 9, 16)
    cos, sin = tables(9, 16, torch.float64)
    x, y = rotary_embedding(x, cos, sin), rotary_embedding(y, cos, sin)
    torch.testing.assert_close(x.norm(dim=-1), x[0].norm().expand(9), rtol=1e-6, atol=0)
    torch.testing.assert_close(x[3] @ y[5], x[6] @ y[8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cos_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sin_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_promoted(cos_dtype, sin_dtype):
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = tables(3, 4)
    y = rotary_embedding(x, cos.to(cos_dtype), sin.to(sin_dtype))
    assert y.dtype == torch.promote_types(cos_dtype, sin_dtype)
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16


def test_x_is_not_kept_where_the_tables_are_fixed():
    x, kept = torch.randn(3, 4, requires_grad=True), []
    cos, sin = tables(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotary_embedding(x, cos, sin)
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}


def test_vmap():
    x, (cos, sin) = torch.randn(5, 3, 4), tables(3, 4)
    expected = rotary_embedding(x, cos, sin)
    torch.testing.assert_close(torch.func.vmap(lambda x: rotary_embedding(x, cos, sin))(x), expected)

    def gradient(x):
        return torch.func.grad(lambda x: rotary_embedding(x, cos, sin).sin().sum())(x)

    torch.testing.assert_close(torch.func.vmap(gradient)(x), gradient(x))


@pytest.mark.parametrize(("x", "tables"), [((3, 5), (3, 5)), ((3, 4), (3, 2)), ((), (4,))])
def test_bad_shapes_are_refused(x, tables):
    with pytest.raises(ValueError, match="the same even number"):
        rotary_embedding(torch.ones(x), torch.ones(tables), torch.ones(tables))


def test_complex_values_are_refused():
    with pytest.raises(TypeError, match="complex"):
        rotary_embedding(torch.ones(2, 4, dtype=torch.cfloat), *tables(2, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_where_columns_are_apart_in_memory(transposed):
    x, angles = torch.randn(2, 3, 8, 5).mT, torch.randn(5, 8)
    results = torch.library.opcheck(
        torch.ops.entrenar.rotary_embedding.default, (x, angles.cos(), angles.sin(), transposed)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("x", [(3, 4, (1, 1)), (3, 4, (0, 1)), (3, 4, (2, 1))], ids=["overlapping", "expanded", "half"])
def test_rows_that_share_memory(x, backend):
    rows, columns, strides = x
    shared = torch.randn(10).as_strided((rows, columns), strides)
    cos, sin = tables(rows, columns)
    torch.testing.assert_close(rotary_embedding(shared, cos, sin), rotary_embedding(shared.clone(), cos, sin))
    results = torch.library.opcheck(torch.ops.entrenar.rotary_embedding.default, (shared, cos, sin, False))
    assert set(results.values()) == {"SUCCESS"}
