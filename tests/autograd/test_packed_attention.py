"""packed_attention against attention of each sequence by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_rounding import check_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.autograd.ops import attention, packed_attention
from entrenar.autograd.ops.packed_attention import packed_attention_reference


def arguments(rows, dtype, heads=4, groups=2, columns=8, value_columns=6):
    sizes = (heads, columns), (groups, columns), (groups, value_columns)
    return [torch.randn(rows, n, width).to(dtype).transpose(0, 1).requires_grad_() for n, width in sizes]


def tokens_seen(offsets, causal):
    token = torch.arange(int(offsets[-1]))
    sequence = torch.bucketize(token, offsets.to(token.device), right=True)
    seen = sequence[:, None] == sequence
    return seen & (token[:, None] >= token) if causal else seen


def by_sequence(offsets, query, key, value, is_causal, scale=None):
    settings = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
    parts = [
        attention(*(x[..., start:stop, :] for x in (query, key, value)), **settings)
        for start, stop in itertools.pairwise(offsets.tolist())
    ]
    return torch.cat(parts, dim=-2)


OFFSETS = {
    "one": [0, 1],
    "one sequence": [0, 70],
    "several": [0, 3, 67, 68, 196, 200],
    "empty ones": [0, 0, 5, 5, 9, 9],
    "whole blocks": [0, 64, 192],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.usefixtures("poisoned")
def test_a_token_sees_its_own_sequence(name, causal, dtype, backend):
    offsets = torch.tensor(OFFSETS[name], device="cpu")
    args = arguments(int(offsets[-1]), dtype)

    def op(*args):
        return packed_attention(*args, offsets, is_causal=causal, scale=0.4)

    check_rounding(op, *args, tokens_seen(offsets, causal), 0.4)


@given(
    st.lists(st.integers(0, 140), min_size=1, max_size=5).filter(sum),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_any_lengths(lengths, groups, shared, causal, dtype):
    torch.manual_seed(sum(lengths))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device="cpu")
    args = arguments(sum(lengths), dtype, groups * shared, groups, 20, 12)

    def op(*args):
        return packed_attention(*args, offsets, is_causal=causal, scale=0.3)

    check_rounding(op, *args, tokens_seen(offsets, causal), 0.3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_attention_of_each_sequence_and_the_reference(dtype, causal, backend):
    offsets = torch.tensor(OFFSETS["several"], device="cpu")
    args = arguments(200, dtype)
    y = packed_attention(*args, offsets, is_causal=causal)
    expected = by_sequence(offsets, *args, causal)
    # Probabilities are rounded to 16 bits, by this much of an average of values; torch's CUDA kernels split keys.
    rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12}.get(dtype, 0) * args[2].abs().max().item()
    if backend == "cuda":
        torch.testing.assert_close(y, expected, atol=max(rounding, 1e-5), rtol=torch.finfo(dtype).eps)
    else:
        alone = torch.arange(200) == 67  # a sequence by itself has a kernel for one query, which rounds otherwise
        assert torch.equal(y[..., ~alone, :], expected[..., ~alone, :])
        torch.testing.assert_close(y, expected, atol=0, rtol=2 * torch.finfo(dtype).eps)
    dy = torch.randn_like(y)
    for actual, wanted in zip(torch.autograd.grad(y, args, dy), torch.autograd.grad(expected, args, dy), strict=True):
        # The partial sums of the keys' gradients depend on how many sequences there are.
        torch.testing.assert_close(actual, wanted)
    expected = packed_attention_reference(*args, offsets, is_causal=causal)
    torch.testing.assert_close(y, expected, atol=max(rounding, 1e-5), rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("columns", "scale"), [(1, None), (8, 0.3)])
def test_scale_is_taken_with_and_without_a_kernel(columns, scale, dtype):
    offsets = torch.tensor([0, 4, 9], device="cpu")
    args = arguments(9, dtype, columns=columns)
    y = packed_attention(*args, offsets, scale=scale)
    torch.testing.assert_close(y, by_sequence(offsets, *args, True, scale))


def test_a_leading_dimension_of_one_stays():
    offsets = torch.tensor([0, 4, 9], device="cpu")
    args = arguments(9, torch.float32)
    y = packed_attention(*(x.unsqueeze(0) for x in args), offsets)
    assert torch.equal(y, packed_attention(*args, offsets).unsqueeze(0))


def test_derivatives_are_those_of_finite_differences():
    offsets = torch.tensor([0, 2, 2, 5], device="cpu")
    args = arguments(5, torch.float64, columns=3, value_columns=2)

    def op(*args):
        return packed_attention(*args, offsets)

    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def test_second_derivative_through_the_kernel():
    offsets = torch.tensor([0, 2, 2, 7], device="cpu")
    args = arguments(7, torch.float32)

    def second(op, args):
        y = op(*args, offsets)
        gradients = torch.autograd.grad(y.square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), args)

    wide = [x.detach().double().requires_grad_() for x in args]
    expected = second(packed_attention_reference, wide)
    for actual, wanted in zip(second(packed_attention, args), expected, strict=True):
        torch.testing.assert_close(actual, wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("poisoned")  # on a GPU, only deterministic mode gives the same bits again
def test_does_not_depend_on_threads(dtype, backend):
    offsets = torch.tensor(OFFSETS["several"], device="cpu")
    args = arguments(200, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = packed_attention(*args, offsets)
        results.append((y, *torch.autograd.grad(y, args, torch.ones_like(y))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_computes_in_its_dtype():
    offsets = torch.tensor([0, 4, 9], device="cpu")
    args = arguments(9, torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = packed_attention(*args, offsets)
    assert torch.equal(y, packed_attention(*(x.bfloat16() for x in args), offsets))


def test_under_vmap():
    offsets = torch.tensor([0, 4, 9], device="cpu")
    args = [torch.randn(3, 4, 9, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)]
    mapped = torch.func.vmap(lambda *args: packed_attention(*args, offsets))(*args)
    expected = [packed_attention(*(x[i] for x in args), offsets) for i in range(3)]
    torch.testing.assert_close(mapped, torch.stack(expected))
    with pytest.raises(NotImplementedError, match="offsets of packed sequences must be the same"):
        torch.func.vmap(packed_attention)(*args, offsets.expand(3, -1))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks():
    offsets = torch.tensor([0, 4, 9], device="cpu")
    args = arguments(9, torch.float32)

    def block(*args):
        return packed_attention(*args, offsets)

    results = [function(*args) for function in (torch.compile(block, fullgraph=True, backend="aot_eager"), block)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), args) for y in results))


SHAPES = (2, 9, 8), (1, 9, 8), (1, 9, 8)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((9, 8), (9, 8), (9, 8)), "must be \\[heads, N, columns\\]"),
        (((2, 2, 9, 8), (2, 1, 9, 8), (2, 1, 9, 8)), "must be \\[heads, N, columns\\]"),
        (((1, 2, 9, 8), (1, 9, 8), (1, 9, 8)), "must be \\[heads, N, columns\\]"),
        (
            ((2, 9, 7), (1, 9, 8), (1, 9, 8)),
            "as many columns.*: query \\(2, 9, 7\\) .*, key \\(1, 9, 8\\) .*, value \\(1, 9, 8\\) torch.float32 on",
        ),
        (((2, 8, 8), (1, 9, 8), (1, 9, 8)), "as many rows"),
        (((3, 9, 8), (2, 9, 8), (2, 9, 8)), "a multiple of them"),
        (((2, 9, 8), (1, 9, 8), (2, 9, 8)), "as many heads"),
    ],
)
def test_shapes_that_do_not_match_are_refused(shapes, message):
    with pytest.raises(RuntimeError, match=message):
        packed_attention(*map(torch.randn, shapes), torch.tensor([0, 9], device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "offsets",
    [
        torch.tensor([0, 8]),
        torch.tensor([1, 9]),
        torch.tensor([0, 6, 5, 9]),
        torch.tensor([0, 10, 9]),
        torch.tensor([0, 9], dtype=torch.int32),
        torch.tensor([[0, 9]]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([9]),
    ],
)
def test_offsets_that_do_not_fit_are_refused(offsets, dtype):
    with pytest.raises(RuntimeError, match="offsets must"):
        packed_attention(*(torch.randn(shape, dtype=dtype) for shape in SHAPES), offsets)


def test_bad_dtypes_are_refused():
    offsets, x = torch.tensor([0, 9], device="cpu"), torch.ones(1, 9, 8)
    with pytest.raises(TypeError, match="floating-point"):
        packed_attention(x.long(), x.long(), x.long(), offsets)
    with pytest.raises(RuntimeError, match="one dtype"):
        packed_attention(x, x.double(), x, offsets)
    with pytest.raises(TypeError, match="does not take complex"):
        packed_attention(x.cfloat(), x.cfloat(), x.cfloat(), offsets)


def test_result_that_leads_nowhere_has_no_gradient():
    args = arguments(9, torch.float32)
    y = torch._C._functions.UndefinedGrad()(packed_attention(*args, torch.tensor([0, 4, 9], device="cpu")))
    assert torch.autograd.grad(y.sum(), args, allow_unused=True) == (None, None, None)
