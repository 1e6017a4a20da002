"""How to train: the settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from entrenar.optim import AdamW, AdamW8bit, Lion

OPTIMIZERS = {"adamw": AdamW, "adamw8bit": AdamW8bit, "lion": Lion}


@dataclass(frozen=True)
class FinetuneConfig:
    """How to train.

    `epochs` over the data, unless `max_steps` optimizer steps are given; a step takes `accumulation` batches of
    `batch_size` examples and divides by the labelled tokens of all of them. The learning rate climbs to `lr` over the
    first `warmup` (a share of the steps) and falls to a tenth of it along a cosine. `clip_norm` bounds the gradients'
    global norm, `checkpoint_every` counts steps, and `seed` decides the order of the data and the dropout. With
    `recompute` the activations within a decoder layer are computed anew in the backward: a fraction of the memory, for
    about a third more time. `optimizer` is "adamw", "adamw8bit", whose states take a quarter of the bytes, or "lion",
    whose `lr` should be a third of AdamW's or less.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 50
    recompute: bool = False
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        """Check the numbers; raises ValueError naming the one that makes no sense."""
        for name in ("epochs", "batch_size", "accumulation", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {self.max_steps}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, not {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number, 0 or more, not {self.weight_decay}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be greater than 0, not {self.clip_norm}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number of 64 bits, not {self.seed}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, at least 0 and below 1, not {self.warmup}")
