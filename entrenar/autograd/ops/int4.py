"""The int4 format: a matrix as signed 4-bit codes, and one scale for each block of a row.

For every block of `block` consecutive elements of a row, s = absmax / 7 is rounded to the scales' dtype, and each
element v becomes the code q = round_half_even(v / s), clamped to [-7, 7], which stands for the value q * s. A code is
stored as the nibble q + 8. Each 32 elements of a row take 16 bytes: byte j holds element j in its low nibble and
element j + 16 in its high one, which is the order of GGUF's Q4_0. The last block of a row may be shorter.

That is the fit "absmax". The fit "mse" also tries s = -v / d with codes in [-8, 7], as Q4_0's own quantizer does with
d = 8, where v is the first element of the largest magnitude and d one of DIVISORS, and keeps what has the least sum of
squared errors. A scale may then be negative; the bytes are decoded the same.

Scales are kept as the bytes of their float16 or float32 values, so that no cast of a module can round them.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from entrenar.autograd.ops._library import define

GROUP = 32
"""Elements that share 16 bytes."""
MAX_CODE = 7
MIN_CODE = -8
"""The least that a nibble holds; the fit "absmax" stops at -MAX_CODE."""
DIVISORS = (7.25, 7.75, 8.0, 8.25, 8.5, 8.75, 9.0, 9.25)
"""What the fit "mse" divides the element of the largest magnitude by, in the order in which it tries them."""
ERROR_LANES = 16
"""Partial sums of a block's squared errors, so that every device adds them up in the same order."""
BLOCKS = (32, 64)
SCALE_DTYPES = (torch.float16, torch.float32)
Fit = Literal["absmax", "mse"]
FITS: tuple[Fit, ...] = get_args(Fit)


