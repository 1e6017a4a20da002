"""Products with a 4-bit weight, forward and backward, beside what else there is.

Contenders without an adapter: `int4_linear`, and with its input in int8; the same weight decoded and then multiplied by
torch; torch on the dense weight; bitsandbytes' Linear4bit (NF4); torch's `_weight_int4pack_mm_for_cpu`. With an adapter
of rank 16: `int4_lora_linear`, and the same adapter in plain torch beside the decoded weight and beside Linear4bit.

Few rows are what generating text takes: forwards go through copies of the weight that together exceed the caches, one
call after the other.

times_ours is the contender's time over ours; floor_ms what the product with a 4-bit weight takes at least on this
machine, in the row's dtype, and of_floor its fraction of the contender's time. Products of int8 activations are held to
the same floor, though their rate is another.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Floor, Work, floor, interleaved, print_table, ratio, refuse_if_red, rotated, write
from benchmarks.peers import Int4Pack, linear4bit
from entrenar.autograd.ops import int4_dequantize, int4_linear, int4_lora_linear, int4_quantize

TESTS = "tests/autograd"
RANK, SCALING = 16, 2.0
FEW, COPIES = 64, 32
Product = Callable[[Tensor], Tensor]


class Int4:
    """`int4_linear` and what is made of it, with codes and scales of their own."""

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor) -> None:
        self.codes, self.scales, self.dtype, self.lora_A, self.lora_B = codes, scales, dtype, lora_A, lora_B

    def linear(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.codes, self.scales)

    def int8(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.codes, self.scales, int8=True)

    def lora(self, x: Tensor) -> Tensor:
        return int4_lora_linear(x, self.codes, self.scales, None, self.lora_A, self.lora_B, SCALING)

    def decoded(self, x: Tensor) -> Tensor:
        return torch.matmul(x, int4_dequantize(self.codes, self.scales, x.shape[-1], dtype=self.dtype).T)


class Dense:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def layers(size: int, dtype: torch.dtype) -> tuple[Int4, Dense, Linear4bit, Int4Pack]:
    """One weight as each contender holds it."""
    weight = torch.randn(size, size)
    codes, scales = int4_quantize(weight)
    scale_values = scales.view(torch.float16).float()
    signed = (int4_dequantize(codes, scales, size) / scale_values.repeat_interleave(64, dim=1)).round()
    lora_A, lora_B = torch.randn(RANK, size, requires_grad=True), torch.randn(size, RANK, requires_grad=True)
    int4 = Int4(codes, scales, dtype, lora_A, lora_B)
    return int4, Dense(weight.to(dtype)), linear4bit(weight, dtype), Int4Pack(signed, scale_values, dtype)


def contenders(int4: Int4, dense: Dense, nf4: Linear4bit, int4pack: Int4Pack) -> dict[str, dict[str, Product]]:
    """The products by group; the first of a group is ours, the others do the same job."""

    def with_adapter(product: Product) -> Product:
        def run(x: Tensor) -> Tensor:
            return product(x) + SCALING * F.linear(F.linear(x, int4.lora_A.to(x.dtype)), int4.lora_B.to(x.dtype))

        return run

    return {
        "linear": {
            "int4_linear": int4.linear,
            "int4_linear, int8 activations": int4.int8,
            "int4_dequantize, torch.matmul": int4.decoded,
            "torch dense": dense,
            "bitsandbytes NF4": nf4,
            "torch int4pack": int4pack,
        },
        "lora": {
            "int4_lora_linear": int4.lora,
            "int4_dequantize, torch.matmul + adapter": with_adapter(int4.decoded),
            "torch dense + adapter": with_adapter(dense),
            "bitsandbytes NF4 + adapter": with_adapter(nf4),
        },
    }


def forward(product: Product, x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            product(x)

    return run


def forward_and_backward(product: Product, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    x = x.requires_grad_()

    def run() -> None:
        product(x).backward(dy)

    return run


def work(m: int, columns: int, sizes: Sequence[int], dtype: torch.dtype, *, rank: int = 0, backward: bool) -> Work:
    """What products of one input [m, columns] with frozen 4-bit weights [n, columns], n of `sizes`, take.

    And their adapters, if they have a rank; backward, gradients of the input and of the adapters.
    """
    n = sum(sizes)
    weight = n * math.ceil(columns / 64) * 34  # a block is 64 codes and a float16
    adapter = rank * (len(sizes) * columns + n)
    activations = [dtype.itemsize * m * width for width in (columns, n)]
    product, narrow = 2 * m * n * columns, 2 * m * adapter
    read, written, operations = weight + 4 * adapter + activations[0], activations[1], product + narrow
    if backward:
        # The upstream gradient is as large as the output, the input's as the input; all but the weight has a gradient.
        read, written = read + activations[1], written + activations[0] + 4 * adapter
        operations += product + 2 * narrow
    return Work(read, written, operations, str(dtype).removeprefix("torch."))


def measure(
    size: int, batch_sizes: list[int], rounds: int, machine: Floor, dtypes: Sequence[torch.dtype]
) -> list[dict[str, Any]]:
    rows = []
    count = COPIES if min(batch_sizes) <= FEW else 1
    for dtype in dtypes:
        weights = layers(size, dtype)
        copies = [contenders(*weights), *(contenders(*deepcopy(weights)) for _ in range(1, count))]
        for group, products in copies[0].items():
            for m in batch_sizes:
                x, dy = torch.randn(m, size, dtype=dtype), torch.randn(m, size, dtype=dtype)
                fewer = rounds if m < 256 else max(3, rounds // 4)
                if m <= FEW:
                    turns = {name: [forward(copy[group][name], x) for copy in copies] for name in products}
                    alone = rotated(turns, max(3, rounds // 8))
                else:
                    alone = interleaved({name: forward(p, x.clone()) for name, p in products.items()}, fewer)
                both = {name: p for name, p in products.items() if not isinstance(p, Int4Pack)}
                steps = {name: forward_and_backward(p, x.clone(), dy) for name, p in both.items()}
                for direction, seconds in {"forward": alone, "forward + backward": interleaved(steps, fewer)}.items():
                    ours = seconds[next(iter(products))]
                    rank = RANK if group == "lora" else 0
                    least = work(m, size, [size], dtype, rank=rank, backward=direction != "forward")
                    rows += [
                        {
                            "dtype": str(dtype).removeprefix("torch."),
                            "M": m,
                            "direction": direction,
                            "contender": name,
                            "median_ms": round(1e3 * statistics.median(times), 4),
                            "min_ms": round(1e3 * min(times), 4),
                            "times_ours": round(ratio(times, ours), 3),
                            **machine.columns(least, times),
                        }
                        for name, times in seconds.items()
                    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="K = N")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 512], help="M")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    refuse_if_red(TESTS)
    torch.manual_seed(0)
    machine = floor()
    dtypes = (torch.bfloat16, torch.float32)
    rows = measure(arguments.size, arguments.batch_sizes, arguments.rounds, machine, dtypes)
    print_table(rows)
    write("int4_linear", {"size": arguments.size, "rank": RANK, "rows": rows, "floor": asdict(machine)})


if __name__ == "__main__":
    main()
