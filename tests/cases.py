"""One entry for each op: everything that the common tests of tests/autograd/test_ops.py need to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.autograd.ops.int4 import (
    int4_dequantize_reference,
    int4_quantize_reference,
)
from entrenar.autograd.ops.int4_linear import int4_linear_reference
from entrenar.autograd.ops.int4_lora_linear import int4_lora_linear_reference

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
    """

    op: torch._ops.OpOverload
    reference: Callable
    arguments: Callable[[str, torch.dtype], tuple]
    samples: tuple[str, ...]
    exact: bool = False
    linear_in: tuple[int, ...] = ()


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
    codes, scales = int4_quantize_reference(torch.randn(n, k), block, scale_dtype)
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


def quantize_arguments(sample: str, dtype: torch.dtype) -> tuple:
    _, n, k = SIZES.get(sample, ((6,), 20, 50))
    block = 32 if sample in ("few rows", "batch") else 64
    return make_x(sample, (n,), k).to(dtype), block, torch.float32 if sample in ("odd", "deep") else torch.float16


def dequantize_arguments(sample: str, dtype: torch.dtype) -> tuple:
    weight, block, scale_dtype = quantize_arguments(sample, dtype)
    return *int4_quantize_reference(weight, block, scale_dtype), weight.shape[1], block, dtype


CASES = {
    "int4_quantize": Case(
        ops.int4_quantize.default, int4_quantize_reference, quantize_arguments, (*SIZES, *STRIDED), exact=True
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
}
