from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineScheduler:
    """Cosine annealing of the learning rate from `initial_lr` to `min_lr`, after a linear warm-up.

    It holds no state: `get_lr(step)` is a function of the step alone, so a resumed run needs nothing but its step
    count. Step 0 is the first. During the warm-up the rate climbs by `initial_lr / (warmup_steps + 1)` a step and is
    never zero; it reaches `initial_lr` at step `warmup_steps` and `min_lr` at step `total_steps`, where it stays.

    Raises ValueError unless 0 <= min_lr <= initial_lr, both finite, and 0 <= warmup_steps < total_steps.
    """

    initial_lr: float
    min_lr: float
    total_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.initial_lr < math.inf:
            raise ValueError(
                f"the learning rates must be finite with 0 <= min_lr <= initial_lr; "
                f"min_lr is {self.min_lr!r}, initial_lr is {self.initial_lr!r}"
            )
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"the steps must satisfy 0 <= warmup_steps < total_steps; "
                f"warmup_steps is {self.warmup_steps!r}, total_steps is {self.total_steps!r}"
            )

    def get_lr(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0; ValueError if it is negative."""
        if step < 0:
            raise ValueError(f"steps count from 0, and this one is {step}")
        if step < self.warmup_steps:
            return self.initial_lr * (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr + (self.initial_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2
