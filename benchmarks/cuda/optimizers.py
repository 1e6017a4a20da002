"""A step of the optimizers on a GPU, beside torch's fused one and bitsandbytes': one large tensor, and 448 of a LoRA.

of_floor is the least time that the bytes take which must be moved, at the rate of a copy in the same run, over the
contender's time; the pass that finds gradients that are not finite reads them once more, and counts. times_ours is the
contender's time over that of our optimizer of the same rule with states of as many bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cuda.timing import floor, floor_us, interleaved, write
from benchmarks.harness import print_table
from entrenar import optim

# Rank 16 beside q, k, v and o (4096 x 4096), gate and up (11008 x 4096) and down of 32 layers: 40M parameters.
LORA = [(16, 4096), (4096, 16)] * 4 + [(16, 4096), (11008, 16)] * 2 + [(16, 11008), (4096, 16)]
SHAPES = {"one of 67M": [(8192, 8192)], "448 of a LoRA, 40M": LORA * 32}
SETTINGS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
ROUNDS = 9

Maker = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def makers() -> dict[str, tuple[str, float, Maker]]:
    """By name: whose time is compared, the bytes that a step moves for a float32 parameter, the optimizer."""
    made: dict[str, tuple[str, float, Maker]] = {
        "AdamW": ("AdamW", 28, lambda p: optim.AdamW(p, **SETTINGS)),
        "torch AdamW, fused": (
            "AdamW",
            28,
            lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True, capturable=True),
        ),
        "AdamW, clipped": ("AdamW, clipped", 32, lambda p: optim.AdamW(p, **SETTINGS, max_norm=1.0)),
        "AdamW8bit": ("AdamW8bit", 20, lambda p: optim.AdamW8bit(p, **SETTINGS)),
        "Lion8bit": ("Lion8bit", 18, lambda p: optim.Lion8bit(p, **SETTINGS)),
        "SGD, momentum": ("SGD, momentum", 20, lambda p: optim.SGD(p, **SETTINGS, momentum=0.9)),
    }
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.optim as bnb

        made["bitsandbytes AdamW8bit"] = ("AdamW8bit", 16, lambda p: bnb.AdamW8bit(p, **SETTINGS))
        made["bitsandbytes Lion8bit"] = ("Lion8bit", 14, lambda p: bnb.Lion8bit(p, **SETTINGS))
    return made


def measure(machine: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for title, shapes in SHAPES.items():
        contenders = {}
        for name, (_, _, make) in makers().items():
            # Not random: a capture that fails, as some peers' do, leaves the GPU's generator unusable.
            params = [torch.nn.Parameter(torch.ones(shape, device="cuda")) for shape in shapes]
            for param in params:
                param.grad = torch.linspace(-1, 1, param.numel(), device="cuda").view_as(param)
            optimizer = make(params)
            contenders[name] = lambda _, optimizer=optimizer: optimizer.step()
        times = interleaved(contenders, 1, ROUNDS)
        elements = sum(a * b for a, b in shapes)
        for name, (ours, moved, _) in makers().items():
            median = times[name]["median_us"]
            rows.append(
                {
                    "tensors": title,
                    "contender": name,
                    **times[name],
                    "of_floor": round(floor_us(machine, moved * elements, 0) / median, 3),
                    "times_ours": round(median / times[ours]["median_us"], 2),
                }
            )
    return rows


def main() -> None:
    torch.manual_seed(0)
    machine = floor()
    rows = measure(machine)
    print_table(rows)
    write("optimizers", {"rows": rows, "floor": machine})


if __name__ == "__main__":
    main()
