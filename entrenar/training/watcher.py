"""Whoever follows a run."""

from __future__ import annotations

from typing import Protocol

from entrenar.training.metrics import StepMetrics


class Watcher(Protocol):
    """Whoever follows a run: `say` gets remarks, `step` each step's figures and the number of steps in all."""

    def say(self, text: str) -> None:
        """Take a remark, one line."""

    def step(self, row: StepMetrics, total_steps: int) -> None:
        """Take the figures of a finished step."""


class Nobody:
    """A watcher that ignores everything."""

    def say(self, text: str) -> None:
        """Ignore it."""

    def step(self, row: StepMetrics, total_steps: int) -> None:
        """Ignore it."""
