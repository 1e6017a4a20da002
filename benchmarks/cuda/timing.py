"""Timing on a GPU, what the GPU can do, and the record of a measurement under benchmarks/results/cuda/."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch

from benchmarks.harness import RESULTS, ROOT

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel")
BEYOND_CACHE = 4
"""Weights that are used in turn take this many times the L2 cache, so that none is found there again."""

Call = Callable[[int], Any]
"""A contender's work on the i-th of the weights that are used in turn."""


def copies_beyond_cache(weight_bytes: int) -> int:
    """How many weights must be used in turn for each to come from memory."""
    return max(1, math.ceil(BEYOND_CACHE * torch.cuda.get_device_properties().L2_cache_size / weight_bytes))


def interleaved(contenders: Mapping[str, Call], copies: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Microseconds of one call of each contender: the median, the least, and whether a CUDA graph was replayed.

    A round runs every contender on all copies once. A graph leaves out what the CPU takes to launch the kernels; work
    that cannot be captured is launched call by call, and says so.
    """
    runs = {name: _captured(call, copies) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, _) in runs.items():
            times[name].append(1e3 * _milliseconds(run) / copies)
    return {
        name: {
            "median_us": round(statistics.median(us), 2),
            "min_us": round(min(us), 2),
            "graph": runs[name][1],
        }
        for name, us in times.items()
    }


def _captured(call: Call, copies: int) -> tuple[Callable[[], Any], bool]:
    def run() -> None:
        for i in range(copies):
            call(i)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        return run, False
    graph.replay()
    return graph.replay, True


def _milliseconds(run: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def floor() -> dict[str, float]:
    """What the GPU can do: a copy within its memory, bytes read and written, and torch's bfloat16 product."""
    source = torch.ones(2**29, device="cuda")
    target = torch.empty_like(source)
    # A kernel that writes what it reads; the driver's own copy is slower on some GPUs.
    copied = interleaved({"": lambda _: torch.neg(source, out=target)}, 4, 9)[""]["median_us"]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = interleaved({"": lambda _: a @ b}, 4, 9)[""]["median_us"]
    return {
        "copy_gb_per_second": round(2 * source.nbytes / copied / 1e3, 1),
        "bfloat16_tflop_per_second": round(2 * 8192**3 / multiplied / 1e6, 1),
    }


def floor_us(machine: Mapping[str, float], moved: float, operations: float) -> float:
    """The least time, in microseconds, that the machine takes to move so many bytes and do so many operations."""
    memory = moved / (1e3 * machine["copy_gb_per_second"])
    return max(memory, operations / (1e6 * machine["bfloat16_tflop_per_second"]))


def circumstances(module: str) -> dict[str, Any]:
    """The GPU, versions, commit and date; no host name and no path."""
    properties = torch.cuda.get_device_properties()
    driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": os.environ.get("ENTRENAR_COMMIT") or _output("git rev-parse --short HEAD"),
        "command": f"python -m benchmarks.cuda.{module}",
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": round(properties.L2_cache_size / 2**20, 1),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": _output(driver).splitlines()[:1],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(command: str) -> str:
    try:
        done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write(name: str, results: dict[str, Any]) -> None:
    """Write benchmarks/results/cuda/<name>.json: the circumstances, then the results; replaced only when whole."""
    folder = RESULTS / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    beside = path.with_suffix(".json.saving")
    beside.write_text(json.dumps({**circumstances(name), **results}, indent=2) + "\n")
    os.replace(beside, path)
    print(f"written to {path.relative_to(ROOT)}", flush=True)
