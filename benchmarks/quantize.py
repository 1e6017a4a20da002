"""Quantizing and decoding a 4096 x 4096 matrix: ours, and bitsandbytes' NF4, beside the bandwidth of memory.

floor_ms is what it takes at least on this machine to read the one and write the other, and of_floor its fraction of our
time.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from typing import Any

import bitsandbytes.functional as bnb
import torch

from benchmarks.harness import Floor, Work, floor, interleaved, print_table, ratio, refuse_if_red, write
from entrenar.autograd.ops import int4_dequantize, int4_quantize

TESTS = ("tests/autograd/test_int4.py", "tests/autograd/test_int4_fit.py")
SIZE = 4096


def measure(rounds: int, machine: Floor) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(SIZE, SIZE).to(dtype)
        codes, scales = int4_quantize(weight)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        int4 = codes.nbytes + scales.nbytes
        directions = {
            "quantize": {
                "ours": lambda w=weight: int4_quantize(w),
                "bitsandbytes": lambda w=weight: bnb.quantize_4bit(w, blocksize=64, quant_type="nf4"),
            },
            "quantize, mse": {
                "ours": lambda w=weight: int4_quantize(w, fit="mse"),
                "bitsandbytes": lambda w=weight: bnb.quantize_4bit(w, blocksize=64, quant_type="nf4"),
            },
            "dequantize": {
                "ours": lambda c=codes, s=scales, d=dtype: int4_dequantize(c, s, SIZE, dtype=d),
                "bitsandbytes": lambda p=packed, s=state: bnb.dequantize_4bit(p, s),
            },
        }
        for direction, calls in directions.items():
            seconds = interleaved(calls, rounds)
            ours = statistics.median(seconds["ours"])
            least = Work(int4, weight.nbytes) if direction == "dequantize" else Work(weight.nbytes, int4)
            rows.append(
                {
                    "direction": direction,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ours_ms": round(1e3 * ours, 3),
                    "dense_gb_per_second": round(weight.nbytes / ours / 1e9, 1),
                    "bitsandbytes_ms": round(1e3 * statistics.median(seconds["bitsandbytes"]), 2),
                    "times_ours": round(ratio(seconds["bitsandbytes"], seconds["ours"]), 1),
                    **machine.columns(least, seconds["ours"]),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    refuse_if_red(*TESTS)
    torch.manual_seed(0)
    machine = floor()
    rows = measure(arguments.rounds, machine)
    print_table(rows)
    write("quantize", {"size": SIZE, "rows": rows, "floor": asdict(machine)})


if __name__ == "__main__":
    main()
