"""What attention on CUDA looks at first, shapes and what a mask adds to the scores; and what its results lie in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BIAS_COLUMNS = 16
"""Rows of a bias begin at a multiple of so many elements, as CUDA's kernel wants them."""


def check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, causal: bool) -> None:
    def described() -> str:
        named = zip(("q", "k", "v"), (q, k, v), strict=True)
        return ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in named)

    if any(x.dim() != 4 for x in (q, k, v)):
        raise RuntimeError(f"q, k and v must have four dimensions: {described()}")
    if q.dtype not in DTYPES or any(x.dtype is not q.dtype or x.device != q.device for x in (k, v)):
        raise RuntimeError(f"q must be float32, bfloat16 or float16, k and v of its dtype and device: {described()}")
    batch, heads, rows, columns = q.shape
    if k.shape[::3] != (batch, columns) or v.shape[:3] != k.shape[:3] or (heads and heads % max(k.shape[1], 1)):
        raise RuntimeError(f"k and v do not fit q, whose heads are a multiple of theirs: {described()}")
    if heads and not k.shape[1]:
        raise RuntimeError(f"k has no heads: {described()}")
    if offsets is not None:
        at = offsets.tolist() if offsets.dtype is torch.int64 and offsets.dim() == 1 else []
        if not at or batch != 1 or k.shape[2] != rows or at[0] != 0 or at[-1] != rows or at != sorted(at):
            raise RuntimeError(
                f"offsets must be int64, not decrease, begin with 0 and end with the number of queries, and there must "
                f"be one batch, and as many queries as keys: {offsets}, {described()}"
            )
    elif causal and q.dtype is not torch.float32 and rows > k.shape[2]:
        raise RuntimeError(f"causal flash attention takes no more queries than keys: {described()}")


def check_results(d_o: Tensor, q: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
    shape = (*q.shape[:-1], v.shape[-1])
    for name, x in (("d_o", d_o), ("o", o)):
        if x.shape != shape or x.dtype is not q.dtype:
            raise RuntimeError(f"{name} must be {q.dtype} {shape}, not {x.dtype} {tuple(x.shape)}")
    if lse.shape != q.shape[:-1] or lse.dtype is not torch.float32:
        raise RuntimeError(f"lse must be float32 {tuple(q.shape[:-1])}, not {lse.dtype} {tuple(lse.shape)}")


def nothing(q: Tensor, k: Tensor) -> bool:
    return 0 in (*q.shape[:3], k.shape[2])


def new_heads(x: Tensor, columns: int) -> Tensor:
    """Memory for [B, H, T, columns], as for `tokens`."""
    batch, heads, rows, _ = x.shape
    return x.new_empty(batch, rows, heads, columns).transpose(1, 2)


def no_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms, of queries that see nothing."""
    return new_heads(q, v.shape[-1]).zero_(), q.new_full(q.shape[:-1], -math.inf, dtype=torch.float32)


def no_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (new_heads(x, x.shape[-1]).zero_() for x in (q, k, v))
    return dq, dk, dv


def repeat(x: Tensor, heads: int, dim: int) -> Tensor:
    """With so many heads in that dimension: neighbours share one."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim=dim)


def tokens(x: Tensor) -> Tensor:
    """[B, H, T, ...] with the heads of a token side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def bias_of(mask: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the scores, [B, H, T, S] in rows as the kernel wants them; and the queries that see no key.

    Those have no softmax: here they see all keys, and what comes of it is to be cleared.
    """
    seen = mask if mask.dtype is torch.bool else mask != -math.inf
    blind = ~seen.any(-1, keepdim=True)
    keys = k.shape[2]
    bias = q.new_zeros(*mask.shape[:-1], math.ceil(keys / BIAS_COLUMNS) * BIAS_COLUMNS)[..., :keys]
    if mask.dtype is torch.bool:
        bias.masked_fill_(~(mask | blind), -math.inf)
    else:
        bias.copy_(mask.masked_fill(blind, 0))
    return bias.expand(*q.shape[:-1], keys), blind
