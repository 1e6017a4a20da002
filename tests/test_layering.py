"""Imports run one way: each layer may import those below it, and nothing above."""

from __future__ import annotations

import ast
import pathlib

import pytest

import entrenar

ROOT = next(p for p in map(pathlib.Path, entrenar.__path__) if (p / "__init__.py").is_file())
# From the bottom up; the longest prefix of a module's name gives its layer.
LAYERS = [
    ["entrenar.autograd.ops"],
    ["entrenar.autograd", "entrenar.optim", "entrenar.lora.layers"],
    ["entrenar.fusion", "entrenar.lora", "entrenar.checkpoint"],
    ["entrenar.training"],
    ["entrenar.cli", "entrenar.malloc"],
    ["entrenar.__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def rank_of(module: str) -> int | None:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in RANK:
            return RANK[name]
    return None


def imports(source: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return {name for name in found if name.startswith("entrenar.")}


SOURCES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(source):
    module = ".".join(["entrenar", *source.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    rank = rank_of(module)
    assert rank is not None, f"{module} has no layer: add it to LAYERS"
    above = {name for name in imports(source) if (rank_of(name) is None or rank_of(name) > rank)}
    assert not above, f"{module} imports from above: {above}"


def test_public_names_exist():
    assert all(hasattr(entrenar, name) for name in entrenar.__all__)
    assert entrenar.__all__ == sorted(entrenar.__all__)
