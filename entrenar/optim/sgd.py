"""SGD: its update in plain torch, and the optimizer with states of 32 and of 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.optim.base import KernelOptimizer, Params, define_step
from entrenar.optim.rounding import add_
from entrenar.optim.settings import check_number

define_step("sgd_", "float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize")


def sgd_update_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    step: int,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """One SGD update, in place on `param` and `momentum_buffer`, as in `torch.optim.SGD`; `step` counts from 1.

    All tensors have the parameter's shape, dtype and device. The buffer, needed where there is momentum, begins as the
    first gradient.
    """
    if weight_decay:
        grad = add_(grad.clone(), param, weight_decay)
    if momentum_buffer is not None:
        if step == 1:
            momentum_buffer.copy_(grad)
        else:
            add_(momentum_buffer.mul_(momentum), grad, 1 - dampening)
        grad = add_(grad.clone(), momentum_buffer, momentum) if nesterov else momentum_buffer
    add_(param, grad, -lr)


class SGD(KernelOptimizer):
    """Stochastic gradient descent, as `torch.optim.SGD`: same rule, same habits.

    The state of a parameter is `step` and, where there is momentum, `momentum_buffer`. `learning_rate` is a long name
    of `lr`; what else there is, `maximize`, `max_norm`, `stochastic_rounding` and the errors, is as in `Adam`.
    """

    STATES = ("momentum_buffer",)
    SIGNED = (True,)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        learning_rate: float | None = None,
        **more: Any,
    ) -> None:
        defaults = {
            "lr": lr if learning_rate is None else learning_rate,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults, max_norm=max_norm, **more)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, settings[name])
        if settings["nesterov"] and (settings["momentum"] == 0 or settings["dampening"] != 0):
            raise ValueError("nesterov needs a momentum, and no dampening")

    def _states(self, group: dict[str, Any]) -> int:
        return 1 if group["momentum"] else 0

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor, states: list[Tensor], step: int) -> None:
        settings = {name: group[name] for name in ("momentum", "dampening", "weight_decay", "nesterov")}
        sgd_update_(param, grad, states[0] if states else None, step, lr=float(group["lr"]), **settings)

    def _step_op(self, group: dict[str, Any], lists: tuple[Any, ...]) -> None:
        torch.ops.entrenar.sgd_(
            *lists,
            float(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            group["nesterov"],
            group["maximize"],
        )


class SGD8bit(SGD):
    """SGD whose momentum takes 1.02 bytes a parameter instead of 4; see AdamW8bit."""

    BITS = 8

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        min_8bit_size: int = 4096,
        **settings: Any,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, min_8bit_size=min_8bit_size, **settings
        )
