from __future__ import annotations

import subprocess
import sys

# Each in a process of its own: thread pools, caches and peak memory start afresh.
for name in (
    "quantization_error",
    "quantize",
    "int4_linear",
    "avx2",
    "layers",
    "attention",
    "ops",
    "optimizers",
    "training_step",
    "picture",
):
    print(f"\n== {name} ==", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
