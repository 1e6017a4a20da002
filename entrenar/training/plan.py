"""Which examples each step of a run trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from entrenar.training.batches import Example, epoch_batches
from entrenar.training.config import FinetuneConfig


class Plan:
    """The batches of every step: a function of the examples' lengths and the configuration, without state.

    Examples that are packed come in any order; others in batches of about one length.
    """

    def __init__(self, examples: Sequence[Example], config: FinetuneConfig, packed: bool) -> None:
        lengths = [len(example.input_ids) for example in examples]
        self.steps_per_epoch = math.ceil(math.ceil(len(examples) / config.batch_size) / config.accumulation)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        self._accumulation = config.accumulation
        # Consecutive steps ask for the same epoch.
        self._epoch = lru_cache(maxsize=1)(
            lambda epoch: epoch_batches(lengths, config.batch_size, config.seed, epoch, packed)
        )

    def batches(self, step: int) -> list[list[int]]:
        """Return the batches of a step (counted from 1), as lists of indices of examples."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        return self._epoch(epoch)[within * self._accumulation : (within + 1) * self._accumulation]

    def is_milestone(self, step: int) -> bool:
        """Return whether a quarter of the run ends with this step."""
        return step * 4 % self.total_steps < 4
