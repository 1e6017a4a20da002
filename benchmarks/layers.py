"""The linear layers of SmolLM2-135M with adapters of rank 16, forward and backward, as they stand in a training step.

Layers that share an input are applied together: queries, keys and values; gate and up. The last one takes SwiGLU of two
inputs. Beside ours: torch's dense bfloat16 product with the same adapter in plain torch. times_ours is the contender's
time over ours; floor_ms what the layers take at least here, and of_floor its fraction of the contender's time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Floor, floor, interleaved, print_table, ratio, refuse_if_red, write
from benchmarks.int4_linear import work
from entrenar.lora.layers import QLoRALayer, apply_to_swiglu, apply_together

TESTS = (
    "tests/autograd/test_ops.py",
    "tests/autograd/test_int4_lora_linears.py",
    "tests/autograd/test_swiglu_int4_lora_linear.py",
    "tests/lora",
)
RANK, ALPHA, ROWS = 16, 32, 1024
LAYERS = {
    # columns, rows of the weights, whether x is SwiGLU of two inputs
    "q, k, v": (576, (576, 192, 192), False),
    "o": (576, (576,), False),
    "gate, up": (576, (1536, 1536), False),
    "down": (1536, (576,), False),
    "SwiGLU, down": (1536, (576,), True),
}

Apply = Callable[..., list[Tensor]]


def contenders(columns: int, sizes: tuple[int, ...], gated: bool) -> dict[str, Apply]:
    """What maps x, or gate and up, to the results of layers of these sizes."""
    weights = [torch.randn(n, columns) for n in sizes]
    layers = [QLoRALayer(weight, rank=RANK, alpha=ALPHA) for weight in weights]
    rounded = [QLoRALayer(weight, rank=RANK, alpha=ALPHA) for weight in weights]
    for layer in rounded:
        layer.base.int8 = True
    dense = [weight.bfloat16() for weight in weights]

    def apply(layers: list[QLoRALayer], *xs: Tensor) -> list[Tensor]:
        return [apply_to_swiglu(layers[0], *xs)] if gated else apply_together(layers, *xs)

    def plain(*xs: Tensor) -> list[Tensor]:
        x = F.silu(xs[0]) * xs[1] if gated else xs[0]
        adapters = ((layer.lora_A.bfloat16(), layer.lora_B.bfloat16(), layer.scaling) for layer in layers)
        return [
            F.linear(x, weight) + scaling * F.linear(F.linear(x, A), B)
            for weight, (A, B, scaling) in zip(dense, adapters, strict=True)
        ]

    return {
        "ours": functools.partial(apply, layers),
        "ours, int8 activations": functools.partial(apply, rounded),
        "torch dense + adapter": plain,
    }


def measure(rounds: int, machine: Floor) -> list[dict[str, Any]]:
    rows = []
    for name, (columns, sizes, gated) in LAYERS.items():
        xs = [torch.randn(ROWS, columns, dtype=torch.bfloat16, requires_grad=True) for _ in range(1 + gated)]
        dys = [torch.randn(ROWS, n, dtype=torch.bfloat16) for n in sizes]

        def step(apply: Apply, xs: list[Tensor] = xs, dys: list[Tensor] = dys) -> None:
            torch.autograd.backward(apply(*xs), dys)

        calls = {who: functools.partial(step, apply) for who, apply in contenders(columns, sizes, gated).items()}
        seconds = interleaved(calls, rounds)
        least = work(ROWS, columns, sizes, torch.bfloat16, rank=RANK, backward=True)
        rows += [
            {
                "layers": name,
                "contender": who,
                "median_ms": round(1e3 * statistics.median(times), 3),
                "min_ms": round(1e3 * min(times), 3),
                "times_ours": round(ratio(times, seconds["ours"]), 3),
                **machine.columns(least, times),
            }
            for who, times in seconds.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    refuse_if_red(*TESTS)
    torch.manual_seed(0)
    machine = floor()
    rows = measure(arguments.rounds, machine)
    print_table(rows)
    write("layers", {"rows_of_x": ROWS, "rank": RANK, "rows": rows, "floor": asdict(machine)})


if __name__ == "__main__":
    main()
