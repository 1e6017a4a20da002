"""How the ops follow torch.autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that torch.autocast gives to matrix products, where it is on; `x` itself elsewhere.

    As torch's own, it leaves float64 and integers as they are.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
