"""Attention on CUDA: torch's flash attention for 16 bits, its memory-efficient attention for float32 and for masks.

Both want the heads of a token side by side, columns in whole vectors of 16 bytes, and as many of them in query, key and
value: columns of zeros, which change no score, fill up what lacks. The backward of either adds up with atomics, in any
order, unless torch.use_deterministic_algorithms is on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from entrenar.autograd.ops._attention_arguments import (
    bias_of,
    check,
    check_results,
    no_gradients,
    no_results,
    nothing,
    repeat,
    tokens,
)
from entrenar.autograd.ops._library import library

COLUMNS = 8
"""Elements of a vector, and of 16 bits; the columns are a multiple of it."""
VECTOR_BYTES = 16
LSE_ROWS = 32
"""The memory-efficient backward reads the logarithms in units of so many queries."""
FROM_TOP_LEFT = 1
"""The memory-efficient attention's number for a mask that lets query i see the keys 0 to i."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """`torch.ops.entrenar.attention` of tensors on CUDA."""
    check(q, k, v, offsets, causal)
    if nothing(q, k):
        return no_results(q, v)
    if scale <= 0:
        q, scale, _ = _scaled_up(q, scale)
    if q.dtype is torch.float32 and offsets is not None:
        sequences = _sequences(offsets, (q, k, v))
        parts = [attention(q, k, v, None, scale, causal) for q, k, v in sequences]
        return tokens(torch.cat([o for o, _ in parts], 2)), torch.cat([lse for _, lse in parts], 2)
    key, value = _seen(q, k, v, offsets, causal)
    width = _width(q, v)
    q, key, value = (_rows(x, width) for x in (q, key, value))
    if q.dtype is torch.float32:
        o, lse = _efficient_forward(q, key, value, scale, causal)
    else:
        o, lse = _flash_forward(q, key, value, offsets, scale, causal)
    return _heads(o, v.shape[-1]), lse


def attention_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.entrenar.attention_backward` of tensors on CUDA."""
    check(q, k, v, offsets, causal)
    check_results(d_o, q, v, o, lse)
    if nothing(q, k):
        return no_gradients(q, k, v)
    if scale <= 0:
        q, scale, factor = _scaled_up(q, scale)
        dq, dk, dv = attention_backward(d_o, q, k, v, o, lse, offsets, scale, causal)
        return dq.mul_(factor), dk, dv
    if q.dtype is torch.float32 and offsets is not None:
        sequences = _sequences(offsets, (d_o, q, k, v, o, lse))
        parts = [attention_backward(d_o, q, k, v, o, lse, None, scale, causal) for d_o, q, k, v, o, lse in sequences]
        dq, dk, dv = (tokens(torch.cat(gradients, 2)) for gradients in zip(*parts, strict=True))
        return dq, dk, dv
    key, value = _seen(q, k, v, offsets, causal)
    width = _width(q, v)
    columns, unseen = q.shape[-1], k.shape[2] - key.shape[2]
    d_o, q, key, value, o = (_rows(x, width) for x in (d_o, q, key, value, o))
    if q.dtype is torch.float32:
        dq, dk, dv = _efficient_backward(d_o, q, key, value, o.contiguous(), lse, scale, causal)
    else:
        dq, dk, dv = _flash_backward(d_o, q, key, value, o, lse, offsets, scale, causal)
    if unseen:
        dk, dv = (F.pad(d, (0, 0, 0, 0, 0, unseen)) for d in (dk, dv))
    return _heads(dq, columns), _heads(dk, columns), _heads(dv, v.shape[-1])


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`torch.ops.entrenar.masked_attention`."""
    check(q, k, v, None, False)
    if nothing(q, k):
        return no_results(q, v)
    bias, blind = bias_of(mask, q, k)
    if scale <= 0:
        q, scale, _ = _scaled_up(q, scale)
    width = _width(q, v)
    q, k, value = (_rows(x, width) for x in (q, k, v))
    o, lse = _efficient_forward(q, k, value, scale, False, bias)
    return _heads(o, v.shape[-1]).masked_fill_(blind, 0), lse


def masked_attention_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.entrenar.masked_attention_backward`."""
    check(q, k, v, None, False)
    check_results(d_o, q, v, o, lse)
    if nothing(q, k):
        return no_gradients(q, k, v)
    if scale <= 0:
        q, scale, factor = _scaled_up(q, scale)
        dq, dk, dv = masked_attention_backward(d_o, q, k, v, o, lse, mask, scale)
        return dq.mul_(factor), dk, dv
    bias, blind = bias_of(mask, q, k)
    width, columns = _width(q, v), q.shape[-1]
    d_o, q, k, value, o = (_rows(x, width) for x in (d_o.masked_fill(blind, 0), q, k, v, o))
    dq, dk, dv = _efficient_backward(d_o, q, k, value, o.contiguous(), lse, scale, False, bias)
    return _heads(dq, columns), _heads(dk, columns), _heads(dv, v.shape[-1])


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, C] and the logarithms [B, H, T], of rows [B, T, H, C] and [B, S, G, C]."""
    forward = torch.ops.aten._flash_attention_forward
    if offsets is None:
        o, lse, *_ = forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale)
        return o, lse
    at, longest = _starts(offsets, q.device)
    o, lse, *_ = forward(q[0], k[0], v[0], at, at, longest, longest, 0.0, causal, False, scale=scale)
    return o.unsqueeze(0), lse.unsqueeze(0)


