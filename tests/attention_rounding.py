"""How far the attention kernel's results may be from float64: an analysis of its roundings, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def check_rounding(
    op: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    bias: Tensor | float = 0.0,
) -> None:
    """`op(query, key, value)` and its gradients are as near to float64 as their roundings allow.

    `seen` says which queries see which keys, and a finite `bias` is added to the scores: [..., T, S]. To first order,
    with u a relative error of the probabilities P, of the output O in delta = rowsum(dO O), and of dS = P (dP - delta),
    and A = |dO| |V|ᵀ + rowsum(|dO| (P |V|)): O is off by u (P |V| + |O|), dV by u (Pᵀ |dO| + |dV|), dQ by u (|scale| (P
    A) |K| + |dQ|), and dK likewise.

    bfloat16 rounds by 2^-9, and P, O and dS each once. float32 rounds every step of a sum by 2^-24; a score's error,
    relative to the magnitudes that are summed in it, becomes one of its probability. Results below 2^-126 are lost, and
    probabilities below 2^-125, which are off by all of themselves.
    """
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = op(*leaves)
    d_output = torch.randn(output.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(1)).to(
        output.dtype
    )
    results = [output, *torch.autograd.grad(output, leaves, d_output)]

    shared = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1
    q, k, v, dy = (x.detach().double() for x in (query, key, value, d_output))
    if shared > 1:
        k, v = k.repeat_interleave(shared, -3), v.repeat_interleave(shared, -3)
    p = (scale * (q @ k.mT) + bias).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()  # a query may see nothing
    o, dp = p @ v, dy @ v.mT
    ds = p * (dp - (dy * o).sum(-1, keepdim=True))
    expected = [o, scale * ds @ k, scale * ds.mT @ q, p.mT @ dy]
    reach = dy.abs() @ v.abs().mT + (dy.abs() * (p @ v.abs())).sum(-1, keepdim=True)

    def spread(p: Tensor) -> list[Tensor]:
        noise = abs(scale) * p * reach
        return [p @ v.abs(), noise @ k.abs(), noise.mT @ q.abs(), p.mT @ dy.abs()]

    steps = 8 + sum(key.shape[-2:]) + shared * query.shape[-2]
    magnitudes = (abs(scale) * (q.abs() @ k.abs().mT) + abs(bias)).max().item() if p.numel() else 0.0
    u = 2**-24 * steps * (1 + magnitudes) + (3 * 2**-9 if query.dtype == torch.bfloat16 else 0.0)
    bounds = [u * around + lost for around, lost in zip(spread(p), spread(2**-125 * seen.double()), strict=True)]
    for name, actual, wanted, bound in zip(("o", "dq", "dk", "dv"), results, expected, bounds, strict=True):
        if name in ("dk", "dv") and shared > 1:
            wanted, bound = (x.unflatten(-3, (-1, shared)).sum(-3) for x in (wanted, bound))
        assert actual.shape == wanted.shape
        assert actual.dtype == query.dtype
        excess = (actual.double() - wanted).abs() - bound - u * wanted.abs() - 2**-126
        assert not actual.isnan().any(), name
        assert (excess <= 0).all(), f"{name} is off by {excess.max():.3g} more than its roundings"


def tokens_seen(queries: int, keys: int, causal: bool) -> Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool)
    return seen.tril() if causal else seen


def seen_and_bias(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool = False
) -> tuple[Tensor, Tensor | float]:
    """What `check_rounding` takes instead of a mask."""
    if mask is None:
        return tokens_seen(query.shape[-2], key.shape[-2], causal), 0.0
    mask = mask.expand(*query.shape[:-1], key.shape[-2])
    if mask.dtype is torch.bool:
        return mask, 0.0
    return mask != -math.inf, mask.double().clamp(min=torch.finfo(mask.dtype).min)


def kernel_arguments(
    batch: int, heads: int, groups: int, queries: int, keys: int, columns: int, value_columns: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key and value, as projections are: in memory the heads of a token lie side by side."""
    sizes = (heads, queries, columns), (groups, keys, columns), (groups, keys, value_columns)
    return [torch.randn(batch, rows, n, width).to(dtype).transpose(1, 2) for n, rows, width in sizes]
