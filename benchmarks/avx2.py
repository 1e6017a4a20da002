"""The products of `int4_linear` in float32, with 512 rows, as a CPU with AVX2 and no more computes them.

Our kernels, torch's, oneDNN's and MKL's are held to that level in a process of its own, since they read it when they
start.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.harness import ROOT, floor, print_table, refuse_if_red, write

TESTS = ("tests/autograd/test_int4_linear.py", "tests/autograd/test_int4_lora_linears.py")
SIZE, ROWS = 4096, 512
HELD = {
    "ENTRENAR_CPU_LEVEL": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def measure(rounds: int) -> dict[str, Any]:
    """The results; in the process that is held."""
    import torch

    from benchmarks import int4_linear

    torch.manual_seed(0)
    machine = floor()
    rows = int4_linear.measure(SIZE, [ROWS], rounds, machine, [torch.float32])
    return {"size": SIZE, "rank": int4_linear.RANK, "rows": rows, "floor": asdict(machine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    if not HELD.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.avx2", *sys.argv[1:]]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **HELD}, check=True)
        return
    refuse_if_red(*TESTS)
    results = measure(arguments.rounds)
    print_table(results["rows"])
    write("int4_linear_float32", {"held_by": HELD, **results})


if __name__ == "__main__":
    main()
