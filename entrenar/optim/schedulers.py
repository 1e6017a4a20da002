"""Learning rates as functions of the step; attached to an optimizer, they are torch's schedulers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Schedule(ABC):
    """A learning rate for every step: a linear warm-up to `initial_lr`, then what a subclass says.

    It holds no state: `get_lr(step)` is a function of the step alone, so a resumed run needs nothing but its step
    count. Step 0 is the first. During the warm-up the rate climbs by `initial_lr / (warmup_steps + 1)` a step and is
    never zero; it reaches `initial_lr` at step `warmup_steps`.
    """

    initial_lr: float

    def get_lr(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0; ValueError if it is negative."""
        if step < 0:
            raise ValueError(f"steps count from 0, and this one is {step}")
        warmup = self._warmup()
        if step < warmup:
            return self.initial_lr * (step + 1) / (warmup + 1)
        return self._after_warmup(step - warmup)

    def attach(self, optimizer: Optimizer, last_epoch: int = -1) -> ScheduleLR:
        """A torch scheduler of `optimizer` that follows this schedule; see ScheduleLR."""
        return ScheduleLR(optimizer, self, last_epoch)

    @abstractmethod
    def _warmup(self) -> int: ...

    @abstractmethod
    def _after_warmup(self, step: int) -> float: ...


@dataclass(frozen=True)
class ConstantScheduler(Schedule):
    """`initial_lr` after a linear warm-up, or from the beginning.

    Raises ValueError unless initial_lr is finite and 0 or more, and warmup_steps is 0 or more.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_rates(self.initial_lr)
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, and is {self.warmup_steps!r}")

    def _warmup(self) -> int:
        return self.warmup_steps

    def _after_warmup(self, step: int) -> float:
        return self.initial_lr


@dataclass(frozen=True)
class StepScheduler(Schedule):
    """After the warm-up, `initial_lr` times `gamma` for each `step_size` steps that went by.

    Raises ValueError unless initial_lr is finite and 0 or more, 0 <= gamma <= 1, step_size is at least 1, and
    warmup_steps is 0 or more.
    """

    gamma: float
    step_size: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_rates(self.initial_lr)
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, and is {self.gamma!r}")
        if self.step_size < 1 or self.warmup_steps < 0:
            raise ValueError(
                f"step_size must be at least 1 and warmup_steps 0 or more; "
                f"they are {self.step_size!r} and {self.warmup_steps!r}"
            )

    def _warmup(self) -> int:
        return self.warmup_steps

    def _after_warmup(self, step: int) -> float:
        return self.initial_lr * self.gamma ** (step // self.step_size)


@dataclass(frozen=True)
class CosineScheduler(Schedule):
    """Cosine annealing of the learning rate from `initial_lr` to `min_lr`, after a linear warm-up.

    It reaches `min_lr` at step `total_steps`, where it stays.

    Raises ValueError unless 0 <= min_lr <= initial_lr, both finite, and 0 <= warmup_steps < total_steps.
    """

    min_lr: float
    total_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_rates(self.initial_lr, self.min_lr)
        _check_steps(self.warmup_steps, self.total_steps)

    def _warmup(self) -> int:
        return self.warmup_steps

    def _after_warmup(self, step: int) -> float:
        progress = min(1.0, step / (self.total_steps - self.warmup_steps))
        return self.min_lr + (self.initial_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WSDScheduler(Schedule):
    """Warm-up, stable, decay: `initial_lr` until `decay_steps` before the end, then down to `min_lr` in a line.

    It reaches `min_lr` at step `total_steps`, where it stays.

    Raises ValueError unless 0 <= min_lr <= initial_lr, both finite, 0 <= warmup_steps < total_steps, and
    0 <= decay_steps <= total_steps - warmup_steps.
    """

    min_lr: float
    total_steps: int
    decay_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_rates(self.initial_lr, self.min_lr)
        _check_steps(self.warmup_steps, self.total_steps)
        if not 0 <= self.decay_steps <= self.total_steps - self.warmup_steps:
            raise ValueError(
                f"decay_steps must be between 0 and total_steps - warmup_steps, and is {self.decay_steps!r}"
            )

    def _warmup(self) -> int:
        return self.warmup_steps

    def _after_warmup(self, step: int) -> float:
        left = max(0, self.total_steps - self.warmup_steps - step)
        if left >= self.decay_steps:
            return self.initial_lr if left else self.min_lr
        return self.min_lr + (self.initial_lr - self.min_lr) * left / self.decay_steps


class ScheduleLR(LRScheduler):
    """A schedule that sets the learning rates of an optimizer, as torch's schedulers do: `step()`, `state_dict()`.

    A group whose own rate differs from the schedule's `initial_lr` keeps that ratio, as LoRA+'s do.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, last_epoch: int = -1) -> None:
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the schedule, which is a function of the step."""
        return {name: value for name, value in super().state_dict().items() if name != "schedule"}

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of every group at this step."""
        lr, initial = self.schedule.get_lr(max(0, self.last_epoch)), self.schedule.initial_lr
        share = lr / initial if initial else 0.0
        return [lr if base == initial else base * share for base in map(float, self.base_lrs)]


def _check_rates(initial_lr: float, min_lr: float = 0.0) -> None:
    if not 0 <= min_lr <= initial_lr < math.inf:
        raise ValueError(
            f"the learning rates must be finite with 0 <= min_lr <= initial_lr; "
            f"min_lr is {min_lr!r}, initial_lr is {initial_lr!r}"
        )


def _check_steps(warmup_steps: int, total_steps: int) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"the steps must satisfy 0 <= warmup_steps < total_steps; "
            f"warmup_steps is {warmup_steps!r}, total_steps is {total_steps!r}"
        )
