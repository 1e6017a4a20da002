"""Lion: its update in plain torch, and the optimizer with states of 32 and of 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.optim.base import KernelOptimizer, Params, define_step
from entrenar.optim.rounding import add_
from entrenar.optim.settings import check_betas, check_number, chosen_betas

define_step("lion_", "float lr, float beta1, float beta2, float weight_decay, bool maximize")


def lion_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """One Lion update (Chen et al., 2023), in place on `param` and `exp_avg`.

    All three tensors have the parameter's shape, dtype and device. The step is the sign of the average that `beta1`
    makes, and the average that is kept is the one that `beta2` makes.
    """
    param.mul_(1 - lr * weight_decay)
    direction = add_(exp_avg * beta1, grad, 1 - beta1).sign()
    add_(param, direction, -lr)
    add_(exp_avg.mul_(beta2), grad, 1 - beta2)


class Lion(KernelOptimizer):
    """Lion: steps of one length, in the direction of a momentum's sign; half of Adam's state.

    Its learning rate is best 3 to 10 times smaller than AdamW's, and its weight decay as much larger. The state of a
    parameter is `step` and `exp_avg`. `learning_rate`, `beta1` and `beta2` are long names; what else there is,
    `maximize`, `max_norm`, `stochastic_rounding` and the errors, is as in `Adam`.
    """

    STATES = ("exp_avg",)
    SIGNED = (True,)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        learning_rate: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        **more: Any,
    ) -> None:
        defaults = {
            "lr": lr if learning_rate is None else learning_rate,
            "betas": chosen_betas(betas, beta1, beta2),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults, max_norm=max_norm, **more)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            check_number(name, settings[name])
        check_betas(settings["betas"])

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor, states: list[Tensor], step: int) -> None:
        beta1, beta2 = group["betas"]
        settings = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
        lion_update_(param, grad, states[0], **settings)

    def _step_op(self, group: dict[str, Any], lists: tuple[Any, ...]) -> None:
        settings = float(group["lr"]), *map(float, group["betas"]), float(group["weight_decay"])
        torch.ops.entrenar.lion_(*lists, *settings, group["maximize"])


class Lion8bit(Lion):
    """Lion whose state takes 1.02 bytes a parameter instead of 4; see AdamW8bit."""

    BITS = 8

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, min_8bit_size=min_8bit_size, **settings)
