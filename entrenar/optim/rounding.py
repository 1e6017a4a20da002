"""Scaled additions of the update rules, in place, and the square root.

In float64 they are torch's own operations, so that a rule gives the bits of torch.optim. Those fuse a multiplication
with an addition where a vector instruction does; in narrower types each operation is rounded, as in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """`x += alpha * y`."""
    return x.add_(y, alpha=alpha) if x.dtype is torch.float64 else x.add_(y * alpha)


def lerp_(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """`x += weight * (y - x)`."""
    return x.lerp_(y, weight) if x.dtype is torch.float64 else x.add_((y - x) * weight)


def square_add_(x: Tensor, y: Tensor, value: float) -> Tensor:
    """`x += value * y * y`."""
    return x.addcmul_(y, y, value=value) if x.dtype is torch.float64 else x.add_(y * value * y)


def sqrt(x: Tensor) -> Tensor:
    """The square root; torch's own in float32 may be off by a unit in the last place."""
    return x.double().sqrt().to(x.dtype)
