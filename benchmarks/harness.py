"""Paired timing, the circumstances of a measurement, and its record under benchmarks/results/, by CPU level."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("entrenar", "torch", "transformers", "peft", "bitsandbytes")


def refuse_if_red(*tests: str) -> None:
    """Run these tests, and stop where one fails: the speed of a wrong result is no result."""
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise SystemExit(f"nothing was measured: {' '.join(command[1:])} does not pass")


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` single calls of each contender, one call of each a round, in a rotating order.

    A drift of the machine hits all contenders alike, so ratios hold where absolute times do not. Before each call the
    caches are filled with other data, as they are when a layer's turn comes in a model.
    """
    import torch

    others = torch.ones(64 * 2**20)
    names = list(contenders)
    for name in names:
        contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            others.sum()
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rotated(contenders: Mapping[str, Sequence[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call: in each of `rounds` rounds every contender makes its calls, one after the other.

    With calls that read different memory, more of it than the caches hold, the layers of a model take turns like this:
    their code is at hand, and their weights are not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for calls in contenders.values():
        calls[0]()
    for _ in range(rounds):
        for name, calls in contenders.items():
            start = time.perf_counter()
            for call in calls:
                call()
            seconds[name].append((time.perf_counter() - start) / len(calls))
    return seconds


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long theirs takes: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


@dataclass(frozen=True)
class Work:
    """What a problem takes, however it is solved: bytes, each read and written once, and operations of its products."""

    read: float
    written: float
    operations: float = 0
    dtype: str = "float32"  # of the products' operands


@dataclass(frozen=True)
class Floor:
    """What the machine can do at best."""

    read_gb_per_second: float
    moved_gb_per_second: float  # read and written, about as much of the one as of the other
    float32_gflop_per_second: float
    bfloat16_gflop_per_second: float

    def milliseconds(self, work: Work) -> float:
        """The least time that the work takes: of its bytes or of its operations, whichever is longer."""
        rate = getattr(self, f"{work.dtype}_gflop_per_second")
        bounds = (
            work.read / self.read_gb_per_second,
            (work.read + work.written) / self.moved_gb_per_second,
            work.operations / rate,
        )
        return max(bounds) / 1e6

    def columns(self, work: Work, seconds: Sequence[float]) -> dict[str, float]:
        """For a row of results: the least time, and its fraction of the median of these seconds."""
        least = self.milliseconds(work)
        return {"floor_ms": round(least, 4), "of_floor": round(least / 1e3 / statistics.median(seconds), 3)}


def floor() -> Floor:
    """Measure it by torch: a matrix times a vector, past the caches; a step of fused SGD, past them; large products."""
    import torch

    from entrenar.autograd.ops._product import multiplies_fast

    big, vector = torch.ones(16384, 4096), torch.ones(4096)
    read = min(interleaved({"": lambda: big @ vector}, 10)[""])
    # It reads parameter, gradient and momentum, and writes two of them: no plain operation has as many streams at once.
    param = torch.nn.Parameter(big)
    param.grad = torch.ones_like(big)
    move = min(interleaved({"": torch.optim.SGD([param], momentum=0.9, fused=True).step}, 10)[""])

    def rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(rows, 4096).to(dtype) for rows in (2048, 4096))
        if not multiplies_fast(dtype, a.device):
            return rate(torch.float32)  # to which it is converted first
        return 2 * a.shape[0] * b.numel() / min(interleaved({"": lambda: a @ b}, 10)[""]) / 1e9

    return Floor(
        read_gb_per_second=round(big.nbytes / read / 1e9, 1),
        moved_gb_per_second=round(5 * big.nbytes / move / 1e9, 1),
        float32_gflop_per_second=round(rate(torch.float32), 1),
        bfloat16_gflop_per_second=round(rate(torch.bfloat16), 1),
    )


def circumstances() -> dict[str, Any]:
    """Machine, versions, commit and date; no host name and no path."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem}" + "".join(f" {word}" for word in sys.argv[1:]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def results_folder() -> Path:
    """Where results of the CPU level in use lie."""
    from entrenar.autograd.ops import cpu_level

    return RESULTS / cpu_level()


def write(name: str, results: dict[str, Any]) -> None:
    """Write <name>.json among the results of this CPU level: the circumstances, then the results."""
    path = results_folder() / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".json.saving")
    beside.write_text(json.dumps({**circumstances(), **results}, indent=2) + "\n")
    os.replace(beside, path)
    print(f"written to {path.relative_to(ROOT)}")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys in columns."""
    cells = [list(rows[0]), *([_show(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
