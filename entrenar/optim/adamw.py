"""AdamW: its update in plain torch, and the optimizer with states of 32 and of 8 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from entrenar.optim.adam import Adam, adam_update_
from entrenar.optim.base import Params


def adamw_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update, in place on `param`, `exp_avg` and `exp_avg_sq`; `step` counts from 1.

    All four tensors have the parameter's shape, dtype and device. The decay, `param *= 1 - lr * weight_decay`, comes
    before the step and never enters the moments (Loshchilov and Hutter, 2019), as in `torch.optim.AdamW`.
    """
    param.mul_(1 - lr * weight_decay)
    adam_update_(param, grad, exp_avg, exp_avg_sq, step, lr=lr, beta1=beta1, beta2=beta2, eps=eps)


class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`: same rule, same state names, same habits.

    All but the decay, and its default, is as in `Adam`.
    """

    DECOUPLED = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **settings)

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor, states: list[Tensor], step: int) -> None:
        beta1, beta2 = group["betas"]
        settings = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        adamw_update_(param, grad, states[0], states[1], step, **settings, weight_decay=group["weight_decay"])


class AdamW8bit(AdamW):
    """AdamW whose states take 2.03 bytes a parameter instead of 8.

    The rule is AdamW's; between steps a state is kept in blocks of 256 elements as 8-bit codes of a dynamic map, with a
    float32 maximum for each block (Dettmers et al., 2022). The states of parameters with fewer than `min_8bit_size`
    elements stay float32. A step in which a gradient, or the norm of all, is not finite would spoil its block for good:
    it is left out, counted in `skipped_steps`, and reported by a warning, on CUDA by the count alone.
    """

    BITS = 8

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, min_8bit_size=min_8bit_size, **settings)
