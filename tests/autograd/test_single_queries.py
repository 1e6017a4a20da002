"""Attention of one query, as when text is generated: keys and values are read once, as they lie in memory."""

from __future__ import annotations

import math

import pytest
import torch
from attention_rounding import check_rounding, kernel_arguments, seen_and_bias
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from entrenar.autograd.ops import attention, packed_attention

MASKS = {
    "none": lambda heads, keys, dtype: None,
    "padding": lambda heads, keys, dtype: torch.arange(keys) >= keys // 3,
    "boolean": lambda heads, keys, dtype: torch.rand(2, heads, 1, keys) < 0.5,
    "additive": lambda heads, keys, dtype: (
        torch.randn(heads, 1, keys).to(dtype).masked_fill(torch.rand(heads, 1, keys) < 0.3, -math.inf)
    ),
    "nothing": lambda heads, keys, dtype: (torch.arange(heads) > 0)[:, None, None].expand(heads, 1, keys),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def check(args, mask, scale=0.2):
    seen, bias = seen_and_bias(*args[:2], mask)
    check_rounding(lambda *args: attention(*args, mask, enable_gqa=True, scale=scale), *args, seen, scale, bias)


@given(
    st.tuples(*(st.integers(1, n) for n in (3, 7, 300, 90, 90))),
    st.sampled_from(sorted(MASKS)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_any_size(sizes, kind, dtype):
    groups, shared, keys, columns, value_columns = sizes
    torch.manual_seed(sum(sizes))
    args = kernel_arguments(2, groups * shared, groups, 1, keys, columns, value_columns, dtype)
    check(args, MASKS[kind](groups * shared, keys, dtype))


@DTYPES
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("columns", [1, 24, 64, 200, 256])
@pytest.mark.usefixtures("poisoned")
def test_columns(columns, kind, dtype, backend):
    args = kernel_arguments(2, 10, 2, 1, 131, columns, columns, dtype)
    check(args, MASKS[kind](10, 131, dtype))


@DTYPES
def test_a_cache_of_keys_is_read_where_it_is(dtype, backend):
    """Keys and values are the first rows of larger tensors, and rows of other heads lie between them."""
    query = torch.randn(2, 6, 1, 40).to(dtype)
    cache = torch.randn(2, 3, 400, 100).to(dtype)
    check([query, cache[:, :, :70, 20:60], cache[:, :, 200:270, 60:]], None)


@DTYPES
@pytest.mark.usefixtures("poisoned")  # on a GPU, only deterministic mode gives the same bits again
def test_neither_threads_nor_other_heads_change_a_bit(dtype, backend):
    args = kernel_arguments(1, 12, 2, 1, 300, 72, 72, dtype)
    mask = torch.rand(300) < 0.8
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):  # three take a head each at a time
        torch.set_num_threads(threads)
        results.append(attention(*args, mask, enable_gqa=True))
    torch.set_num_threads(before)
    q, k, v = args
    alone = [attention(q[:, i : i + 1], k[:, i // 6 : i // 6 + 1], v[:, i // 6 : i // 6 + 1], mask) for i in range(12)]
    for other in (*results[1:], torch.cat(alone, 1)):
        assert torch.equal(results[0], other)


def test_a_causal_query_sees_the_first_key(backend):
    query, key, value = kernel_arguments(2, 4, 2, 1, 70, 16, 16, torch.float32)
    expected = value[:, :, :1].repeat_interleave(2, 1)
    assert torch.equal(attention(query, key, value, is_causal=True, enable_gqa=True), expected)


@pytest.mark.cpu("on CUDA the kernels are torch's, with limits of their own")
def test_scores_that_are_not_finite(backend):
    query, key, value = kernel_arguments(1, 1, 1, 1, 70, 1, 4, torch.float32)
    query, key = query.abs() + 1, key.abs() + 1
    for bad, at in ((math.inf, 3), (math.nan, 69), (-math.inf, slice(None))):
        some = key.clone()
        some[0, 0, at] = bad
        assert attention(query, some, value).isnan().all()
    key[0, 0, 3] = -math.inf  # no more than a key that is not seen
    torch.testing.assert_close(attention(query, key, value), torch_attention(query, key, value))
    unseen = torch.arange(70) < 60
    key[:, :, 60:] = -math.inf
    assert attention(query, key, value, ~unseen).isnan().all()  # sees keys, with scores of -infinity
    assert attention(query, key, value, unseen).isfinite().all()


@DTYPES
def test_scores_far_apart(dtype, backend):
    query, key, value = kernel_arguments(1, 2, 1, 1, 130, 16, 16, dtype)
    key = key * torch.linspace(-300, 300, 130)[:, None].to(dtype)
    y = attention(query, key, value, enable_gqa=True)
    expected = torch_attention(query.double(), key.double(), value.double(), enable_gqa=True)
    # A score of 5000 is off by some of its units of 2^-11, and so is the logarithm of its probability.
    torch.testing.assert_close(y.double(), expected, atol=5e-3 if dtype is torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_no_heads_have_no_output(groups, backend):
    query, key, value = torch.randn(2, 0, 1, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 4)
    assert attention(query, key, value, enable_gqa=True).shape == (2, 0, 1, 4)


def test_one_packed_query_between_sequences_of_nothing(backend):
    query, key, value = (torch.randn(2, 1, 8) for _ in range(3))
    y = packed_attention(query, key, value, torch.tensor([0, 0, 1, 1]), is_causal=False)
    torch.testing.assert_close(y, value)
