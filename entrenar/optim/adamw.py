"""AdamW: its update in plain torch, the kernel of the same, and the optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from entrenar.autograd.ops._kernel import has_kernel
from entrenar.autograd.ops._library import define


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
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)


def _adamw_fake(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    return None


# The same update of many contiguous parameters of one dtype, computed in float32 and rounded once.
define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, int step, float lr, "
    "float beta1, float beta2, float eps, float weight_decay) -> ()",
    _adamw_fake,
)


class AdamW(Optimizer):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`: same rule, same state names, same habits.

    `params` is an iterable of real floating-point tensors or of group dicts, each of which may set its own `lr`,
    `betas`, `eps` and `weight_decay`. `learning_rate`, `beta1`, `beta2` and `epsilon` are long names of the same
    settings; a long name that is given stands in place of the short one. The state of a parameter is `step`, `exp_avg`
    and `exp_avg_sq`, in the parameter's dtype, so that state_dicts go both ways between this class and torch's.

    Raises ValueError for a setting out of range, TypeError for a parameter that is not real floating point, and
    RuntimeError, before anything is changed, for a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        learning_rate: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        epsilon: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr if learning_rate is None else learning_rate,
            "betas": (betas[0] if beta1 is None else beta1, betas[1] if beta2 is None else beta2),
            "eps": eps if epsilon is None else epsilon,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its settings and parameters, as `torch.optim.Optimizer.add_param_group`."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if not param.is_floating_point():
                del self.param_groups[-1]
                raise TypeError(
                    f"AdamW trains real floating-point tensors; parameter {i} of the group is {param.dtype}"
                )

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group; a scheduler's `get_lr(step)` goes here, before `step()`."""
        for group in self.param_groups:
            _check_settings({**group, "lr": lr})
        for group in self.param_groups:
            group["lr"] = lr

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient; returns what `closure`, which recomputes the loss, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            if not self.state[param]:
                self.state[param] = {
                    "step": torch.tensor(0.0, device="cpu"),
                    "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
                }
        beta1, beta2 = group["betas"]
        settings = {"lr": group["lr"], "beta1": beta1, "beta2": beta2}
        settings |= {"eps": group["eps"], "weight_decay": group["weight_decay"]}
        together: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
        for param in params:
            state = self.state[param]
            state["step"] += 1
            step = int(state["step"].item())
            tensors = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
            if has_kernel(*tensors) and all(tensor.is_contiguous() for tensor in tensors):
                together[param.device, param.dtype, step].append(tensors)
            else:
                adamw_update_(*tensors, step, **settings)
        for (_, _, step), rows in together.items():
            torch.ops.entrenar.adamw_(*map(list, zip(*rows, strict=True)), step, **settings)

    def _refuse_sparse_gradients(self) -> None:
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"AdamW does not take sparse gradients, and parameter {i} of group {g}, of shape "
                        f"{tuple(param.shape)}, has one: build its Embedding with sparse=False"
                    )


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = settings[name]
        if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a finite number, 0 or more, and is {value!r}")
    betas = cast("tuple[Any, Any]", settings["betas"])
    for name, value in zip(("beta1", "beta2"), betas, strict=True):
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ValueError(f"{name} must be a number in [0, 1), and is {value!r}")