def int4_quantize(
    weight: Tensor,
    *,
    block: int = 64,
    scale_dtype: torch.dtype = torch.float16,
    fit: Fit = "absmax",
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to 4 bits.

    Args:
        weight: [N, K], floating point. Dtypes other than float32 and bfloat16 are converted to float32 first.
        block: elements that share a scale, 64 or 32.
        scale_dtype: torch.float16 (4.25 bits a weight with blocks of 64) or torch.float32 (4.5 bits).
        fit: how a block's scale is found. "absmax": s = absmax / 7. "mse": by a search for the least squared error in
            the block, with the code -8 and negative scales; never worse than "absmax", and the same number of bytes.
        name: what to call the weight in an error message.

    Returns:
        codes: uint8 [N, 16 * ceil(K / 32)].
        scales: uint8 [N, ceil(K / block) * bytes of scale_dtype].

    With "absmax", the error of an element is at most s / 2, plus what rounding s itself costs; with "mse", that of a
    block's largest elements may be greater. A scale below float16's smallest positive value (5.96e-8) becomes zero, and
    so does its block.

    Raises ValueError for a matrix without columns, for a NaN or infinity in the weight, and for an absmax / 7 above the
    largest float16 (65504).
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{name}: int4 takes a floating-point matrix, not {weight.dtype} {tuple(weight.shape)}")
    if weight.shape[1] == 0:
        raise ValueError(f"{name}: there is nothing to quantize in a matrix {tuple(weight.shape)}")
    if block not in BLOCKS:
        raise ValueError(f"{name}: blocks are of {' or '.join(map(str, BLOCKS))} elements, not {block}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"{name}: scales are float16 or float32, not {scale_dtype}")
    check_fit(fit)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    codes, scales = torch.ops.entrenar.int4_quantize(weight.detach(), block, scale_dtype, fit == "mse")
    values = scales.view(scale_dtype)
    if values.numel() > 0 and not values.abs().max().isfinite():
        _explain_bad_scale(weight, values.isfinite(), block, name)
    return codes, scales


def check_fit(fit: str) -> None:
    """Raise ValueError unless `fit` is one of FITS."""
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(map(repr, FITS))}, not {fit!r}")


def _explain_bad_scale(weight: Tensor, finite: Tensor, block: int, name: str) -> None:
    row, index = (~finite).nonzero()[0].tolist()
    values = weight[row, index * block : (index + 1) * block].float()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        column = int(bad[0])
        raise ValueError(
            f"{name}[{row}, {index * block + column}] is {values[column].item()}: "
            "int4 holds finite values only; mend the weight or leave this layer out"
        )
    column = int(values.abs().argmax())
    raise ValueError(
        f"{name}[{row}, {index * block + column}] is {values[column].item():g}, whose scale float16 cannot hold: "
        "use scale_dtype=torch.float32"
    )


def int4_quantize_reference(
    weight: Tensor, block: int, scale_dtype: torch.dtype, mse: bool = False
) -> tuple[Tensor, Tensor]:
    """`torch.ops.entrenar.int4_quantize` in plain torch; a block whose scale is not finite gets zero codes."""
    rows, columns = weight.shape
    blocks = math.ceil(columns / block)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * block - columns)).view(rows, blocks, block)
    scales = (padded.abs().amax(-1, keepdim=True) / MAX_CODE).to(scale_dtype)
    usable = _usable(scales)
    q = _codes(padded, scales, -MAX_CODE)
    if mse:
        error = _squared_error(padded, q, scales)
        extreme = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
        for divisor in DIVISORS:
            candidate = (-extreme / divisor).to(scale_dtype)
            its_q = _codes(padded, candidate, MIN_CODE)
            its_error = _squared_error(padded, its_q, candidate)
            better = usable & _usable(candidate) & (its_error < error)
            scales, q, error = (
                torch.where(better, new, old) for new, old in ((candidate, scales), (its_q, q), (its_error, error))
            )
    q = torch.where(usable, q, 0)
    u = (q + 8).to(torch.uint8).view(rows, blocks * block // GROUP, 2, GROUP // 2)
    codes = (u[:, :, 0] | u[:, :, 1] << 4).flatten(1)[:, : packed_columns(columns)]
    return codes.contiguous(), scales.squeeze(-1).view(torch.uint8)


def _usable(scales: Tensor) -> Tensor:
    return (scales != 0) & scales.isfinite()


def _codes(blocks: Tensor, scales: Tensor, least: int) -> Tensor:
    return (blocks / scales.float()).round().clamp(least, MAX_CODE)


def _squared_error(blocks: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    squares = (q * scales.float() - blocks).square().unflatten(-1, (-1, ERROR_LANES))
    sums = squares.unbind(-2)
    lanes = sum(sums[1:], start=sums[0])
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return lanes


def int4_dequantize(
    codes: Tensor, scales: Tensor, in_features: int, *, block: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decode a matrix from int4: each value q * s, exact in float32, is rounded once to `dtype`.

    Args:
        codes: uint8 [N, 16 * ceil(K / 32)].
        scales: uint8 [N, ceil(K / block) * bytes of a scale]; the scales' dtype follows from that size.
        in_features: K.
        block: elements that share a scale, 64 or 32.
        dtype: of the result; float32 and bfloat16 are decoded directly, others by way of float32.

    Returns:
        [N, K] of `dtype`.

    Raises ValueError where the sizes do not belong together.
    """
    check_packed(codes, scales, in_features, block)
    if dtype in (torch.float32, torch.bfloat16):
        return torch.ops.entrenar.int4_dequantize(codes, scales, in_features, block, dtype)
    return torch.ops.entrenar.int4_dequantize(codes, scales, in_features, block, torch.float32).to(dtype)


def int4_dequantize_reference(
    codes: Tensor, scales: Tensor, in_features: int, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`torch.ops.entrenar.int4_dequantize` in plain torch."""
    rows = codes.shape[0]
    groups = codes.view(rows, codes.shape[1] // (GROUP // 2), GROUP // 2)
    q = torch.cat([groups & 15, groups >> 4], dim=2).flatten(1)[:, :in_features].float() - 8
    s = scales.view(scale_dtype_of(scales, in_features, block)).float()
    return (q * s.repeat_interleave(block, dim=1)[:, :in_features]).to(dtype)


def packed_columns(in_features: int) -> int:
    """Bytes of one row of codes."""
    return math.ceil(in_features / GROUP) * (GROUP // 2)


def scale_dtype_of(scales: Tensor, in_features: int, block: int) -> torch.dtype:
    """The dtype of which `scales` holds the bytes."""
    blocks = math.ceil(in_features / block)
    return torch.float32 if scales.shape[1] == 4 * blocks else torch.float16


def check_packed(codes: Tensor, scales: Tensor, in_features: int, block: int) -> None:
    """Raise ValueError unless `codes` and `scales` can be an int4 matrix with `in_features` columns."""
    if block not in BLOCKS:
        raise ValueError(f"blocks are of {' or '.join(map(str, BLOCKS))} elements, not {block}")
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8 or codes.dim() != 2 or scales.dim() != 2:
        raise ValueError(
            "codes and scales are uint8 matrices, not "
            f"{codes.dtype} {tuple(codes.shape)} and {scales.dtype} {tuple(scales.shape)}"
        )
    if in_features == 0:
        raise ValueError("an int4 matrix has at least one column")
    blocks = math.ceil(in_features / block)
    if (
        codes.shape[1] != packed_columns(in_features)
        or (scales.shape[1] != 2 * blocks and scales.shape[1] != 4 * blocks)  # not `in`, which compares no symbols
        or codes.shape[0] != scales.shape[0]
    ):
        raise ValueError(
            f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} are not an int4 matrix with {in_features} "
            f"columns in blocks of {block}: that has {packed_columns(in_features)} code bytes and "
            f"{2 * blocks} (float16) or {4 * blocks} (float32) scale bytes a row"
        )


def _int4_quantize_fake(
    weight: Tensor, block: int, scale_dtype: torch.dtype, mse: bool = False
) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    blocks = (columns + block - 1) // block
    groups = (columns + GROUP - 1) // GROUP
    return (
        weight.new_empty(rows, groups * (GROUP // 2), dtype=torch.uint8),
        weight.new_empty(rows, blocks * scale_dtype.itemsize, dtype=torch.uint8),
    )


def _int4_dequantize_fake(codes: Tensor, scales: Tensor, in_features: int, block: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], in_features, dtype=dtype)


define(
    "int4_quantize(Tensor weight, int block, ScalarType scale_dtype, bool mse=False) -> (Tensor, Tensor)",
    _int4_quantize_fake,
)
define(
    "int4_dequantize(Tensor codes, Tensor scales, SymInt in_features, int block, ScalarType dtype) -> Tensor",
    _int4_dequantize_fake,
)
