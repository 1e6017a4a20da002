"""A run as one watches it: a live line in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from entrenar.training.metrics import StepMetrics

LOG_SECONDS = 10.0


class TerminalWatcher:
    """A watcher that prints; a context manager around the run.

    In a terminal the figures of the last step stand in one line that is rewritten; elsewhere a line is printed for
    the first step, for the last, and every ten seconds between.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=console)
        self._seconds_per_step = 0.0
        self._printed = -LOG_SECONDS

    def __enter__(self) -> TerminalWatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live.tasks:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a remark, above the live line."""
        self._console.print(text, markup=False, highlight=False)

    def step(self, row: StepMetrics, total_steps: int) -> None:
        """Show a step's figures."""
        previous = self._seconds_per_step or row.seconds
        self._seconds_per_step = 0.8 * previous + 0.2 * row.seconds
        line = progress_line(row, total_steps, self._seconds_per_step)
        if self._console.is_terminal:
            if not self._live.tasks:
                self._live.add_task(line)
                self._live.start()
            self._live.update(self._live.tasks[0].id, description=line, completed=row.step, total=total_steps)
        elif row.step == total_steps or time.monotonic() - self._printed >= LOG_SECONDS:
            self._printed = time.monotonic()
            self.say(line)


def progress_line(row: StepMetrics, total_steps: int, seconds_per_step: float) -> str:
    """Return a step's figures as one line of text."""
    minutes, seconds = divmod(round((total_steps - row.step) * seconds_per_step), 60)
    return "  ".join(
        [
            f"step {row.step}/{total_steps}",
            f"loss {row.loss:.3f}",
            f"lr {row.lr:.1e}",
            f"{row.tokens_per_second:.0f} tokens/s",
            f"ETA {minutes}:{seconds:02d}",
            f"peak {row.peak_memory_bytes / 2**30:.2f} GiB",
        ]
    )


def describe_report(report: dict[str, Any], out: Path) -> str:
    """Return what a finished run came to, with its sample answers, as text."""
    before, after = report["heldout_loss_before"], report["heldout_loss_after"]
    lines = []
    for sample in report["samples"]:
        lines += ["", sample["prompt"].strip()]
        lines += [f"  {key:>6}: {' '.join(sample[key].split())}" for key in ("wanted", "before", "after")]
    lines += [
        "",
        f"held-out loss {before:.4f} -> {after:.4f} ({after / before - 1:+.1%}) after {report['steps']} steps, "
        f"{report['tokens_per_second']:.0f} tokens/s, peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"adapter: {out / 'adapter'}   also in {out}: loss.png, metrics.jsonl, report.json",
    ]
    return "\n".join(lines)
