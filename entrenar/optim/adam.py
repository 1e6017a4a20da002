"""Adam: its update in plain torch, and the optimizer with states of 32 and of 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entrenar.optim.base import KernelOptimizer, Params, define_step
from entrenar.optim.rounding import add_, lerp_, sqrt, square_add_
from entrenar.optim.settings import check_betas, check_number, chosen_betas

if TYPE_CHECKING:
    from typing_extensions import Self

define_step("adam_", "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize")


def adam_update_(
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
    weight_decay: float = 0.0,
) -> None:
    """One Adam update, in place on `param`, `exp_avg` and `exp_avg_sq`; `step` counts from 1.

    All four tensors have the parameter's shape, dtype and device. The decay, `weight_decay * param`, is a part of the
    gradient (Kingma and Ba, 2015, with an L2 penalty), as in `torch.optim.Adam`.
    """
    if weight_decay:
        grad = add_(grad.clone(), param, weight_decay)
    lerp_(exp_avg, grad, 1 - beta1)
    square_add_(exp_avg_sq.mul_(beta2), grad, 1 - beta2)
    step_size = lr / (1 - beta1**step)
    denominator = (sqrt(exp_avg_sq) / math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)


class Adam(KernelOptimizer):
    """Adam with an L2 penalty, as `torch.optim.Adam`: same rule, same state names, same habits.

    `params` is an iterable of real floating-point tensors, of named ones, or of group dicts, each of which may have its
    own settings. `learning_rate`, `beta1`, `beta2` and `epsilon` are long names of the same settings; a long name that
    is given stands in place of the short one. A learning rate may be a tensor of one element. The state of a parameter
    is `step`, `exp_avg` and `exp_avg_sq`, in the parameter's dtype, so that state_dicts go both ways between this class
    and torch's. All parameters of a group take their step in one call of a kernel, where there is one: for float32,
    bfloat16 and float16 on the CPU and on CUDA.

    Args:
        maximize: step along the gradient instead of against it.
        max_norm: bound of the global norm of all gradients. `grad_norm` then holds their norm before (a scalar tensor),
            and a step in which it is not finite is left out, counted in `skipped_steps`, and reported by a warning, on
            CUDA by the count alone. The gradients themselves stay as they are.
        stochastic_rounding: round bfloat16 parameters up or down with probabilities that make the mean exact, so that
            steps smaller than their precision are not lost; states are then float32. The draws depend on `seed`, the
            step, the element's index and its gradient alone.
        foreach, fused, capturable: taken for torch's sake; the one implementation is all of these.
        amsgrad, differentiable: refused where true.

    Raises ValueError for a setting out of range, TypeError for a parameter that is not real floating point, and
    RuntimeError, before anything is changed, for a sparse gradient.
    """

    STATES = ("exp_avg", "exp_avg_sq")
    SIGNED = (True, False)
    DECOUPLED = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        learning_rate: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        epsilon: float | None = None,
        **more: Any,
    ) -> None:
        defaults = {
            "lr": lr if learning_rate is None else learning_rate,
            "betas": chosen_betas(betas, beta1, beta2),
            "eps": eps if epsilon is None else epsilon,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults, max_norm=max_norm, amsgrad=amsgrad, **more)

    @classmethod
    def default_params(cls, learning_rate: float) -> Callable[[Params], Self]:
        """What makes this optimizer of parameters, with every setting but the learning rate as it is by default.

        `Adam.default_params(learning_rate=0.001)(model.parameters())`.
        """
        return partial(cls, lr=learning_rate)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, settings[name])
        check_betas(settings["betas"])
        if settings.get("decoupled_weight_decay") and settings["weight_decay"] and not self.DECOUPLED:
            raise ValueError("decoupled_weight_decay is AdamW's: use that")

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor, states: list[Tensor], step: int) -> None:
        beta1, beta2 = group["betas"]
        settings = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        adam_update_(param, grad, states[0], states[1], step, **settings, weight_decay=group["weight_decay"])

    def _step_op(self, group: dict[str, Any], lists: tuple[Any, ...]) -> None:
        torch.ops.entrenar.adam_(
            *lists,
            float(group["lr"]),
            *map(float, group["betas"]),
            float(group["eps"]),
            float(group["weight_decay"]),
            self.DECOUPLED,
            group["maximize"],
        )


class Adam8bit(Adam):
    """Adam whose states take 2.03 bytes a parameter instead of 8; see AdamW8bit."""

    BITS = 8

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, min_8bit_size=min_8bit_size, **settings)
