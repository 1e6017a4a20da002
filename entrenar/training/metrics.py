"""What a run leaves to look at: metrics.jsonl, loss.png and report.json."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from entrenar.lora.adapter.files import write_file


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: `loss` in nats per labelled token, `grad_norm` before clipping, `tokens` without padding."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    heldout_loss: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Input tokens, answers and prompts alike, per second of training."""
        return self.tokens / self.seconds


class MetricsLog:
    """metrics.jsonl, one line a step; opening it keeps the lines of steps 1 to `last_step` and drops later ones."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.rows = [row for row in _read_rows(path) if row.step <= last_step]
        _write_text(path, "".join(map(_line, self.rows)))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, row: StepMetrics) -> None:
        """Append a step, readable by others at once."""
        self.rows.append(row)
        self._file.write(_line(row))
        self._file.flush()


def _line(row: StepMetrics) -> str:
    return json.dumps({key: value for key, value in asdict(row).items() if value is not None}) + "\n"


def _read_rows(path: Path) -> list[StepMetrics]:
    if not path.exists():
        return []
    # A run that was killed may leave half a line behind its last one.
    return [StepMetrics(**json.loads(line)) for line in path.read_text("utf-8").splitlines(True) if line.endswith("\n")]


def plot_losses(path: Path, rows: Sequence[StepMetrics], heldout_losses: dict[int, float]) -> None:
    """Draw the training loss of each step, its running mean and the held-out losses by step into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="training, each step")
    axes.plot(steps, running_mean(losses), color="#1f4e8c", linewidth=1.8, label="training, running mean")
    axes.plot(
        list(heldout_losses), list(heldout_losses.values()), "o--", color="#c4502e", linewidth=1.0, label="held-out"
    )
    for step, loss in heldout_losses.items():
        axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
    axes.margins(x=0.06, y=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_file(path, lambda beside: figure.savefig(beside, format="png"))


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Return the exponential moving average of `values`, corrected for its start at zero (as in Adam)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        means.append(mean / (1 - keep**count))
    return means


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as indented JSON."""
    _write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    write_file(path, write)


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("entrenar", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory taken so far: by this process, or on a CUDA device by its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage, this starts anew with the program: a large parent process does not count.
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
