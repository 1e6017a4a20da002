"""Attention of sequences of different lengths, packed behind each other, without a mask and without padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._attention_kernel import attention_backward, attention_forward, has_kernel
from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import refuse_complex
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.ops.attention import AttentionSettings, attention_gradients, scaled_dot_product_attention


@overridable
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *, is_causal: bool = True, scale: float | None = None
) -> Tensor:
    """softmax(scale Q Kᵀ) V within each of several sequences; a token sees no other sequence.

    Args:
        query: [H, N, E]; key: [G, N, E]; value: [G, N, Ev]; or each with a leading dimension of 1. H is a multiple of
            G, and neighbours share a head of key and value. Floating point, of one dtype; under autocast they are cast
            as `attention` casts them.
        offsets: int64 [n + 1] on the CPU, from 0 to N and nowhere decreasing: sequence i has the rows from offsets[i]
            up to offsets[i + 1].
        is_causal: a query sees the keys of its sequence up to its own place; else all of its sequence.
        scale: 1 / sqrt(E) if None.

    Returns:
        [H, N, Ev], or [1, H, N, Ev], of query's dtype, computed in float32 or wider.

    The gradients are those of `attention` in each sequence. Where there is no kernel for `attention`, and on CUDA in
    float32, the sequences go through it one by one.

    Raises RuntimeError where shapes, dtypes or offsets do not fit, TypeError for values that are not floating point.
    """
    query, key, value = autocast(query), autocast(key), autocast(value)
    _check(query, key, value, offsets)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    if has_kernel(query, key, value, True, is_causal):
        output, _ = PackedAttentionFunction.apply(query, key, value, offsets, scale, is_causal)
        return output
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)
        for q, k, v in _sequences(offsets, query, key, value)
    ]
    return torch.cat(outputs, dim=-2)


def packed_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *, is_causal: bool = True, scale: float | None = None
) -> Tensor:
    """`packed_attention` in plain torch, with a mask of all tokens."""
    wide = torch.promote_types(query.dtype, torch.float32)
    shared = query.shape[-3] // key.shape[-3]
    q, k, v = query.to(wide), *(x.to(wide).repeat_interleave(shared, -3) for x in (key, value))
    token = torch.arange(query.shape[-2], device=query.device)
    sequence = torch.bucketize(token, offsets.to(query.device), right=True)
    seen = sequence[:, None] == sequence
    if is_causal:
        seen = seen & (token[:, None] >= token)
    scores = (1 / math.sqrt(query.shape[-1]) if scale is None else scale) * (q @ k.mT)
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).to(query.dtype)


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> None:
    operands = {"query": query, "key": key, "value": value}
    refuse_complex("packed_attention", *operands.values())

    def described() -> str:
        return ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in operands.items())

    if not all(x.is_floating_point() for x in operands.values()):
        raise TypeError(f"packed_attention takes floating-point values: {described()}")
    if any(x.dtype != query.dtype or x.device != query.device for x in operands.values()):
        raise RuntimeError(f"query, key and value must have one dtype and one device: {described()}")
    if any(
        x.dim() not in (3, 4) or x.shape[:-3] not in ((), (1,)) or x.dim() != query.dim() for x in operands.values()
    ):
        raise RuntimeError(f"query, key and value must be [heads, N, columns], or all with a leading 1: {described()}")
    if query.shape[-1] != key.shape[-1] or not query.shape[-2] == key.shape[-2] == value.shape[-2]:
        raise RuntimeError(f"query and key must have as many columns, and all as many rows: {described()}")
    if key.shape[-3] != value.shape[-3] or key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]:
        raise RuntimeError(f"key and value must have as many heads, and query a multiple of them: {described()}")
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() == 0 or offsets.device.type != "cpu":
        raise RuntimeError(
            f"offsets must be a vector of int64 on the CPU, not {tuple(offsets.shape)} {offsets.dtype} "
            f"on {offsets.device}"
        )


def _sequences(offsets: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each tensor that belong to each sequence."""
    at, rows = offsets.tolist(), tensors[0].shape[-2]
    if at[0] != 0 or at[-1] != rows or at != sorted(at):
        raise RuntimeError(f"offsets must begin with 0, end with the number of rows, {rows}, and not decrease: {at}")
    lengths = [stop - start for start, stop in itertools.pairwise(at)]
    return list(zip(*(x.split(lengths, dim=-2) for x in tensors), strict=True))


class PackedAttentionFunction(Function):
    """O = softmax(scale Q Kᵀ) V in each sequence, and of each query the logarithm of its sum of exponentials."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        return attention_forward(query, key, value, offsets, scale, is_causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        query, key, value, offsets, ctx.scale, ctx.is_causal = inputs
        output, lse = outputs
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or zeros would be made for lse
        ctx.save_for_backward(query, key, value, offsets, output, lse)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_lse: None) -> tuple[Tensor | None, ...]:
        if d_output is None:
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, offsets, output, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a kernel's gradients could not be differentiated again
            settings = AttentionSettings(ctx.scale, 0.0, None, ctx.is_causal, True)
            parts = [
                attention_gradients(d, q, k, v, None, settings, (True, True, True, False))[:3]
                for d, q, k, v in _sequences(offsets, d_output, query, key, value)
            ]
            gradients = tuple(torch.cat(sequences, dim=-2) for sequences in zip(*parts, strict=True))
        else:
            gradients = attention_backward(d_output, query, key, value, output, lse, offsets, ctx.scale, ctx.is_causal)
        return *gradients, None, None, None
