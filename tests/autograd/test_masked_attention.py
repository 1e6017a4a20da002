"""The attention kernels by masks: which keys a query sees, and what is added to its scores."""

from __future__ import annotations

import math

import pytest
import torch
from attention_rounding import check_rounding, kernel_arguments, seen_and_bias, tokens_seen
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.autograd.ops import attention

TORCHS = pytest.mark.cpu("on CUDA the kernels are torch's, with limits and words of their own")


def check(args, mask, scale=0.2):
    seen, bias = seen_and_bias(*args[:2], mask)
    check_rounding(lambda *args: attention(*args, mask, enable_gqa=True, scale=scale), *args, seen, scale, bias)


@given(
    st.tuples(*(st.integers(1, n) for n in (2, 2, 3, 150, 150, 70, 70))),
    st.sampled_from(["boolean", "additive", "keys", "mostly blind", "padding"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_masks_at_any_size(sizes, kind, dtype):
    batch, groups, shared, *rest = sizes
    torch.manual_seed(sum(sizes))
    if kind == "padding":
        rest[1] = rest[0]
    args = kernel_arguments(batch, groups * shared, groups, *rest, dtype)
    queries, keys = rest[:2]
    starts, ends = torch.randint(keys + 1, (2, batch, 1)).sort(0).values  # of one it may be nothing
    places = torch.arange(keys)
    padding = ((places >= starts) & (places < ends)).view(batch, 1, 1, keys)
    mask = {
        "padding": lambda: padding & tokens_seen(queries, keys, causal=True),
        "boolean": lambda: torch.rand(batch, 1, queries, keys) < 0.5,
        "additive": lambda: (
            torch.randn(groups * shared, queries, keys)
            .to(dtype)
            .masked_fill(torch.rand(queries, keys) < 0.3, -math.inf)
        ),
        "keys": lambda: torch.rand(batch, 1, 1, keys) < 0.5,
        "mostly blind": lambda: (torch.rand(queries, 1) < 0.1).expand(queries, keys),
    }[kind]()
    check(args, mask)


# Over several tiles of keys, some of which are not seen at all, some wholly, and some in part.
PATTERNS = {
    "window": lambda query, key: (key <= query) & (key > query - 70),
    "narrow window": lambda query, key: (key <= query) & (key > query - 3),
    "documents": lambda query, key: (key <= query) & (key // 90 == query // 90),
    "first keys of a tile": lambda query, key: key % 64 < 5,
    "every third key": lambda query, key: (key + query) % 3 == 0,
    "few queries": lambda query, key: (query == 70) & (key > 130),
    "the last key": lambda query, key: (key == 203) & (query >= 0),
    "all": lambda query, key: (key >= 0) & (query >= 0),
    "nothing": lambda query, key: (key < 0) & (query >= 0),
}


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.usefixtures("poisoned")
def test_patterns_over_many_tiles(pattern, dtype, additive, backend):
    args = kernel_arguments(1, 4, 2, 197, 204, 24, 40, dtype)
    mask = PATTERNS[pattern](torch.arange(197)[:, None], torch.arange(204))
    if additive:
        mask = torch.randn(197, 204).to(dtype).masked_fill(~mask, -math.inf)
    check(args, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["boolean", "additive"])
@pytest.mark.parametrize(
    "shape",
    [(66, 70), (1, 70), (66, 1), (1, 1), (70,), (1,), (4, 66, 70), (4, 1, 70), (3, 1, 66, 70), (3, 4, 66, 1)],
    ids=str,
)
def test_masks_broadcast(shape, dtype):
    mask = torch.rand(shape) < 0.6 if dtype is torch.bool else torch.randn(shape)
    check(kernel_arguments(3, 4, 2, 66, 70, 16, 16, torch.float32), mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["boolean", "additive"])
def test_masks_of_any_strides(dtype):
    args = kernel_arguments(2, 4, 2, 66, 70, 16, 16, torch.float32)
    whole = torch.rand(141, 4, 66, 2) < 0.6 if dtype is torch.bool else torch.randn(141, 4, 66, 2)
    check(args, whole[1::2].permute(3, 1, 2, 0))  # the keys are apart
    check(args, whole.permute(3, 1, 2, 0).contiguous()[..., 5:75])
    check(args, (whole[:70, 0, 0, 0]).expand(2, 4, 66, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@TORCHS
def test_a_key_is_seen_however_low_its_bias(dtype, backend):
    """Queries for which all are as low as the dtype goes see all alike, which is how transformers fills some masks."""
    args = [x.requires_grad_() for x in kernel_arguments(1, 1, 1, 70, 130, 8, 8, dtype)]
    lowest = torch.finfo(dtype).min
    mask = torch.full((70, 130), lowest, dtype=dtype)
    mask[::2, 100:] = 0
    y = attention(*args, mask)
    mean = args[2][0, 0].double().mean(0).expand(35, -1)
    off = 1e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(y[0, 0, 1::2].double(), mean, atol=off, rtol=0)
    torch.testing.assert_close(y[:, :, ::2], attention(args[0][:, :, ::2], args[1][:, :, 100:], args[2][:, :, 100:]))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), args))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@TORCHS
def test_scores_of_minus_infinity_are_not_taken_for_keys_that_are_unseen(kind, backend):
    """A query that sees nothing gets zeros, and one whose scores are all -infinity NaN, as a softmax of such is."""
    query, key, value = kernel_arguments(1, 1, 1, 3, 70, 1, 4, torch.float32)
    query, key = query.abs(), key.abs()
    key[:, :, 60:] = -math.inf
    mask = torch.zeros(3, 70, dtype=torch.bool)
    mask[0, 65:], mask[1, :] = True, True
    if kind == "additive":
        mask = torch.zeros(3, 70).masked_fill(~mask, -math.inf)
    y = attention(query, key, value, mask)[0, 0]
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    assert torch.equal(y[2], torch.zeros(4))


@pytest.mark.parametrize("kind", ["window", "every third key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("poisoned")  # on a GPU, only deterministic mode gives the same bits again
def test_the_result_does_not_depend_on_threads(kind, dtype, backend):
    args = [x.requires_grad_() for x in kernel_arguments(2, 3, 1, 300, 300, 32, 32, dtype)]
    mask = PATTERNS[kind](torch.arange(300)[:, None], torch.arange(300))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = attention(*args, mask, enable_gqa=True)
        results.append((y, *torch.autograd.grad(y, args, torch.ones_like(y))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_opcheck_of_the_gradient(kind):
    q, k, v = kernel_arguments(2, 4, 2, 7, 7, 8, 8, torch.float32)
    mask = torch.rand(1, 1, 7, 7) < 0.5 if kind == "boolean" else torch.randn(1, 1, 7, 7)
    o, lse = torch.ops.entrenar.masked_attention(q, k, v, mask, 0.3)
    arguments = torch.randn_like(o), q, k, v, o, lse, mask, 0.3
    results = torch.library.opcheck(torch.ops.entrenar.masked_attention_backward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 6, dtype=torch.bool), "mask must be"),
        (torch.ones(2, 1, 6, 6, dtype=torch.bool), r"mask must be \[1, 4, 6, 6\], or 1 in place"),
        (torch.ones(1, 2, 6, 6, dtype=torch.bool), "mask must be"),
        (torch.ones(1, 1, 5, 6, dtype=torch.bool), "mask must be"),
        (torch.ones(1, 1, 6, 1, dtype=torch.bool), "mask must be"),
        (torch.ones(1, 1, 6, 6).bfloat16(), "mask must be boolean or have the dtype of q"),
        (torch.ones(1, 1, 6, 6).int(), "mask must be float32 or bfloat16"),
    ],
)
@TORCHS
def test_the_kernel_refuses_what_it_cannot_read(mask, message):
    q, k, v = kernel_arguments(1, 4, 2, 6, 6, 8, 8, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.entrenar.masked_attention(q, k, v, mask, 0.3)


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.usefixtures("poisoned")
def test_any_byte_but_0_is_true(queries, backend):
    """As where a mask is a view of bytes that were not made by a comparison."""
    args = kernel_arguments(1, 2, 2, queries, 75, 8, 8, torch.float32)
    bytes_ = torch.randint(0, 256, (queries, 75)).to(torch.uint8)
    bytes_[:, ::3] = 0
    bytes_[:, 1] = 128
    assert torch.equal(attention(*args, bytes_.view(torch.bool)), attention(*args, bytes_ != 0))
