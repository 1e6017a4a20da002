"""A step of the optimizers, beside torch's fused ones and bitsandbytes': one large tensor, and the 420 of a LoRA.

times_ours is the time over that of our optimizer of the same rule with states of as many bits, the first row of a kind.
The bytes of states are counted after the steps. floor_ms is what it takes at least on this machine to read and write
the parameters and the states of ours, and to read the gradients, twice where their norm must be known first; of_floor
is its fraction of the contender's time.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import bitsandbytes.optim as bnb
import torch

from benchmarks.harness import Floor, Work, floor, interleaved, print_table, ratio, refuse_if_red, write
from entrenar import optim

TESTS = ("tests/optim",)
SHAPES = {"one of 16.8M": [(4096, 4096)], "420 of 16 x 576": [(16, 576)] * 420}
SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}


def clipped(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> Callable[[], None]:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def contenders(shapes: list[tuple[int, ...]]) -> dict[str, tuple[str, torch.optim.Optimizer, Callable[[], Any]]]:
    """By name: whose time is compared, the optimizer, and a step."""
    makers: dict[str, tuple[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]] = {
        "AdamW": ("AdamW", lambda p: optim.AdamW(p, **SETTINGS)),
        "torch AdamW, fused": ("AdamW", lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True)),
        "bitsandbytes AdamW": ("AdamW", lambda p: bnb.AdamW(p, **SETTINGS)),
        "AdamW, clipped": ("AdamW, clipped", lambda p: optim.AdamW(p, **SETTINGS, max_norm=1.0)),
        "torch AdamW, clipped": ("AdamW, clipped", lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True)),
        "AdamW8bit": ("AdamW8bit", lambda p: optim.AdamW8bit(p, **SETTINGS)),
        "torch AdamW, fused, 32 bits": ("AdamW8bit", lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True)),
        "bitsandbytes AdamW8bit": ("AdamW8bit", lambda p: bnb.AdamW8bit(p, **SETTINGS)),
        "Lion8bit": ("Lion8bit", lambda p: optim.Lion8bit(p, **SETTINGS)),
        "bitsandbytes Lion8bit": ("Lion8bit", lambda p: bnb.Lion8bit(p, **SETTINGS)),
        "SGD, momentum": ("SGD, momentum", lambda p: optim.SGD(p, **SETTINGS, momentum=0.9)),
        "torch SGD, fused": ("SGD, momentum", lambda p: torch.optim.SGD(p, **SETTINGS, momentum=0.9, fused=True)),
    }
    made = {}
    for name, (ours, make) in makers.items():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = make(params)
        step = clipped(optimizer, params) if name == "torch AdamW, clipped" else optimizer.step
        made[name] = (ours, optimizer, step)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of states a parameter, without what all parameters share."""
    shared = ("qmap1", "qmap2")
    tensors = (
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in shared
    )
    elements = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    return sum(tensor.nbytes for tensor in tensors) / elements


def work(elements: int, states: float, *, clipped: bool) -> Work:
    """A step of float32 parameters with so many bytes of states each."""
    return Work(elements * (4 + states + (8 if clipped else 4)), elements * (4 + states))


def measure(rounds: int, machine: Floor) -> list[dict[str, Any]]:
    rows = []
    for title, shapes in SHAPES.items():
        made = contenders(shapes)
        elements = sum(math.prod(shape) for shape in shapes)
        seconds = interleaved({name: step for name, (_, _, step) in made.items()}, rounds)
        states = {name: state_bytes(optimizer) for name, (_, optimizer, _) in made.items()}
        rows += [
            {
                "tensors": title,
                "contender": name,
                "median_ms": round(1e3 * statistics.median(seconds[name]), 3),
                "min_ms": round(1e3 * min(seconds[name]), 3),
                "times_ours": round(ratio(seconds[name], seconds[ours]), 2),
                "state_bytes": round(states[name], 3),
                **machine.columns(work(elements, states[ours], clipped="clipped" in ours), seconds[name]),
            }
            for name, (ours, _, _) in made.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    refuse_if_red(*TESTS)
    torch.manual_seed(0)
    machine = floor()
    rows = measure(arguments.rounds, machine)
    print_table(rows)
    write("optimizers", {"rows": rows, "floor": asdict(machine)})


if __name__ == "__main__":
    main()
