"""Attention by a mask on the CPU: our kernel for what a batch has beside padding, torch's flash attention elsewhere."""

from __future__ import annotations

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


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`torch.ops.entrenar.masked_attention` of tensors on the CPU."""
    check(q, k, v, None, False)
    if nothing(q, k):
        return no_results(q, v)
    if (bounds := _bounds(mask, q, k)) is None:
        return _flash_forward(q, k, v, mask, scale)
    o, lse = no_results(q, v)
    for batch, rows, keys, causal in _parts(bounds, q.shape[2]):
        queries, seen = (batch, slice(None), rows), (batch, slice(None), keys)
        o[queries], lse[queries] = torch.ops.entrenar.attention(q[queries], k[seen], v[seen], None, scale, causal)
    return o, lse


def masked_attention_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.entrenar.masked_attention_backward` of tensors on the CPU."""
    check(q, k, v, None, False)
    check_results(d_o, q, v, o, lse)
    dq, dk, dv = no_gradients(q, k, v)
    if nothing(q, k):
        return dq, dk, dv
    if (bounds := _bounds(mask, q, k)) is None:
        return _flash_backward(d_o, q, k, v, o, lse, mask, scale)
    for batch, rows, keys, causal in _parts(bounds, q.shape[2]):
        queries, seen = (batch, slice(None), rows), (batch, slice(None), keys)
        gradients = torch.ops.entrenar.attention_backward(
            d_o[queries], q[queries], k[seen], v[seen], o[queries], lse[queries].contiguous(), None, scale, causal
        )
        dq[queries] = gradients[0]
        dk[seen] += gradients[1]
        dv[seen] += gradients[2]
    return dq, dk, dv


def _bounds(mask: Tensor, q: Tensor, k: Tensor) -> list[tuple[int, int]] | None:
    """From where and up to where each of the batch has tokens, if the mask says causal and padding and nothing else."""
    batch, _, length, _ = q.shape
    if mask.dtype is not torch.bool or mask.shape[1:] != (1, length, length) or k.shape[2] != length:
        return None
    seen = mask[:, 0, -1]  # the last token sees all
    starts = seen.int().argmax(-1)
    ends = starts + seen.sum(-1)
    places = torch.arange(length, device=mask.device)
    together = (places >= starts.unsqueeze(-1)) & (places < ends.unsqueeze(-1))
    causal = places <= places.unsqueeze(-1)
    if not torch.equal(mask[:, 0], causal & together.unsqueeze(1)):
        return None
    return list(zip(starts.expand(batch).tolist(), ends.expand(batch).tolist(), strict=True))


def _parts(bounds: list[tuple[int, int]], length: int) -> Iterator[tuple[slice, slice, slice, bool]]:
    """What attention remains: batch, queries, keys, and whether it is causal. Padding after the tokens sees all."""
    for i, (start, end) in enumerate(bounds):
        if start < end:
            yield slice(i, i + 1), slice(start, end), slice(start, end), True
        if start < end < length:
            yield slice(i, i + 1), slice(end, length), slice(start, end), False


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    bias, blind = bias_of(mask, q, k)
    q, key, value = _of_one_width(q, k, v)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, key, value, 0.0, False, attn_mask=bias, scale=scale
    )
    return tokens(o[..., : v.shape[-1]]).masked_fill_(blind, 0), lse.contiguous()


def _flash_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    bias, blind = bias_of(mask, q, k)
    groups, columns = k.shape[1], q.shape[-1]
    q, key, value, d_o, o = _of_one_width(q, k, v, d_o.masked_fill(blind, 0), o)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_o, q, key, value, o, tokens(lse), 0.0, False, attn_mask=bias, scale=scale
    )
    dk, dv = (d.unflatten(1, (groups, -1)).sum(2) if groups != q.shape[1] else d for d in (dk, dv))
    return tokens(dq[..., :columns]), tokens(dk[..., :columns]), tokens(dv[..., : v.shape[-1]])


def _of_one_width(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Tensors of as many heads and columns; columns of zeros change no score."""
    width = max(x.shape[-1] for x in (q, *others))
    return [F.pad(repeat(x, q.shape[1], 1), (0, width - x.shape[-1])) for x in (q, *others)]


library.impl("masked_attention", masked_attention, "CPU")
library.impl("masked_attention_backward", masked_attention_backward, "CPU")
