"""Run every measurement on the GPU, or those named: `python -m benchmarks.cuda int4_linear training_step`."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import benchmarks.cuda

HELPERS = {"timing", "__main__"}
names = [module.name for module in pkgutil.iter_modules(benchmarks.cuda.__path__) if module.name not in HELPERS]
if unknown := set(sys.argv[1:]) - set(names):
    sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")

# Each in a process of its own, so that one that fails takes nothing from the others.
failed = []
for name in sys.argv[1:] or names:
    print(f"\n== {name} ==", flush=True)
    if subprocess.run([sys.executable, "-m", f"benchmarks.cuda.{name}"], check=False).returncode:
        failed.append(name)
if failed:
    sys.exit(f"failed: {', '.join(failed)}")
