"""Attention against torch's, against float64, and its memory."""

from __future__ import annotations

import importlib

import pytest
import torch
from float64 import check_against_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import (
    DTYPES,
    Twin,
    check_derivatives,
    check_gradients,
    check_no_forward_mode,
    check_refuses_complex,
    check_transforms,
    samples,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.opinfo.core import SampleInput
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from entrenar.autograd.ops import attention, scaled_dot_product_attention

# Its package has the function under the same name.
module = importlib.import_module("entrenar.autograd.ops.attention")
SCORES_UP_TO_230 = 40
"""Torch's samples have scores of that size, each wrong by its own rounding, and probabilities by that in relation."""


def torch_attention(*args, **settings):
    """By plain operations, which alone have a second derivative and take every mask."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **settings)


TWIN = Twin(attention, "nn.functional.scaled_dot_product_attention", exact=False)


def without_dropout(dtype):
    return [sample for sample in samples(TWIN, dtype) if not sample.kwargs["dropout_p"]]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_both_names_are_the_same():
    assert attention is scaled_dot_product_attention


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_on_its_samples(dtype, small_blocks):
    for sample in without_dropout(dtype):
        factor = SCORES_UP_TO_230 if dtype in (torch.float64, torch.float32) else 2
        check_against_float64(attention, torch_attention, sample, factor)


def test_equals_torchs_fused_kernel_in_float64():
    for sample in without_dropout(torch.float64):
        check_gradients(TWIN, sample)


# Torch's own functional transforms compile with torch.jit when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_transforms(small_blocks):
    for sample in without_dropout(torch.float64):
        check_transforms(TWIN, sample)
    check_no_forward_mode(TWIN, sample)
    check_refuses_complex(TWIN, sample)


def test_derivatives_are_those_of_finite_differences_on_torchs_samples(small_blocks):
    for sample in without_dropout(torch.float64)[::3]:
        check_derivatives(TWIN, sample)


MASKS = {
    "rows": lambda: leaf(5, 4),
    "heads": lambda: leaf(2, 1, 4),
    "keys": lambda: leaf(4),
    "boolean": lambda: torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool(),
    "one row blind": lambda: torch.tensor([0, 1, 1, 0, 1]).log().unsqueeze(1).expand(5, 4).double(),
}


@pytest.mark.parametrize("mask", MASKS)
def test_derivatives_of_masked_attention(mask, small_blocks):
    args = leaf(2, 5, 3), leaf(2, 4, 3), leaf(2, 4, 2), MASKS[mask]()
    assert torch.autograd.gradcheck(attention, args)
    assert torch.autograd.gradgradcheck(attention, args)


def test_derivatives_with_dropout(small_blocks):
    def seeded(*args):
        torch.manual_seed(3)
        return attention(*args, dropout_p=0.4, is_causal=True)

    args = leaf(2, 5, 3), leaf(2, 4, 3), leaf(2, 4, 2)
    assert torch.autograd.gradcheck(seeded, args)
    assert torch.autograd.gradgradcheck(seeded, args)


@st.composite
def calls(draw):
    """A sample with heads shared or not, any mask, and some tensors that get no gradient."""
    lead, groups = draw(st.sampled_from([(), (3,), (2, 3)])), draw(st.sampled_from([None, 1, 2, 3]))
    queries, keys, columns, value_columns = (draw(st.integers(1, 7)) for _ in range(4))
    if groups:
        lead = (*lead, draw(st.integers(1, 3)))
    query_lead = (*lead[:-1], lead[-1] * groups) if groups else lead
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**32)))

    def tensor(*shape):
        x = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if draw(st.booleans()) else torch.randn(shape)
        return x.to(dtype).requires_grad_(draw(st.booleans()))

    query, key, value = (
        tensor(*query_lead, queries, columns),
        tensor(*lead, keys, columns),
        tensor(*lead, keys, value_columns),
    )
    settings = {"enable_gqa": bool(groups), "scale": draw(st.sampled_from([None, 0.3]))}
    match draw(st.sampled_from(["none", "causal", "boolean", "additive"])):
        case "causal":
            settings["is_causal"] = True
        case "boolean" | "additive" as kind:
            start = draw(st.integers(0, len(query_lead)))
            shape = [n if draw(st.booleans()) else 1 for n in (*query_lead[start:], queries, keys)]
            settings["attn_mask"] = torch.rand(shape) < 0.7 if kind == "boolean" else tensor(*shape)
    if not any(t.requires_grad for t in (query, key, value)):
        query.requires_grad_()
    return SampleInput(query, args=(key, value), kwargs=settings)


@given(calls())
@settings(max_examples=150, deadline=None)
def test_any_shape(sample):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 3)
        check_against_float64(attention, torch_attention, sample, factor=4)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_attend(queries, keys):
    args = leaf(2, queries, 4), leaf(2, keys, 4), leaf(2, keys, 5)
    y = attention(*args)
    assert y.shape == (2, queries, 5)
    assert not y.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), args))


def test_a_head_without_columns_takes_the_mean():
    value = torch.randn(2, 3, 4)
    y = attention(torch.ones(2, 5, 0), torch.ones(2, 3, 0), value)
    torch.testing.assert_close(y, value.mean(-2, keepdim=True).expand(2, 5, 4))


@pytest.mark.parametrize("p", [0.3, 0.0, 1.0])
def test_dropout_zeroes_and_scales_probabilities(p, small_blocks):
    query, key = torch.randn(4, 6, 50, 8), torch.randn(4, 6, 50, 8)
    value = torch.eye(50).expand(4, 6, 50, 50)
    probabilities, dropped = attention(query, key, value), attention(query, key, value, dropout_p=p)
    zeros = dropped == 0
    # Of 60,000 draws the standard deviation is 0.002 of them.
    assert abs(zeros.float().mean() - p) < 0.015
    if p < 1:
        torch.testing.assert_close(dropped, (probabilities / (1 - p)).masked_fill(zeros, 0))


def test_dropout_follows_torchs_generator():
    args = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    torch.manual_seed(1)
    first, second = (attention(*args, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(attention(*args, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_autocast_computes_in_its_dtype():
    args = [leaf(2, 5, 8, dtype=torch.float32) for _ in range(3)]
    low = [x.detach().bfloat16().requires_grad_() for x in args]
    mask = torch.randn(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(*args, mask)
        gradients = torch.autograd.grad(y.sum(), args)
    expected = attention(*low, mask)
    assert torch.equal(y, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), low), strict=True):
        assert torch.equal(gradient, wanted.float())


class LargestAllocation(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    def __init__(self, given):
        super().__init__()
        self.largest, self.given = 0, {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["plain", "causal", "grouped", "keys masked", "all masked", "additive", "dropout"])
def test_no_square_matrix_is_kept_or_made(kind):
    heads = 2

    def largest(length):
        args = [leaf(heads, length, 4, dtype=torch.float32) for _ in range(3)]
        settings = {
            "plain": {},
            "causal": {"is_causal": True},
            "grouped": {"enable_gqa": True},
            "keys masked": {"attn_mask": torch.rand(length) < 0.5},
            "all masked": {"attn_mask": torch.rand(length, length) < 0.5},
            "additive": {"attn_mask": torch.randn(1, length, length)},
            "dropout": {"dropout_p": 0.1},
        }[kind]
        given = [*args, *(x for x in settings.values() if isinstance(x, torch.Tensor))]
        kept = []
        with LargestAllocation(given) as mode:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                y = attention(*args, **settings)
            torch.autograd.grad(y.sum(), args)
        assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in given}
        return mode.largest

    assert largest(1024) <= 4 * heads * 1024 * module.BLOCK
    assert largest(2048) <= 2 * largest(1024)


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        (((2, 3, 4), (2, 3, 5), (2, 3, 4)), {}),
        (((2, 3, 4), (2, 3, 4), (2, 2, 4)), {}),
        (((2, 3, 4), (3, 3, 4), (3, 3, 4)), {}),
        (((4,), (3, 4), (3, 4)), {}),
        (((3, 3, 4), (2, 3, 4), (2, 3, 4)), {"enable_gqa": True}),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(3, 3), "is_causal": True}),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(2, 3)}),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(5, 3)}),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(2, 3, 3)}),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(3, 3, dtype=torch.long)}),
        (((3, 4), (3, 4), (3, 4)), {"dropout_p": 1.5}),
    ],
)
def test_bad_arguments_are_refused_as_torch_refuses_them(shapes, settings):
    args = [torch.ones(shape) for shape in shapes]
    for op in (attention, torch_attention):
        with pytest.raises(RuntimeError):
            op(*args, **settings)


def test_what_torch_takes_against_its_own_words_is_refused():
    """Heads that only the fallback kernel repeats, and dimensions that it does not find."""
    with pytest.raises(RuntimeError, match="as many heads"):
        attention(torch.ones(4, 3, 4), torch.ones(2, 3, 4), torch.ones(1, 3, 4), enable_gqa=True)
    with pytest.raises(RuntimeError, match="at least 3 dimensions"):
        attention(*(torch.ones(3, 4) for _ in range(3)), enable_gqa=True)


def test_bad_dtypes_are_refused():
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match="floating-point"):
        attention(x.long(), x.long(), x.long())
    with pytest.raises(RuntimeError, match="one dtype"):
        attention(x, x.double(), x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("settings", [{"is_causal": True, "enable_gqa": True}, {"attn_mask": torch.ones(5, 5).bool()}])
def test_compiles_without_graph_breaks(settings, small_blocks):
    heads = 4 if "enable_gqa" in settings else 2
    args = leaf(2, heads, 5, 8, dtype=torch.float32), *(leaf(2, 2, 5, 8, dtype=torch.float32) for _ in range(2))

    def block(*args):
        return attention(*args, **settings)

    results = [function(*args) for function in (torch.compile(block, fullgraph=True, backend="aot_eager"), block)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), args) for y in results))
