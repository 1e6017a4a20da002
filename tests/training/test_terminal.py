from __future__ import annotations

import io

from rich.console import Console

from entrenar.training.metrics import StepMetrics
from entrenar.training.terminal import TerminalWatcher, progress_line


def row(step: int) -> StepMetrics:
    return StepMetrics(step, 2.34567, 5e-4, 1.0, tokens=600, seconds=2.0, peak_memory_bytes=3 * 2**29, heldout_loss=1.0)


def test_the_line_has_every_figure() -> None:
    line = "step 10/100  loss 2.346  lr 5.0e-04  300 tokens/s  ETA 3:00  peak 1.50 GiB"
    assert progress_line(row(10), 100, seconds_per_step=2.0) == line


def watch(terminal: bool, steps: int) -> str:
    file = io.StringIO()
    with TerminalWatcher(Console(file=file, force_terminal=terminal, soft_wrap=True, width=120)) as watcher:
        watcher.say("data.jsonl: [3] examples")
        for step in range(1, steps + 1):
            watcher.step(row(step), steps)
    return file.getvalue()


def test_a_log_gets_the_first_and_the_last_step() -> None:
    lines = watch(terminal=False, steps=50).splitlines()
    assert lines[0] == "data.jsonl: [3] examples"
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 1/50", "step 50/50"]


def test_a_terminal_gets_a_line_that_is_rewritten() -> None:
    output = watch(terminal=True, steps=50)
    assert "step 50/50" in output
    assert "\r" in output
    assert output.count("\n") < 10
