from __future__ import annotations

import pytest
import torch

import entrenar
from entrenar.autograd.ops._library import LEVELS


def available_levels() -> list[str]:
    chosen = entrenar.cpu_level()
    return list(LEVELS[: LEVELS.index(chosen) + 1])


@pytest.fixture(params=available_levels())
def cpu_level(request):
    """Run the test at every level that this machine has."""
    before = entrenar.cpu_level()
    entrenar.set_cpu_level(request.param)
    yield request.param
    entrenar.set_cpu_level(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill the memory that kernels allocate with NaN (bytes with 255), so that what they leave unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
