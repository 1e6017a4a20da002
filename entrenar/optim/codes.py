"""States of optimizers in 8 bits: the map of the codes, and plain torch that encodes and decodes blocks of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
ZERO_CODE = 127  # of the signed map
LEAST_ABSMAX = torch.finfo(torch.float32).tiny


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the dynamic map in ascending order (Dettmers, 2015), float32 on the CPU.

    Seven decades from 1e-7 to 1, each cut into cells of equal width, twice as many as in the decade below; a value is
    the middle of its cell. The signed map mirrors them; zero and 1 complete both. These are the values of bitsandbytes'
    `create_dynamic_map`, to the bit.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32, device="cpu")
        magnitudes = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [magnitudes, -magnitudes] if signed else [magnitudes]
    return torch.cat(values).sort().values


def _magnitudes(signed: bool) -> Tensor:
    return dynamic_map(signed)[ZERO_CODE:] if signed else dynamic_map(signed)


@cache
def code_bounds(signed: bool) -> Tensor:
    """From which magnitude on the code is above i, counted from the zero's: just above the middle of two values."""
    values = _magnitudes(signed).double()
    middle = (values[:-1] + values[1:]) / 2
    rounded = middle.float()
    above = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.float32, device="cpu"))
    return torch.where(rounded.double() > middle, rounded, above)


def encode(values: Tensor, signed: bool) -> Tensor:
    """The codes (uint8) of float32 values between -1 (or 0) and 1: the nearest value's, of two the smaller's.

    A search among all values; the kernels find the same codes without one.
    """
    code = torch.bucketize(values.abs(), code_bounds(signed).to(values.device), right=True)
    if signed:
        code = torch.where(values.signbit(), (ZERO_CODE - code).clamp(min=0), ZERO_CODE + code)
    return code.to(torch.uint8)


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, of x's shape) and the largest magnitude of each block of 256 elements (float32) of a finite x.

    Elements are taken in the order of a contiguous tensor; the last block may be shorter. A block whose largest
    magnitude is below 2**-126 becomes zeros.
    """
    blocks = _blocks(x.float())
    absmax = blocks.abs().amax(dim=1)
    absmax = torch.where(absmax < LEAST_ABSMAX, 0, absmax)
    inverse = torch.where(absmax > 0, 1 / absmax, 0)
    codes = encode(blocks * inverse[:, None], signed)
    return codes.flatten()[: x.numel()].view(x.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values that codes and the blocks' largest magnitudes stand for."""
    values = dynamic_map(signed).to(codes.device)[_blocks(codes).int()] * absmax[:, None]
    return values.flatten()[: codes.numel()].view(codes.shape)


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


@dataclass(frozen=True)
class _Region:
    """Magnitudes from `edge` on: rounded down, `min(slope * magnitude + offset, limit)` is the code.

    The limit is for magnitudes just above a decade, which are nearest to its last value.
    """

    edge: float
    slope: float
    offset: float
    limit: float


def _regions(signed: bool) -> list[_Region]:
    bounds = code_bounds(signed).double()
    regions = [_Region(0.0, 0.0, 0.5, 0.5)]
    code = 1  # of the decade's first cell
    for decade in range(7):
        cells, low, high = 2 ** (decade + (not signed)), 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        slope = cells / (high - low)
        regions.append(_Region(float(bounds[code - 1]), slope, code - slope * low, code + cells - 0.5))
        code += cells
    return [*regions, _Region(float(bounds[-1]), 0.0, code + 0.5, code + 0.5)]


@cache
def codebook(signed: bool, device: torch.device) -> Tensor:
    """What the kernels need of the map, laid out as `Codebook` in csrc/codes8bit.h."""
    edges = torch.tensor([region.edge for region in _regions(signed)], dtype=torch.float32, device="cpu")
    powers = 2.0 ** torch.arange(-31, 2, dtype=torch.float32, device="cpu")
    regions = torch.bucketize(powers, edges, right=True) - 1
    if regions.diff().max() > 1:
        raise AssertionError("an exponent must meet at most two regions")
    # A magnitude's bits, less those of the second region's edge, or of the end, and so many regions more.
    ends = torch.where(regions.diff() > 0, edges[regions[1:]], powers[1:])
    to_region = (regions[:-1] + 1 << 23) - ends.view(torch.int32)
    words = [to_region.int().view(torch.float32), _lines(signed).flatten(), _buckets(signed).view(torch.float32)]
    return torch.cat([dynamic_map(signed), *words]).to(device)


def _lines(signed: bool) -> Tensor:
    """The regions' slopes, offsets and limits, such that the third byte of the result is the code, or one more.

    Up to 256 this byte of a float32 counts with the number from 128 on, and from there on with its half.
    """
    lines = torch.zeros(3, 16, dtype=torch.float32, device="cpu")
    for i, region in enumerate(_regions(signed)):
        offset, limit = region.offset + (not signed), region.limit + (not signed)
        line = (region.slope, 128 + offset, 128 + limit) if limit < 128 else (2 * region.slope, 2 * offset, 2 * limit)
        lines[:, i] = torch.tensor(line, dtype=torch.float32, device="cpu")
    return lines


def _buckets(signed: bool) -> Tensor:
    """Numbers from 2**-31 to 2 that agree in the exponent and the first 7 bits of the fraction, at most one bound each.

    The number of bounds up to a bucket's beginning, shifted by 17 bits, and from which value of the last 16 bits on
    there is one more.
    """
    beginnings = torch.arange(96 << 7, 128 << 7, dtype=torch.int32, device="cpu") << 16
    bounds = code_bounds(signed).view(torch.int32)
    below = torch.bucketize(beginnings, bounds, right=True)
    ends = torch.bucketize(beginnings + 0xFFFF, bounds, right=True)
    if (ends - below).max() > 1:
        raise AssertionError("a bucket must hold at most one bound")
    inside = bounds[below.clamp(max=len(bounds) - 1)] - beginnings
    return (below.int() << 17 | torch.where(ends > below, inside, 0x10000)).int()
