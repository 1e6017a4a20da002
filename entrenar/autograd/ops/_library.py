"""The `entrenar` operator namespace: schemas stand beside each op, kernels come from the compiled library."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import torch

LEVELS = ("base", "avx2", "avx512")

library = torch.library.Library("entrenar", "DEF")


def define(schema: str, fake: Callable) -> None:
    """Define an operator by its schema, and what torch.compile needs to know of it: its output's shapes and dtypes."""
    name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"entrenar::{name}", fake, lib=library)


def load_kernels() -> None:
    """Load the compiled CPU kernels from the package's directory."""
    import entrenar

    name = "libentrenar_cpu.so"
    # In an editable install the compiled library lies apart from the Python files, in another entry of the path.
    found = [file for directory in entrenar.__path__ if (file := pathlib.Path(directory) / name).is_file()]
    if not found:
        raise ImportError(
            f"{name} is not among {list(entrenar.__path__)}: the kernels were not compiled. "
            "Install the package with pip (pip install --no-build-isolation -e . in a checkout)."
        )
    torch.ops.load_library(found[0])
    if level := os.environ.get("ENTRENAR_CPU_LEVEL"):
        set_cpu_level(level)


def cpu_level() -> str:
    """The instruction set that the CPU kernels use: "base", "avx2" or "avx512" (with its BF16 extension)."""
    return LEVELS[torch.ops.entrenar.cpu_level()]


def set_cpu_level(level: str) -> None:
    """Make the CPU kernels use `level`, one of "base", "avx2" and "avx512", for the whole process.

    The best level of the machine is chosen at import; the environment variable ENTRENAR_CPU_LEVEL sets another.
    Raises ValueError for an unknown level, and for one that this machine lacks.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown CPU level {level!r}: choose one of {', '.join(LEVELS)}")
    if not torch.ops.entrenar.set_cpu_level(LEVELS.index(level)):
        raise ValueError(f"this machine has no {level}")


library.define("cpu_level() -> int")
library.define("set_cpu_level(int level) -> bool")
