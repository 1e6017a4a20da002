"""What the optimizers' settings may be."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def refuse_unsupported(settings: dict[str, Any]) -> None:
    """Raise ValueError for what torch's optimizers offer beyond ours."""
    for name in ("amsgrad", "differentiable"):
        if settings.get(name):
            raise ValueError(f"{name}=True is not supported: use torch.optim's optimizer for it")


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """Raise ValueError unless value is a number, 0 or more and below `most`; a learning rate may be a tensor of one."""
    if name == "lr" and isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not value.is_cpu:
            return  # reading it would wait for the device
        value = value.item()
    if not (isinstance(value, Real) and 0 <= float(value) < most):
        kind = "a finite number, 0 or more" if most == math.inf else f"a number in [0, {most:g})"
        raise ValueError(f"{name} must be {kind}, and is {value!r}")


def chosen_betas(betas: Any, beta1: float | None, beta2: float | None) -> tuple[float, float]:
    """The two betas, of which each may be given by its own name instead. Raises ValueError for what is no pair."""
    check_betas(betas)
    return betas[0] if beta1 is None else beta1, betas[1] if beta2 is None else beta2


def check_betas(betas: Any) -> None:
    """Raise ValueError unless betas are two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), and are {betas!r}")
    for name, value in zip(("beta1", "beta2"), betas, strict=True):
        check_number(name, value, 1)
