"""What CUDA kernels take of a multiprocessor, as ptxas reports it; `python tests/cuda/budgets.py` writes the table."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).parent
TABLE = HERE / "budgets.json"
SOURCES = sorted((HERE.parents[1] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURE = "sm_90a"


def nvcc_version() -> str:
    return re.search(r"release ([\d.]+)", run("nvcc", "--version")).group(1)


def budgets(source: pathlib.Path) -> dict[str, dict[str, int]]:
    """Registers, static shared memory and spilled bytes of each kernel of a source file, by its demangled name."""
    with tempfile.TemporaryDirectory() as directory:
        target = ["-arch", ARCHITECTURE, "-cubin", "-o", f"{directory}/kernels.cubin"]
        report = run("nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", *target, str(source))
    found: dict[str, dict[str, int]] = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = run("c++filt", part.split("'")[0]).strip()
        name = (
            re.sub(r"entrenar::(\w+::)?\(anonymous namespace\)::", "", name)
            .replace("(entrenar::Dtype)", "Dtype ")
            .replace("(entrenar::Rule)", "Rule ")
            .split("(")[0]
        )
        found[name.removeprefix("void ")] = {
            "registers": number(r"Used (\d+) registers", part),
            "shared": number(r"(\d+) bytes smem", part),
            "spilled": number(r"(\d+) bytes spill stores", part),
        }
    return found


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def run(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def write() -> None:
    table: dict[str, Any] = {"nvcc": nvcc_version(), "architecture": ARCHITECTURE}
    table["kernels"] = {source.name: budgets(source) for source in SOURCES}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    write()
