"""Products with a 4-bit weight, forward and backward, beside what else there is.

Contenders without an adapter: `int4_linear`, and with its input in int8; the same weight decoded and then multiplied by
torch; torch on the dense weight; bitsandbytes' Linear4bit (NF4); torch's `_weight_int4pack_mm_for_cpu`. With an adapter
of rank 16: `int4_lora_linear`, and the same adapter in plain torch beside the decoded weight and beside Linear4bit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import floor, interleaved, print_table, ratio, refuse_if_red, write
from benchmarks.peers import Int4Pack, linear4bit
from entrenar.autograd.ops import int4_dequantize, int4_linear, int4_lora_linear, int4_quantize

TESTS = "tests/autograd"
RANK, SCALING = 16, 2.0
Product = Callable[[Tensor], Tensor]


def contenders(size: int, dtype: torch.dtype) -> dict[str, dict[str, Product]]:
    """The products by group; the first of a group is ours, the others do the same job."""
    weight = torch.randn(size, size)
    codes, scales = int4_quantize(weight)
    decoded = int4_dequantize(codes, scales, size)
    scale_values = scales.view(torch.float16).float()
    signed = (decoded / scale_values.repeat_interleave(64, dim=1)).round()
    dense, nf4 = weight.to(dtype), linear4bit(weight, dtype)
    lora_A, lora_B = torch.randn(RANK, size, requires_grad=True), torch.randn(size, RANK, requires_grad=True)

    def adapter(x: Tensor) -> Tensor:
        return SCALING * F.linear(F.linear(x, lora_A.to(dtype)), lora_B.to(dtype))

    def decode() -> Tensor:
        return int4_dequantize(codes, scales, size, dtype=dtype)

    return {
        "linear": {
            "int4_linear": lambda x: int4_linear(x, codes, scales),
            "int4_linear, int8 activations": lambda x: int4_linear(x, codes, scales, int8=True),
            "int4_dequantize, torch.matmul": lambda x: torch.matmul(x, decode().T),
            "torch dense": lambda x: F.linear(x, dense),
            "bitsandbytes NF4": nf4,
            "torch int4pack": Int4Pack(signed, scale_values, dtype),
        },
        "lora": {
            "int4_lora_linear": lambda x: int4_lora_linear(x, codes, scales, None, lora_A, lora_B, SCALING),
            "int4_dequantize, torch.matmul + adapter": lambda x: torch.matmul(x, decode().T) + adapter(x),
            "torch dense + adapter": lambda x: F.linear(x, dense) + adapter(x),
            "bitsandbytes NF4 + adapter": lambda x: nf4(x) + adapter(x),
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


def measure(size: int, batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        groups = contenders(size, dtype)
        for products in groups.values():
            for m in batch_sizes:
                x, dy = torch.randn(m, size, dtype=dtype), torch.randn(m, size, dtype=dtype)
                both = {name: p for name, p in products.items() if not isinstance(p, Int4Pack)}
                runs = {
                    "forward": {name: forward(p, x.clone()) for name, p in products.items()},
                    "forward + backward": {name: forward_and_backward(p, x.clone(), dy) for name, p in both.items()},
                }
                for direction, calls in runs.items():
                    seconds = interleaved(calls, rounds if m < 256 else max(3, rounds // 4))
                    ours = seconds[next(iter(calls))]
                    rows += [
                        {
                            "dtype": str(dtype).removeprefix("torch."),
                            "M": m,
                            "direction": direction,
                            "contender": name,
                            "median_ms": round(1e3 * statistics.median(times), 4),
                            "min_ms": round(1e3 * min(times), 4),
                            "times_ours": round(ratio(times, ours), 3),
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
    rows = measure(arguments.size, arguments.batch_sizes, arguments.rounds)
    print_table(rows)
    write("int4_linear", {"size": arguments.size, "rank": RANK, "rows": rows, "floor": floor()})


if __name__ == "__main__":
    main()
