"""One entry for each op: everything that the common tests of tests/autograd/test_ops.py need to know of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.autograd.ops._cross_entropy import cross_entropy_gradient_reference, cross_entropy_losses_reference
from entrenar.autograd.ops.int4 import (
    int4_dequantize_reference,
    int4_quantize_reference,
)
from entrenar.autograd.ops.int4_linear import int4_linear_reference
from entrenar.autograd.ops.int4_lora_linear import int4_lora_linear_reference
from entrenar.autograd.ops.packed_attention import packed_attention_reference
from entrenar.autograd.ops.swiglu_int4_lora_linear import swiglu_int4_lora_linear_reference

ops = torch.ops.entrenar


@dataclass(frozen=True)
class Case:
    """An op and its oracle.

    Attributes:
        op: the operator.
        reference: the same in plain torch, with the same arguments, and the first of its results if it has several.
        samples: names of argument sets, each made by `arguments(sample, dtype)`.
        exact: the result is the reference's to the bit.
        linear_in: the indices of the differentiable arguments. The op is linear in each, so a central difference is
            exact but for rounding, whatever the step.
        growth: by how much an error on the way may grow, beside the largest element of a result.
    """

    op: torch._ops.OpOverload
    reference: Callable
    arguments: Callable[[str, torch.dtype], tuple]
    samples: tuple[str, ...]
    exact: bool = False
    linear_in: tuple[int, ...] = ()
    growth: float = 1.0


SIZES = {
    # rows of x, outputs, inputs
    "one": ((1,), 1, 1),
    "vector": ((), 9, 70),
    "few rows": ((3,), 5, 33),
    "four rows": ((2, 2), 66, 129),
    "odd": ((7,), 65, 31),
    "sixteen rows": ((2, 8), 50, 200),
    "batch": ((2, 13), 130, 100),
    "deep": ((25,), 17, 1100),
    "many rows": ((401,), 72, 96),
    "no rows": ((0,), 8, 40),
}
STRIDED = ("transposed", "sliced")


def make_x(sample: str, shape: tuple[int, ...], columns: int) -> Tensor:
    if sample == "transposed":
        return torch.randn(columns, *shape).movedim(0, -1)
    if sample == "sliced":
        return torch.randn(*shape, 2 * columns)[..., ::2]
    return torch.randn(*shape, columns)


def linear_arguments(sample: str, dtype: torch.dtype) -> tuple:
    shape, n, k = SIZES.get(sample, ((6,), 20, 50))
    block = 32 if sample in ("few rows", "batch") else 64
    scale_dtype = torch.float32 if sample in ("odd", "deep") else torch.float16
    mse = sample in ("few rows", "deep", "many rows", "sliced")
    codes, scales = int4_quantize_reference(torch.randn(n, k), block, scale_dtype, mse)
    bias = torch.randn(n) if sample in ("vector", "odd", "many rows") else None
    return make_x(sample, shape, k).to(dtype), codes, scales, bias, block


def linear_dx_arguments(sample: str, dtype: torch.dtype) -> tuple:
    x, codes, scales, _, block = linear_arguments(sample, dtype)
    dy = make_x(sample, x.shape[:-1], codes.shape[0]).to(dtype)
    return dy, codes, scales, x.shape[-1], block


def int4_linear_dx_reference(dy: Tensor, codes: Tensor, scales: Tensor, in_features: int, block: int) -> Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    weight = int4_dequantize_reference(codes, scales, in_features, block, dy.dtype)
    return (dy.to(wide) @ weight.to(wide)).to(dy.dtype)


def lora_arguments(sample: str, dtype: torch.dtype) -> tuple:
    x, codes, scales, bias, block = linear_arguments(sample, dtype)
    rank = {"one": 1, "odd": 3, "deep": 40, "many rows": 16}.get(sample, 8)
    return x, codes, scales, bias, torch.randn(rank, x.shape[-1]), torch.randn(codes.shape[0], rank), 0.5, block


def dropped_lora_arguments(sample: str, dtype: torch.dtype) -> tuple:
    arguments = lora_arguments(sample, dtype)
    return *arguments, torch.nn.functional.dropout(arguments[0], 0.3)


def swiglu_lora_arguments(sample: str, dtype: torch.dtype) -> tuple:
    gate, *layer = lora_arguments(sample, dtype)
    return gate, make_x(sample, gate.shape[:-1], gate.shape[-1]).to(dtype), *layer


def quantize_arguments(sample: str, dtype: torch.dtype) -> tuple:
    _, n, k = SIZES.get(sample, ((6,), 20, 50))
    block = 32 if sample in ("few rows", "batch") else 64
    return make_x(sample, (n,), k).to(dtype), block, torch.float32 if sample in ("odd", "deep") else torch.float16


def fit_arguments(sample: str, dtype: torch.dtype) -> tuple:
    return *quantize_arguments(sample, dtype), True


def dequantize_arguments(sample: str, dtype: torch.dtype) -> tuple:
    weight, block, scale_dtype = quantize_arguments(sample, dtype)
    return *int4_quantize_reference(weight, block, scale_dtype), weight.shape[1], block, dtype


def losses_arguments(sample: str, dtype: torch.dtype) -> tuple:
    shape, _, classes = SIZES.get(sample, ((6,), 20, 50))
    logits = 3 * make_x(sample, (math.prod(shape),), classes).to(dtype)
    target = torch.randint(0, classes, (len(logits),))
    target[1::3] = -1
    return logits, target, -1


def loss_gradient_arguments(sample: str, dtype: torch.dtype) -> tuple:
    logits, target, ignore_index = losses_arguments(sample, dtype)
    return logits, target, torch.randn(len(logits)), ignore_index


ATTENTION_SIZES = {
    # batch, heads, heads of keys, queries, keys, columns, columns of values, causal
    "one": (1, 1, 1, 1, 1, 1, 1, True),
    "few rows": (2, 2, 1, 3, 5, 8, 6, False),
    "odd": (1, 3, 3, 71, 71, 33, 17, True),
    "batch": (3, 4, 2, 66, 130, 64, 64, True),
    "no rows": (1, 2, 2, 0, 4, 8, 8, False),
}


def attention_arguments(sample: str, dtype: torch.dtype) -> tuple:
    batch, heads, groups, queries, keys, columns, value_columns, causal = ATTENTION_SIZES[sample]
    sizes = (heads, queries, columns), (groups, keys, columns), (groups, keys, value_columns)
    q, k, v = (torch.randn(batch, rows, n, width).to(dtype).transpose(1, 2) for n, rows, width in sizes)
    return q, k, v, None, 0.3, causal


PACKED = {
    "one": [0, 1],
    "few rows": [0, 3, 3, 9],
    "odd": [0, 65, 66, 133],
    "batch": [0, 64, 128],
    "no rows": [0, 0],
}


def packed_attention_arguments(sample: str, dtype: torch.dtype) -> tuple:
    rows = PACKED[sample][-1]
    q, k, v = (torch.randn(1, heads, rows, 24).to(dtype) for heads in (4, 2, 2))
    return q, k, v, torch.tensor(PACKED[sample], device="cpu"), 0.3, sample != "batch"


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    if offsets is not None:
        return (packed_attention_reference(q, k, v, offsets, is_causal=causal, scale=scale),)
    y = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal, scale=scale, enable_gqa=True
    )
    return (y.to(q.dtype),)


def masked_attention_arguments(sample: str, dtype: torch.dtype) -> tuple:
    """Causal with padding on both sides, or any boolean mask, or one that is added to the scores."""
    q, k, v, _, scale, causal = attention_arguments(sample, dtype)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if causal and queries == keys:
        places = torch.arange(keys)
        mask = (places >= keys // 5) & (places < keys - keys // 7) & (places <= places.unsqueeze(-1))
        return q, k, v, mask.expand(batch, 1, -1, -1), scale
    mask = torch.rand(batch, 1, queries, keys) < 0.7
    return q, k, v, mask if causal else torch.randn(heads, queries, keys).to(dtype).masked_fill(~mask, -math.inf), scale


def masked_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, ...]:
    shared = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(shared, 1) for x in (k, v))
    bias = (
        torch.zeros_like(mask, dtype=torch.double).masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else mask
    )
    p = (scale * q.double() @ k.mT + bias.double()).softmax(-1).nan_to_num()  # a query may see nothing
    return ((p @ v).to(q.dtype),)


CASES = {
    "cross_entropy_losses": Case(
        ops.cross_entropy_losses.default, cross_entropy_losses_reference, losses_arguments, (*SIZES, *STRIDED)
    ),
    "cross_entropy_gradient": Case(
        ops.cross_entropy_gradient.default,
        cross_entropy_gradient_reference,
        loss_gradient_arguments,
        (*SIZES, *STRIDED),
    ),
    "int4_quantize": Case(
        ops.int4_quantize.default, int4_quantize_reference, quantize_arguments, (*SIZES, *STRIDED), exact=True
    ),
    "int4_quantize, mse": Case(
        ops.int4_quantize.default, int4_quantize_reference, fit_arguments, (*SIZES, *STRIDED), exact=True
    ),
    "int4_dequantize": Case(
        ops.int4_dequantize.default, int4_dequantize_reference, dequantize_arguments, tuple(SIZES), exact=True
    ),
    "int4_linear": Case(
        ops.int4_linear.default, int4_linear_reference, linear_arguments, (*SIZES, *STRIDED), linear_in=(0,)
    ),
    "int4_linear_dx": Case(
        ops.int4_linear_dx.default, int4_linear_dx_reference, linear_dx_arguments, (*SIZES, *STRIDED), linear_in=(0,)
    ),
    "int4_lora_linear": Case(
        ops.int4_lora_linear.default,
        int4_lora_linear_reference,
        lora_arguments,
        (*SIZES, *STRIDED),
        linear_in=(0, 4, 5),
    ),
    "int4_lora_linear, dropout": Case(
        ops.int4_lora_linear.default,
        int4_lora_linear_reference,
        dropped_lora_arguments,
        (*SIZES, *STRIDED),
        linear_in=(0, 4, 5, 8),
    ),
    "swiglu_int4_lora_linear": Case(
        ops.swiglu_int4_lora_linear.default,
        swiglu_int4_lora_linear_reference,
        swiglu_lora_arguments,
        (*SIZES, *STRIDED),
        linear_in=(1, 5, 6),
        growth=3.0,  # an element of gate or up is up to three times what it is at the largest result
    ),
    "attention": Case(ops.attention.default, attention_reference, attention_arguments, tuple(ATTENTION_SIZES)),
    "packed attention": Case(ops.attention.default, attention_reference, packed_attention_arguments, tuple(PACKED)),
    "masked attention": Case(
        ops.masked_attention.default,
        masked_attention_reference,
        masked_attention_arguments,
        tuple(ATTENTION_SIZES),
    ),
}
