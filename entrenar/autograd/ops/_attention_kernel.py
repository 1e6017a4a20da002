from __future__ import annotations

import torch
from torch import Tensor

from entrenar.autograd.ops._library import define


def _heads_like(x: Tensor, columns: int) -> Tensor:
    batch, heads, rows, _ = x.shape
    return x.new_empty(batch, rows, heads, columns).transpose(1, 2)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return _heads_like(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _attention_backward_fake(
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
    return _heads_like(q, q.shape[-1]), _heads_like(k, k.shape[-1]), _heads_like(v, v.shape[-1])


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? offsets, float scale, bool causal) -> (Tensor o, Tensor lse)",
    _attention_fake,
)
define(
    "attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? offsets, float scale, "
    "bool causal) -> (Tensor dq, Tensor dk, Tensor dv)",
    _attention_backward_fake,
)
