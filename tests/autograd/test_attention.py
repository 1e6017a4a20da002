"""Attention against torch's, against float64, and its memory."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from attention_rounding import check_rounding, kernel_arguments, seen_and_bias, tokens_seen
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
from entrenar.autograd.ops._attention_kernel import has_kernel, takes_mask

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


def check_sample(sample, factor):
    """Against float64; where the kernel rounds inside of sums, which it does for bfloat16, by those roundings."""
    (key, value, *rest), settings = sample.args, dict(sample.kwargs)
    mask = rest[0] if rest else settings.pop("attn_mask", None)
    gqa, causal = settings.get("enable_gqa", False), settings.get("is_causal", False)
    by_kernel = has_kernel(sample.input, key, value, gqa, causal) and (mask is None or takes_mask(sample.input, mask))
    if sample.input.dtype is not torch.bfloat16 or not by_kernel:
        return check_against_float64(attention, torch_attention, sample, factor)
    scale = settings.get("scale") or 1 / math.sqrt(sample.input.shape[-1])
    seen, bias = seen_and_bias(sample.input, key, mask, causal)
    return check_rounding(lambda *args: attention(*args, mask, **settings), sample.input, key, value, seen, scale, bias)


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
        check_sample(sample, factor)


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
            mask = torch.rand(shape) < 0.7 if kind == "boolean" else tensor(*shape)
            # The gradient of one that is the same for all keys is zero, of which there would be roundings to compare.
            settings["attn_mask"] = mask if shape[-1] > 1 else mask.detach()
    if not any(t.requires_grad for t in (query, key, value)):
        query.requires_grad_()
    return SampleInput(query, args=(key, value), kwargs=settings)


@given(calls())
@settings(max_examples=150, deadline=None)
def test_any_shape(sample):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 3)
        check_sample(sample, factor=4)


def test_what_has_a_kernel():
    wide, narrow = torch.randn(4, 6, 8), torch.randn(2, 5, 8)
    causal_in_16_bits = [x.bfloat16() for x in (wide, narrow, narrow)]
    assert has_kernel(wide, narrow, narrow, enable_gqa=True, is_causal=False)
    if wide.is_cpu:
        assert has_kernel(*causal_in_16_bits, enable_gqa=True, is_causal=True)
    else:
        assert not has_kernel(*causal_in_16_bits, enable_gqa=True, is_causal=True)
    assert not has_kernel(wide, narrow, narrow, enable_gqa=False, is_causal=False)
    assert not has_kernel(*(x.double() for x in (wide, narrow, narrow)), enable_gqa=True, is_causal=False)
    assert not has_kernel(*(x.to("meta") for x in (wide, narrow, narrow)), enable_gqa=True, is_causal=False)
    for columns, has in ((256, True), (257, False)):
        x = torch.randn(2, 5, columns)
        assert has_kernel(x, x, narrow, enable_gqa=False, is_causal=False) is has
        assert has_kernel(narrow, narrow, x, enable_gqa=False, is_causal=False) is has


@pytest.mark.parametrize("larger", [0, 1, 2])
def test_leading_dimensions_are_broadcast(larger):
    args = [leaf(*((2, 3) if i == larger else (3,)), 5, 4) for i in range(3)]
    y, expected = attention(*args), torch_attention(*args)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, args, dy), torch.autograd.grad(expected, args, dy))


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
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
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


# Where there is a kernel, which keeps its output too, no matrix of scores can exist.
NO_KERNEL_ON_CPU = pytest.mark.cpu("CUDA has a kernel for float16")


@pytest.mark.parametrize(
    "kind",
    [
        *(
            pytest.param(kind, marks=NO_KERNEL_ON_CPU)
            for kind in ("plain", "causal", "grouped", "keys masked", "all masked")
        ),
        *("additive", "dropout"),
    ],
)
def test_no_square_matrix_is_kept_or_made(kind):
    heads = 2

    def largest(length):
        args = [leaf(heads, length, 4, dtype=torch.float16) for _ in range(3)]
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


@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"enable_gqa": True}])
def test_the_kernel_keeps_its_output_and_one_number_for_each_query(settings):
    args = [leaf(2, 1024, 4, dtype=torch.float32) for _ in range(3)]
    kept = []
    with LargestAllocation(args) as mode:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = attention(*args, **settings)
        torch.autograd.grad(y.sum(), args)
    given = {t.untyped_storage().data_ptr() for t in args}
    own = {t.untyped_storage().data_ptr(): t.numel() for t in kept if t.untyped_storage().data_ptr() not in given}
    assert sorted(own.values()) == [2 * 1024, y.numel()]
    assert mode.largest == args[0].untyped_storage().nbytes()


KERNEL_SIZES = {
    # batch, heads, heads of keys, queries, keys, columns, columns of values
    "one": (1, 1, 1, 1, 1, 1, 1),
    "a block": (2, 2, 2, 64, 64, 64, 64),
    "shared heads": (2, 6, 2, 70, 70, 64, 64),
    "odd": (1, 3, 3, 131, 131, 33, 17),
    "more keys": (2, 4, 1, 63, 200, 80, 72),
    "more queries": (1, 2, 1, 200, 65, 32, 96),
    "few of both": (1, 2, 2, 5, 7, 6, 100),
    "widest": (1, 1, 1, 66, 67, 256, 256),
    "one query": (3, 2, 1, 1, 129, 64, 64),
    "no columns": (1, 2, 1, 3, 5, 0, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("size", KERNEL_SIZES)
@pytest.mark.usefixtures("poisoned")
def test_kernel_is_as_near_to_float64_as_its_roundings_allow(size, causal, dtype, backend):
    args = kernel_arguments(*KERNEL_SIZES[size], dtype)
    seen = tokens_seen(args[0].shape[-2], args[1].shape[-2], causal)
    scale = 1 / math.sqrt(max(args[0].shape[-1], 1))
    check_rounding(lambda *args: attention(*args, is_causal=causal, enable_gqa=True), *args, seen, scale)


@given(
    st.tuples(*(st.integers(1, n) for n in (2, 2, 3, 150, 150, 70, 70))),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_kernel_at_any_size(sizes, causal, contiguous, dtype):
    batch, groups, shared, *rest = sizes
    torch.manual_seed(sum(sizes))
    args = kernel_arguments(batch, groups * shared, groups, *rest, dtype)
    if contiguous:
        args = [x.contiguous() for x in args]
    seen = tokens_seen(*rest[:2], causal)
    check_rounding(lambda *args: attention(*args, is_causal=causal, enable_gqa=True, scale=0.2), *args, seen, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(4, 3, 1, 300, 300, 64, 64), (1, 1, 1, 500, 500, 40, 40)])
@pytest.mark.usefixtures("poisoned")  # on a GPU, only deterministic mode gives the same bits again
def test_kernel_does_not_depend_on_threads(sizes, dtype, backend):
    args = [x.requires_grad_() for x in kernel_arguments(*sizes, dtype)]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = attention(*args, is_causal=True, enable_gqa=True)
        results.append((y, *torch.autograd.grad(y, args, torch.ones_like(y))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_kernel_needs_no_copy_between_projections():
    args, read = kernel_arguments(2, 4, 2, 5, 5, 8, 8, torch.float32), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "entrenar":
                read.extend(x.data_ptr() for x in args[:3])
            return func(*args, **(kwargs or {}))

    with Record():
        y = attention(*args, enable_gqa=True)
    assert read == [x.data_ptr() for x in args]
    assert y.transpose(1, 2).reshape(2, 5, -1).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_not_finite_stays_with_those_who_see_it(bad, dtype, backend):
    query, key, value = kernel_arguments(1, 1, 1, 140, 140, 16, 16, dtype)
    key[0, 0, 130] = bad
    y = attention(query, key, value, is_causal=True)
    seen = y[0, 0, 130:].isfinite().all(-1)
    assert y[0, 0, :130].isfinite().all()
    # A score of -infinity is no more than a key that is not seen.
    expected = torch_attention(query.double(), key.double(), value.double(), is_causal=True)[0, 0, 130:]
    assert torch.equal(seen, expected.isfinite().all(-1))


@pytest.mark.parametrize("causal", [False, True])
def test_scores_far_apart_neither_overflow_nor_vanish(causal, backend):
    query, key, value = kernel_arguments(1, 1, 1, 130, 130, 16, 16, torch.float32)
    key = key * torch.linspace(-300, 300, 130)[:, None]
    y = attention(query, key, value, is_causal=causal)
    expected = torch_attention(query.double(), key.double(), value.double(), is_causal=causal)
    # A score of 5000 is off by some of its units of 2^-11, and so is the logarithm of its probability.
    torch.testing.assert_close(y.double(), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("scale", [0.25, -0.25], ids=["rising", "falling"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scores_that_change_from_tile_to_tile(dtype, causal, scale, backend):
    """By 60 a tile of 64 keys, and with each query by more, so that only some are summed anew at a time."""
    query, key, value = kernel_arguments(1, 1, 1, 330, 330, 8, 80, dtype)
    key[..., 0], query[..., 0] = 4 * torch.arange(330) / 64, torch.linspace(0, 60, 330)
    seen = tokens_seen(330, 330, causal)
    check_rounding(lambda *args: attention(*args, is_causal=causal, scale=scale), query, key, value, seen, scale)


@pytest.mark.parametrize(("queries", "keys"), [(0, 70), (70, 0), (0, 0)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_with_nothing_to_attend(queries, keys, backend):
    args = [x.requires_grad_() for x in kernel_arguments(2, 2, 1, queries, keys, 8, 4, torch.bfloat16)]
    y = attention(*args, enable_gqa=True)
    assert y.shape == (2, 2, queries, 4)
    assert not y.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(y, args, torch.ones_like(y)))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
def test_kernel_takes_any_number_of_leading_dimensions(lead):
    query, key = torch.randn(*lead, 5, 6), torch.randn(*lead, 6, 7).mT  # the columns of key are apart
    value = torch.randn(*lead, 7, 9)[..., 1:]
    check_rounding(attention, query, key, value, torch.ones(5, 7, dtype=torch.bool), 1 / math.sqrt(6))


def test_second_derivative_through_the_kernel():
    args = [x.requires_grad_() for x in kernel_arguments(1, 2, 1, 7, 7, 4, 4, torch.float32)]

    def second(op, args):
        y = op(*args, is_causal=True, enable_gqa=True)
        gradients = torch.autograd.grad(y.square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), args)

    wide = [x.detach().double().requires_grad_() for x in args]
    for actual, expected in zip(second(attention, args), second(torch_attention, wide), strict=True):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


def test_kernel_under_vmap():
    args = [torch.randn(3, 2, 2, 9, 8), torch.randn(2, 3, 1, 9, 8), torch.randn(2, 1, 9, 8)]
    in_dims = (0, 1, None)

    def attend(*args):
        return attention(*args, is_causal=True, enable_gqa=True)

    def gradients(*args):
        return torch.func.grad(lambda *args: attend(*args).sin().sum(), (0, 1, 2))(*args)

    for function in (attend, gradients):
        mapped = torch.func.vmap(function, in_dims)(*args)
        singles = [function(args[0][i], args[1][:, i], args[2]) for i in range(3)]
        expected = torch.stack(singles) if function is attend else tuple(map(torch.stack, zip(*singles, strict=True)))
        torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_kernels_backward_under_vmap(masked):
    args = [torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3)]
    y = attention(*args, torch.rand(9, 9) < 0.7 if masked else None)
    dys = torch.randn(3, *y.shape)
    mapped = torch.func.vmap(lambda dy: torch.autograd.grad(y, args, dy, retain_graph=True))(dys)
    for i, dy in enumerate(dys):
        for a, b in zip(mapped, torch.autograd.grad(y, args, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def valid(**changed):
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 5)
    return {"q": q, "k": k, "v": v, "offsets": None, "scale": 0.5, "causal": True, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.randn(4, 6, 8)}, "four dimensions"),
        ({"q": torch.randn(1, 4, 6, 8).double()}, "q must be float32 or bfloat16"),
        ({"k": torch.randn(1, 2, 6, 8).bfloat16()}, "k must have the dtype of q"),
        ({"q": torch.randn(1, 3, 6, 8)}, "a multiple of the heads"),
        ({"k": torch.randn(1, 2, 6, 7)}, "k must be"),
        ({"v": torch.randn(1, 2, 7, 5)}, "v must be"),
        ({"v": torch.randn(1, 2, 6, 257)}, "up to 256 columns"),
        ({"q": torch.randn(1, 4, 8, 6).mT}, "contiguous columns"),
        ({"offsets": torch.tensor([0, 6]).int()}, "vector of int64"),
        ({"offsets": torch.tensor([0, 5])}, "begin with 0 and end"),
        ({"offsets": torch.tensor([0, 7, 6])}, "must not decrease"),
        ({"offsets": torch.tensor([0, -1, 6])}, "must not decrease"),
    ],
)
@pytest.mark.cpu("on CUDA the kernels are torch's, with limits and words of their own")
def test_the_kernel_refuses_what_it_cannot_read(changed, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.entrenar.attention(**valid(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d_o": torch.randn(1, 4, 6, 4)}, "d_o must be"),
        ({"o": torch.randn(1, 4, 5, 5)}, "o must be"),
        ({"lse": torch.randn(1, 4, 5)}, "lse must be"),
        ({"lse": torch.randn(1, 4, 6).double()}, "lse must be"),
    ],
)
def test_the_kernels_backward_refuses_what_it_cannot_read(changed, message):
    arguments = {"d_o": torch.randn(1, 4, 6, 5), "o": torch.randn(1, 4, 6, 5), "lse": torch.randn(1, 4, 6)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.entrenar.attention_backward(**{**valid(), **arguments, **changed})


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (
            ((2, 3, 4), (2, 3, 5), (2, 3, 4)),
            {},
            r"as many columns.*: query \(2, 3, 4\) torch.float32 on [\w:]+, key \(2, 3, 5\) torch.float32 on [\w:]+, "
            r"value \(2, 3, 4\) torch.float32 on [\w:]+$",
        ),
        (((2, 3, 4), (2, 3, 4), (2, 2, 4)), {}, "key and value as many rows"),
        (((2, 3, 4), (3, 3, 4), (3, 3, 4)), {}, "broadcast"),
        (((4,), (3, 4), (3, 4)), {}, "at least 2 dimensions"),
        (((3, 3, 4), (2, 3, 4), (2, 3, 4)), {"enable_gqa": True}, "a multiple of them, in dimension -3"),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(3, 3), "is_causal": True}, "exclude each other"),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(2, 3)}, "expanded size"),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(5, 3)}, "expanded size"),
        (((3, 4), (3, 4), (3, 4)), {"attn_mask": torch.ones(2, 3, 3)}, "number of sizes"),
        (
            ((3, 4), (3, 4), (3, 4)),
            {"attn_mask": torch.ones(3, 3, dtype=torch.long)},
            "must be of torch.bool, torch.float32 or torch.float32, not torch.int64",
        ),
        (((3, 4), (3, 4), (3, 4)), {"dropout_p": 1.5}, "between 0 and 1, not 1.5"),
    ],
)
def test_bad_arguments_are_refused_as_torch_refuses_them(shapes, settings, message):
    args = [torch.ones(shape) for shape in shapes]
    with pytest.raises(RuntimeError, match=message):
        attention(*args, **settings)
    with pytest.raises(RuntimeError):
        torch_attention(*args, **settings)


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
@pytest.mark.parametrize("kernel", [True, False])
def test_compiles_without_graph_breaks(kernel, small_blocks):
    settings = {"is_causal": True, "enable_gqa": True} if kernel else {"attn_mask": torch.ones(5, 5).bool()}
    heads = 4 if kernel else 2
    args = leaf(2, heads, 5, 8, dtype=torch.float32), *(leaf(2, 2, 5, 8, dtype=torch.float32) for _ in range(2))

    def block(*args):
        return attention(*args, **settings)

    results = [function(*args) for function in (torch.compile(block, fullgraph=True, backend="aot_eager"), block)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), args) for y in results))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_masked_attention_of_shared_keys_compiles():
    """Inductor puts torch's attention in the place of what it takes for one, which has a key for each query's head."""
    q, k, mask = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 12, 8), torch.rand(1, 1, 1, 12) > 0.3

    def attend(q, k, mask):
        return attention(q, k, k, mask, enable_gqa=True)

    torch.testing.assert_close(torch.compile(attend)(q, k, mask), attend(q, k, mask))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)], ids=str)
def test_the_gradient_of_an_empty_sum(shape, backend):
    args = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    attention(*args).sum().backward()
    assert all(x.grad.shape == shape for x in args)
