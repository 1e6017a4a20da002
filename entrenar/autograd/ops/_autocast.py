"""How the ops follow torch.autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that torch.autocast gives to matrix products, where it is on; `x` itself elsewhere."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
