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
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, device="cpu")
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
    above = torch.nextafter(rounded, torch.tensor(torch.inf, device="cpu"))
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
    """Magnitudes from `edge` on, in which `slope * magnitude + offset`, truncated, is the code or the one before."""

    edge: float
    slope: float
    offset: float


def _regions(signed: bool) -> list[_Region]:
    bounds = code_bounds(signed).double()
    regions = [_Region(0.0, 0.0, 0.0)]
    code = 1  # of the decade's first cell
    for decade in range(7):
        cells, low, high = 2 ** (decade + (not signed)), 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        # A little too flat: of `cells` steps one is missing, so that the guess falls short by less than one cell, and
        # by no more in the strip above `high` that still rounds down to this decade.
        slope = (cells - 1) / (high - low)
        regions.append(_Region(float(bounds[code - 1]), slope, code - slope * low))
        code += cells
    return [*regions, _Region(float(bounds[-1]), 0.0, float(len(bounds) - 1))]


@cache
def codebook(signed: bool, device: torch.device) -> Tensor:
    """What the kernels need of the map, laid out as `Codebook` in csrc/codes8bit.h."""
    regions, infinity = _regions(signed), torch.tensor([torch.inf], device="cpu")
    bounds = torch.cat([code_bounds(signed), infinity.expand(256)])[:256]
    edges, first = torch.full((32,), torch.inf, device="cpu"), torch.zeros(32, dtype=torch.int32, device="cpu")
    for exponent in range(-31, 1):
        low, high = 2.0**exponent, 2.0 ** (exponent + 1)
        inside = [region.edge for region in regions if low < region.edge < high]
        if len(inside) > 1:
            raise AssertionError("an exponent must meet at most two regions")
        slot = (127 + exponent) % 32
        first[slot] = sum(region.edge <= low for region in regions) - 1
        edges[slot] = inside[0] if inside else torch.inf
    slopes, offsets = torch.zeros(2, 16, device="cpu")
    for i, region in enumerate(regions):
        slopes[i], offsets[i] = region.slope, region.offset
    words = [first.view(torch.float32), slopes, offsets, _buckets(signed).view(torch.float32)]
    return torch.cat([dynamic_map(signed), bounds, edges, *words]).to(device)


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
