"""The CUDA kernels keep to the registers and the shared memory of the committed table, and spill nothing."""

from __future__ import annotations

import json
import shutil

import budgets
import pytest


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")
@pytest.mark.parametrize("source", budgets.SOURCES, ids=lambda source: source.name)
def test_kernels_keep_to_their_budgets(source):
    table = json.loads(budgets.TABLE.read_text())
    found = budgets.budgets(source)
    assert not {name: budget for name, budget in found.items() if budget["spilled"]}
    if budgets.nvcc_version() == table["nvcc"]:
        assert found == table["kernels"][source.name]