def _flash_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._flash_attention_backward
    lse = lse.contiguous()
    none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the random state, without dropout
    if offsets is None:
        lengths = q.shape[1], k.shape[1]
        dq, dk, dv = backward(d_o, q, k, v, o, lse, None, None, *lengths, 0.0, causal, none, none, scale=scale)
        return dq, dk, dv
    at, longest = _starts(offsets, q.device)
    packed = [x[0] for x in (d_o, q, k, v, o, lse)]
    dq, dk, dv = backward(*packed, at, at, longest, longest, 0.0, causal, none, none, scale=scale)
    return dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0)


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    k, v = (repeat(x, q.shape[2], 2) for x in (k, v))
    mask = FROM_TOP_LEFT if causal else 0
    o, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, bias, None, None, None, None, 0.0, mask, True, scale=scale
    )
    return o, lse[..., : q.shape[1]].contiguous()


def _efficient_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = k.shape[2]
    k, v = (repeat(x, q.shape[2], 2) for x in (k, v))
    # With a logarithm of infinity the probabilities of queries that do not exist are zero.
    lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ROWS), value=math.inf).contiguous()
    none = torch.zeros((), dtype=torch.int64, device=q.device)  # of the random state, without dropout
    mask, lengths = FROM_TOP_LEFT if causal else 0, (q.shape[1], k.shape[1])
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        d_o, q, k, v, bias, o, None, None, *lengths, lse, 0.0, none, none, mask, False, scale=scale
    )
    if groups != q.shape[2]:
        dk, dv = (d.unflatten(2, (groups, -1)).sum(3) for d in (dk, dv))
    return dq, dk, dv


def _seen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Key and value without the rows that no query sees: flash attention lets the last query see the last key."""
    rows = q.shape[2]
    return (k[:, :, :rows], v[:, :, :rows]) if causal and offsets is None else (k, v)


def _scaled_up(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """Queries that have the same scores by a scale above 0, that scale, and what the queries were multiplied by.

    The kernels look for the largest score before they scale it, with -infinity where a key is not seen.
    """
    factor = -1.0 if scale < 0 else 0.0
    return q * factor, abs(scale) or 1.0, factor


def _width(q: Tensor, v: Tensor) -> int:
    """The columns that all tensors get."""
    return max(math.ceil(max(q.shape[-1], v.shape[-1]) / COLUMNS), 1) * COLUMNS


def _rows(x: Tensor, width: int) -> Tensor:
    """[B, H, T, C] as [B, T, H, width], in whole vectors: the kernels look at strides of single elements too."""
    x = x.transpose(1, 2)
    columns = x.shape[-1]
    if columns < width:
        rows = x.new_zeros(*x.shape[:-1], width)
        rows[..., :columns] = x
        return rows
    steps = (stride * x.element_size() for stride in x.stride()[:-1])
    if x.stride(-1) == 1 and x.data_ptr() % VECTOR_BYTES == 0 and all(step % VECTOR_BYTES == 0 for step in steps):
        return x
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


def _heads(x: Tensor, columns: int) -> Tensor:
    """[B, T, H, width] as [B, H, T, columns] in the memory that the ops give, [B, T, H, columns]."""
    return x[..., :columns].contiguous().transpose(1, 2)


def _starts(offsets: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Where the sequences start, int32 on the device, and the length of the longest."""
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    return offsets.to(torch.int32).to(device, non_blocking=True), longest


def _sequences(offsets: Tensor, tensors: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
    """The rows of each sequence, from all tensors [1, H, N, ...]."""
    for start, stop in itertools.pairwise(offsets.tolist()):
        yield [x[:, :, start:stop] for x in tensors]


library.impl("attention", attention, "CUDA")
library.impl("attention_backward", attention_backward, "CUDA")
library.impl("masked_attention", masked_attention, "CUDA")
library.impl("masked_attention_backward", masked_attention_backward, "CUDA")
