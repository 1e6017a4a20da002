"""The `entrenar` operator namespace: schemas stand beside each op, kernels come from the compiled library."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map

LEVELS = ("base", "avx2", "avx512", "amx")

library = torch.library.Library("entrenar", "DEF")
_defined: list[str] = []


def define(schema: str, fake: Callable) -> None:
    """Define an operator by its schema, and what torch.compile needs to know of it: its output's shapes and dtypes."""
    name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"entrenar::{name}", fake, lib=library)
    _defined.append(name)


def batch_by_loop(op: torch._ops.OpOverload) -> None:
    """Let torch.func.vmap call `op` for one element of the batch after the other."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, int]:
        def element(i: int) -> Any:
            def of(x: Any, dim: int | None) -> Any:
                return x if dim is None else x.select(dim, i)

            return op(*tree_map(of, args, in_dims))

        results = [element(i) for i in range(info.batch_size)]
        return tree_map(lambda *xs: torch.stack(xs), *results), 0

    torch.library.register_vmap(op, rule, lib=library)


def load_kernels() -> None:
    """Load the compiled kernels beside the package: the CPU's, and CUDA's where torch and the build have them."""
    cpu = _compiled("libentrenar_cpu.so")
    if cpu is None:
        raise ImportError(
            "libentrenar_cpu.so is missing: the kernels were not compiled. "
            "Install the package with pip (pip install --no-build-isolation -e . in a checkout)."
        )
    torch.ops.load_library(cpu)
    if torch.version.cuda:
        if cuda := _compiled("libentrenar_cuda.so"):
            torch.ops.load_library(cuda)
        else:
            _refuse_cuda()
    if level := os.environ.get("ENTRENAR_CPU_LEVEL"):
        set_cpu_level(level)


def _refuse_cuda() -> None:
    """Make every operator that has a kernel on the CPU and none on CUDA say there what it is missing for."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "the CUDA kernels were not compiled: install with nvcc on the PATH "
            "(pip install --no-build-isolation -e . in a checkout)"
        )

    for name in _defined:
        on_cpu, on_cuda = (
            torch._C._dispatch_has_kernel_for_dispatch_key(f"entrenar::{name}", key) for key in ("CPU", "CUDA")
        )
        if on_cpu and not on_cuda:
            library.impl(name, refuse, "CUDA")


def _compiled(name: str) -> pathlib.Path | None:
    import entrenar

    # In an editable install the compiled library lies apart from the Python files, in another entry of the path.
    files = (pathlib.Path(directory) / name for directory in entrenar.__path__)
    return next((file for file in files if file.is_file()), None)


def cpu_level() -> str:
    """The instruction set that the CPU kernels use: "base", "avx2", "avx512" (with its BF16 extension) or "amx"."""
    return LEVELS[torch.ops.entrenar.cpu_level()]


def set_cpu_level(level: str) -> None:
    """Make the CPU kernels use `level`, one of "base", "avx2", "avx512" and "amx", for the whole process.

    The best level of the machine is chosen at import; the environment variable ENTRENAR_CPU_LEVEL sets another.
    Raises ValueError for an unknown level, and for one that this machine lacks.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown CPU level {level!r}: choose one of {', '.join(LEVELS)}")
    if not torch.ops.entrenar.set_cpu_level(LEVELS.index(level)):
        raise ValueError(f"this machine has no {level}")


library.define("cpu_level() -> int")
library.define("set_cpu_level(int level) -> bool")
