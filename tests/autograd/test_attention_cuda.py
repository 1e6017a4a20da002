"""What the attention ops on CUDA hand to torch's kernels: checked on the CPU, with stand-ins for those kernels.

The stand-ins compute by the formulas, in the layouts and with the conventions of the kernels, and refuse what these do
not take. The results must be those of the CPU's kernels.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from entrenar.autograd.ops import _attention_cuda as cuda


def seen(queries, keys, causal, top_left):
    if not causal:
        return torch.ones(queries, keys, dtype=torch.bool)
    return torch.ones(queries, keys, dtype=torch.bool).tril(0 if top_left else keys - queries)


def probabilities(q, k, scale, mask, bias, lse=None):
    """P [B, H, T, S] and its logarithms, of q [B, T, H, C] and k [B, S, H, C]."""
    scores = (scale * torch.einsum("bthc,bshc->bhts", q.double(), k.double())).masked_fill(~mask, -math.inf)
    scores = scores if bias is None else scores + bias.double()
    lse = scores.logsumexp(-1) if lse is None else lse.double()
    return (scores - lse.unsqueeze(-1)).exp(), lse


def forward_of(q, k, v, scale, mask, bias=None):
    p, lse = probabilities(q, k, scale, mask, bias)
    return torch.einsum("bhts,bshc->bthc", p, v.double()).to(q.dtype), lse.float()


def backward_of(d_o, q, k, v, o, lse, scale, mask, bias=None):
    p, _ = probabilities(q, k, scale, mask, bias, lse)
    dy = d_o.double()
    dp = torch.einsum("bthc,bshc->bhts", dy, v.double())
    delta = (dy * o.double()).sum(-1).transpose(1, 2)
    ds = scale * p * (dp - delta.unsqueeze(-1))
    dq, dk = torch.einsum("bhts,bshc->bthc", ds, k.double()), torch.einsum("bhts,bthc->bshc", ds, q.double())
    return tuple(d.to(q.dtype) for d in (dq, dk, torch.einsum("bhts,bthc->bshc", p, dy)))


def share(x, heads):
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def check_memory(*tensors):
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert all(s * x.element_size() % 16 == 0 for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1)


def check_flash(q, k, v, *others, scale):
    assert scale > 0
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert all(x.dtype is q.dtype for x in (k, v, *others))
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    assert 0 not in (*q.shape, *k.shape)
    assert q.shape[-2] % k.shape[-2] == 0
    check_memory(q, k, v, *others)


def cut(starts, starts_k, longest, longest_k, *tensors):
    """The rows of each sequence, as a batch of one, of tensors whose rows come first."""
    assert starts.dtype is starts_k.dtype is torch.int32
    assert torch.equal(starts, starts_k)
    assert longest == longest_k
    at = starts.tolist()
    assert longest == max(stop - start for start, stop in itertools.pairwise(at))
    return [[x[start:stop].unsqueeze(0) for x in tensors] for start, stop in itertools.pairwise(at)]


def flash_forward(q, k, v, starts_q, starts_k, max_q, max_k, dropout_p, causal, debug, *, scale):
    check_flash(q, k, v, scale=scale)
    assert (dropout_p, debug) == (0.0, False)
    nothing = torch.empty(0)
    if starts_q is None:
        assert (starts_k, max_q, max_k) == (None, q.shape[1], k.shape[1])
        k, v = (share(x, q.shape[2]) for x in (k, v))
        o, lse = forward_of(q, k, v, scale, seen(max_q, max_k, causal, top_left=False))
        return torch.empty_like(q).copy_(o), lse, nothing, nothing, nothing
    parts = [
        flash_forward(*rows, None, None, rows[0].shape[1], rows[0].shape[1], 0.0, causal, False, scale=scale)[:2]
        for rows in cut(starts_q, starts_k, max_q, max_k, q, k, v)
        if rows[0].numel()
    ]
    return torch.cat([o[0] for o, _ in parts]), torch.cat([x[0] for _, x in parts], -1), nothing, nothing, nothing


def flash_backward(d_o, q, k, v, o, lse, starts_q, starts_k, max_q, max_k, dropout_p, causal, state, unused, *, scale):
    check_flash(q, k, v, d_o, o, scale=scale)
    assert lse.dtype is torch.float32
    assert lse.is_contiguous()
    assert dropout_p == 0.0
    if starts_q is None:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert (starts_k, max_q, max_k) == (None, q.shape[1], k.shape[1])
        heads, groups = q.shape[2], k.shape[2]
        k, v = (share(x, heads) for x in (k, v))
        dq, *rest = backward_of(d_o, q, k, v, o, lse, scale, seen(max_q, max_k, causal, top_left=False))
        return dq, *(d.unflatten(2, (groups, -1)).sum(3) for d in rest)
    assert lse.shape == (q.shape[1], q.shape[0])
    parts = []
    for *rows, logarithms in cut(starts_q, starts_k, max_q, max_k, d_o, q, k, v, o, lse.T):
        length = rows[0].shape[1]
        if length:
            where = (None, None, length, length)
            logarithms = logarithms.mT.contiguous()
            parts.append(flash_backward(*rows, logarithms, *where, 0.0, causal, state, unused, scale=scale))
    return tuple(torch.cat([d[0] for d in gradients]) for gradients in zip(*parts, strict=True))


def check_efficient(q, k, v, bias, *others, scale):
    assert scale > 0
    assert all(x.dtype is q.dtype for x in (k, v, *others))
    if bias is None:
        assert q.dtype is torch.float32  # else flash attention is faster
    else:
        assert bias.dtype is q.dtype
        assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert bias.stride(-1) == 1
        assert all(stride % 16 == 0 for stride in bias.stride()[:-1])
    assert q.shape[2] == k.shape[2] == v.shape[2]
    check_memory(q, k, v, *others)


def efficient_forward(q, k, v, bias, starts_q, starts_k, max_q, max_k, dropout_p, mask, with_lse, *, scale):
    check_efficient(q, k, v, bias, scale=scale)
    assert (starts_q, starts_k, max_q, max_k, dropout_p, with_lse) == (None, None, None, None, 0.0, True)
    o, lse = forward_of(q, k, v, scale, seen(q.shape[1], k.shape[1], mask == 1, top_left=True), bias)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    return o, padded, torch.tensor(0), torch.tensor(0), q.shape[1], k.shape[1]


def efficient_backward(
    d_o, q, k, v, bias, o, starts_q, starts_k, max_q, max_k, lse, dropout_p, seed, offset, mask, bias_grad, *, scale
):
    check_efficient(q, k, v, bias, d_o, o, scale=scale)
    assert o.is_contiguous()
    assert (starts_q, starts_k, max_q, max_k) == (None, None, q.shape[1], k.shape[1])
    assert (dropout_p, bias_grad) == (0.0, False)
    rows = q.shape[1]
    assert lse.shape == (q.shape[0], q.shape[2], math.ceil(rows / 32) * 32)
    assert lse[..., rows:].isposinf().all()
    visible = seen(rows, k.shape[1], mask == 1, top_left=True)
    result = backward_of(d_o, q, k, v, o, lse[..., :rows], scale, visible, bias)
    return *result, torch.empty(0)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient_forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", efficient_backward)


def projections(batch, heads, groups, queries, keys, columns, value_columns):
    sizes = (heads, queries, columns), (groups, keys, columns), (groups, keys, value_columns)
    return [torch.randn(batch, rows, n, width).transpose(1, 2) for n, rows, width in sizes]


def misaligned(x):
    """The same values one element further in memory, in rows of an odd length."""
    return torch.cat([torch.zeros_like(x[..., :1]), x], -1)[..., 1:]


LAYOUTS = {
    "projections": lambda x: x,
    "contiguous": torch.Tensor.contiguous,
    "misaligned": misaligned,
    "expanded": lambda x: x[:1].expand_as(x),
}
SIZES = {
    # batch, heads, heads of keys, queries, keys, columns, columns of values
    "a block": (2, 2, 2, 64, 64, 64, 64),
    "shared heads": (2, 6, 2, 35, 35, 64, 64),
    "odd": (1, 3, 3, 33, 33, 33, 17),
    "more keys": (2, 4, 1, 31, 50, 16, 24),
    "more queries": (2, 4, 2, 50, 31, 16, 16),
    "one query": (3, 2, 1, 1, 29, 64, 64),
    "no columns": (1, 2, 1, 3, 5, 0, 4),
    "no queries": (1, 2, 1, 0, 5, 8, 8),
    "no keys": (2, 2, 1, 3, 0, 8, 8),
    "no batch": (0, 2, 1, 3, 5, 8, 8),
    "no heads": (1, 0, 0, 3, 5, 8, 8),
    "no values": (1, 2, 1, 3, 5, 8, 0),
}


def check_against_the_cpu(args, offsets, causal, dtype, scale=0.3):
    """Results and their strides, which the fakes promise."""
    args = [x.to(dtype) if x.stride(-1) == 1 or x.numel() == 0 else x.to(dtype).contiguous() for x in args]
    wide = [x.float() for x in args]
    o, lse = cuda.attention(*args, offsets, scale, causal)
    expected, expected_lse = torch.ops.entrenar.attention(*wide, offsets, scale, causal)
    # The results are rounded once to their dtype; the CPU's sums are float32's.
    tolerance = {"atol": 1e-5, "rtol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(o.float(), expected, **tolerance)
    torch.testing.assert_close(lse, expected_lse)
    d_o = torch.randn_like(expected).to(dtype)
    gradients = cuda.attention_backward(d_o, *args, o, lse, offsets, scale, causal)
    wanted = torch.ops.entrenar.attention_backward(d_o.float(), *wide, o.float(), lse, offsets, scale, causal)
    for actual, want in zip(gradients, wanted, strict=True):
        # Heads that share keys are summed after they were rounded.
        atol = 4 * torch.finfo(dtype).eps * want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(actual.float(), want, atol=max(atol, 1e-4), rtol=0)
    for actual, like in zip((o, lse, *gradients), (expected, expected_lse, *wanted), strict=True):
        assert actual.dtype is (torch.float32 if actual is lse else dtype)
        assert actual.shape == like.shape
        strides = zip(actual.shape, actual.stride(), like.stride(), strict=True)
        assert all(ours == theirs for size, ours, theirs in strides if size > 1) or actual.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_cpus_kernels(size, layout, causal, dtype):
    args = [LAYOUTS[layout](x) for x in projections(*SIZES[size])]
    if args[0].shape[2] > args[1].shape[2] and causal and dtype is not torch.float32:
        with pytest.raises(RuntimeError, match="no more queries than keys"):
            cuda.attention(*(x.to(dtype) for x in args), None, 0.3, causal)
    else:
        check_against_the_cpu(args, None, causal, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("at", [[0, 1], [0, 33], [0, 3, 40, 41], [0, 0, 5, 5, 9, 9], [0, 0], [0]])
def test_packed_sequences(at, causal, dtype):
    args = projections(1, 4, 2, at[-1], at[-1], 24, 17)
    check_against_the_cpu(args, torch.tensor(at), causal, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 3, 40, 41])], ids=["batch", "packed"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_kernels_get_a_scale_above_0(scale, offsets, causal, dtype):
    check_against_the_cpu(projections(1, 4, 2, 41, 41, 24, 17), offsets, causal, dtype, scale)


def boolean(shape):
    mask = torch.rand(shape) < 0.5
    mask[..., 3, :] = False  # a query that sees nothing
    return mask


MASKS = {
    "boolean": lambda: boolean((2, 1, 35, 50)),
    "of heads": lambda: boolean((1, 4, 35, 50)),
    "of keys": lambda: torch.rand(2, 1, 1, 50) < 0.5,
    "additive": lambda: torch.randn(2, 1, 35, 50).masked_fill(~boolean((2, 1, 35, 50)), -math.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, scale, dtype):
    args = [x.to(dtype) for x in projections(2, 4, 2, 35, 50, 24, 17)]
    mask = MASKS[kind]()
    mask = mask if mask.dtype is torch.bool else mask.to(dtype)
    wide, wide_mask = [x.float() for x in args], mask if mask.dtype is torch.bool else mask.float()
    o, lse = cuda.masked_attention(*args, mask, scale)
    expected, expected_lse = torch.ops.entrenar.masked_attention(*wide, wide_mask, scale)
    torch.testing.assert_close(o.float(), expected, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse[expected_lse.isfinite()], expected_lse[expected_lse.isfinite()])
    d_o = torch.randn_like(expected).to(dtype)
    gradients = cuda.masked_attention_backward(d_o, *args, o, lse, mask, scale)
    arguments = d_o.float(), *wide, o.float(), expected_lse, wide_mask, scale
    for actual, want in zip(gradients, torch.ops.entrenar.masked_attention_backward(*arguments), strict=True):
        assert actual.dtype is dtype
        # Heads that share keys are summed after they were rounded.
        atol = max(4 * torch.finfo(dtype).eps * want.abs().max().item(), 1e-4)
        torch.testing.assert_close(actual.float(), want, atol=atol, rtol=0)


def test_aligned_projections_are_not_copied():
    x = projections(2, 3, 3, 5, 5, 16, 16)[0].bfloat16()
    assert cuda._rows(x, 16).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("width", [16, 24])
def test_columns_apart_in_memory_are_brought_together(width):
    x = torch.randn(2, 3, 16, 5).mT
    rows = cuda._rows(x, width)
    check_memory(rows)
    assert torch.equal(rows[..., :16], x.transpose(1, 2))
    assert not rows[..., 16:].any()


def valid(**changed):
    q, k, v = (torch.randn(1, heads, 6, columns) for heads, columns in ((4, 8), (2, 8), (2, 5)))
    return {"q": q, "k": k, "v": v, "offsets": None, "scale": 0.5, "causal": True, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.randn(4, 6, 8)}, "four dimensions"),
        ({"q": torch.randn(1, 4, 6, 8).double()}, "q must be float32, bfloat16 or float16"),
        ({"k": torch.randn(1, 2, 6, 8).bfloat16()}, "of its dtype"),
        ({"k": torch.randn(1, 2, 6, 8, device="meta")}, "and device"),
        ({"q": torch.randn(1, 3, 6, 8)}, "a multiple"),
        ({"k": torch.randn(1, 2, 6, 7)}, "do not fit"),
        ({"v": torch.randn(1, 2, 7, 5)}, "do not fit"),
        ({"k": torch.randn(1, 0, 6, 8), "v": torch.randn(1, 0, 6, 5)}, "no heads"),
        ({"offsets": torch.tensor([0, 6]).int()}, "offsets must be int64"),
        ({"offsets": torch.tensor([0, 5])}, "begin with 0 and end"),
        ({"offsets": torch.tensor([0, 7, 6])}, "not decrease"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(RuntimeError, match=message):
        cuda.attention(**valid(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d_o": torch.randn(1, 4, 6, 4)}, "d_o must be"),
        ({"o": torch.randn(1, 4, 6, 5).bfloat16()}, "o must be"),
        ({"lse": torch.randn(1, 4, 5)}, "lse must be"),
        ({"lse": torch.randn(1, 4, 6).double()}, "lse must be"),
    ],
)
def test_the_backward_refuses_results_that_do_not_fit(changed, message):
    arguments = {"d_o": torch.randn(1, 4, 6, 5), "o": torch.randn(1, 4, 6, 5), "lse": torch.randn(1, 4, 6)}
    with pytest.raises(RuntimeError, match=message):
        cuda.attention_backward(**{**valid(), **arguments, **changed})
