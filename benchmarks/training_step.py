"""Whole QLoRA training steps of language models: this package, and PEFT + bitsandbytes NF4 under bf16 autocast.

Rank 16 on all linear layers, loss on every token, gradient clipping, AdamW (the peer's is torch's fused one). Both
load the same bfloat16 checkpoint. Each run has a process of its own; the sides take turns. Each is as it is installed,
and with malloc told to keep freed memory, which `entrenar finetune` does for itself. Peaks are the process's resident
set: over its whole life (loading included), and from the first step on. floor_ms is what the products of a step take at
least on this machine, in bfloat16, and of_floor its fraction of a step's time. Neither activations computed anew count,
nor bytes, which take less.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Floor, Work, floor, print_table, refuse_if_red, write

TESTS = ("tests/autograd", "tests/fusion", "tests/lora", "tests/optim")
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
SIDES = {
    "entrenar, int8 activations": ("ours int8", {}),
    "entrenar": ("ours", {}),
    "PEFT + bitsandbytes": ("peers", {}),
    "entrenar, freed memory kept": ("ours", KEEP_FREED_MEMORY),
    "PEFT + bitsandbytes, freed memory kept": ("peers", KEEP_FREED_MEMORY),
}
RANK, ALPHA, LR, MAX_NORM = 16, 32, 2e-4, 1.0


Step = Callable[[Any], float]
"""Takes token ids [batch, length], returns the loss."""


def ours(directory: Path, activations: str | None = None) -> tuple[Step, float]:
    """The step, and the seconds that loading and wrapping took."""
    from entrenar.checkpoint import load_pretrained
    from entrenar.lora.wrap import wrap
    from entrenar.optim import AdamW
    from entrenar.training import causal_lm_loss

    start = time.perf_counter()
    model = load_pretrained(directory, bits=4)
    wrap(model, rank=RANK, alpha=ALPHA, activations=activations)
    load_seconds = time.perf_counter() - start
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=LR, max_norm=MAX_NORM)
    model.train()

    def step(ids: Any) -> float:
        loss = causal_lm_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, load_seconds


def peers(directory: Path) -> tuple[Step, float]:
    """The step, and the seconds that loading and wrapping took."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    start = time.perf_counter()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=nf4, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    load_seconds = time.perf_counter() - start
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    model.train()

    def step(ids: torch.Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, load_seconds


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status gives no VmHWM")


def run_side(side: str, directory: Path) -> dict[str, Any]:
    """Load, take one step to warm up and then the timed ones; in the process that is measured."""
    from benchmarks.models import load_tokens, operations

    tokens = load_tokens(directory)
    sides = {"ours": ours, "ours int8": functools.partial(ours, activations="int8"), "peers": peers}
    step, load_seconds = sides[side](directory)
    peak_loading = peak_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM
    losses, seconds = [], []
    for ids in tokens:
        start = time.perf_counter()
        losses.append(step(ids))
        seconds.append(time.perf_counter() - start)
    peak_training = peak_bytes()
    return {
        "load_seconds": load_seconds,
        "step_seconds": seconds[1:],
        "losses": losses,
        "operations": operations(directory, *tokens.shape[1:], RANK),
        "peak_bytes": max(peak_loading, peak_training),
        "peak_bytes_training": peak_training,
    }


def in_process(arguments: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "benchmarks.training_step", *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return result.stdout


@dataclass(frozen=True)
class Workload:
    model: str
    batch_size: int
    length: int

    def __str__(self) -> str:
        return f"{self.model}, {self.batch_size} x {self.length}"


WORKLOADS = (
    Workload("SmolLM2-135M", 4, 256),
    Workload("SmolLM2-135M", 1, 1024),
    Workload("1B-shaped Llama", 1, 256),
)


def measure(workload: Workload, rounds: int, steps: int, machine: Floor) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        sizes = [str(size) for size in (steps + 1, workload.batch_size, workload.length)]
        in_process(["--prepare", workload.model, directory, *sizes], {})
        for _ in range(rounds):
            for name, (side, environment) in SIDES.items():
                output = in_process(["--side", side, directory], environment)
                runs[name].append(json.loads(output.splitlines()[-1]))
                print(
                    f"{workload}, {name}: {statistics.median(runs[name][-1]['step_seconds']):.3f} s a step", flush=True
                )
    return [
        {"workload": str(workload), "side": name, **summary(workload, results, machine)}
        for name, results in runs.items()
    ]


def summary(workload: Workload, results: list[dict[str, Any]], machine: Floor) -> dict[str, float]:
    seconds = [second for result in results for second in result["step_seconds"]]
    tokens = workload.batch_size * workload.length
    return {
        "tokens_per_second": round(tokens / statistics.median(seconds), 1),
        "best_tokens_per_second": round(tokens / min(seconds), 1),
        **machine.columns(Work(0, 0, results[0]["operations"], "bfloat16"), seconds),
        "peak_gb": round(statistics.median(result["peak_bytes"] for result in results) / 1e9, 3),
        "peak_gb_training": round(statistics.median(r["peak_bytes_training"] for r in results) / 1e9, 3),
        "load_seconds": round(statistics.median(result["load_seconds"] for result in results), 2),
        "first_loss": round(results[0]["losses"][0], 4),
        "last_loss": round(results[0]["losses"][-1], 4),
    }


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the peers', each workload and allocator setting by itself."""
    keys = ("tokens_per_second", "peak_gb", "peak_gb_training", "load_seconds")
    return [
        {"workload": ours["workload"], "ratio": f"{ours['side']} / {theirs['side']}"}
        | {key: round(ours[key] / theirs[key], 3) for key in keys}
        for theirs in rows
        for ours in rows
        if theirs["side"].startswith("PEFT") and ours["side"].startswith("entrenar")
        if theirs["workload"] == ours["workload"] and ("freed" in theirs["side"]) == ("freed" in ours["side"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process, after one to warm up")
    parser.add_argument("--workloads", type=int, nargs="+", default=range(len(WORKLOADS)), metavar="I", help="which")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        from benchmarks.models import prepare

        model, directory, *sizes = arguments.prepare
        prepare(model, Path(directory), *map(int, sizes))
        return
    if arguments.side:
        side, directory = arguments.side
        print(json.dumps(run_side(side, Path(directory))))
        return
    refuse_if_red(*TESTS)
    machine = floor()
    rows = [
        row for i in arguments.workloads for row in measure(WORKLOADS[i], arguments.rounds, arguments.steps, machine)
    ]
    print_table(rows)
    compared = ratios(rows)
    print_table(compared)
    write("training_step", {"rank": RANK, "alpha": ALPHA, "rows": rows, "ratios": compared, "floor": asdict(machine)})


if __name__ == "__main__":
    main()
