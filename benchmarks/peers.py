"""The peers' layers, built over given weights."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor


def linear4bit(weight: Tensor, compute_dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """bitsandbytes' frozen NF4 layer, blocks of 64 with float32 scales, over a float32 weight [N, K]."""
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=compute_dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    return layer.to("cpu")


class Int4Pack:
    """torch's weight-only int4 product, which knows no gradient, over signed codes [N, K] and scales [N, K / group]."""

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.group = codes.shape[1] // scales.shape[1]
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
        self.scales_and_zeros = torch.stack([scales.T, torch.zeros_like(scales.T)], dim=-1).to(dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales_and_zeros)
