"""How the ops follow torch.autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that torch.autocast gives to matrix products, where it is on; `x` itself elsewhere.

    As torch's own, it leaves float64 and integers as they are.
    """
    if autocast_is_on(x) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def autocast_is_on(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `x`; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
