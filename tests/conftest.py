from __future__ import annotations

import os
import warnings

import pytest
import torch

import entrenar
from entrenar.autograd.ops._library import LEVELS

# cuBLAS keeps to torch's deterministic mode only with this; it is read when the first product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser):
    parser.addoption("--device", help="where the tests make their tensors, if they do not say: cuda")
    parser.addoption(
        "--emulated-cuda",
        metavar="LIBRARY",
        help="compute the ops by the CUDA kernels of this library, on the CPU's tensors (tests/cuda/emulator)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu(why): a test of what only the CPU does")
    if library := config.getoption("--emulated-cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that kernels are registered again
            torch.ops.load_library(library)


def pytest_runtest_setup(item):
    if item.config.getoption("--device") and (mark := item.get_closest_marker("cpu")):
        pytest.skip(mark.args[0])


def backends(config) -> list[str]:
    """Whose kernels a test can run: the CPU's at each of its levels, or those of the GPU or emulator that was named."""
    if config.getoption("--emulated-cuda"):
        return ["emulated"]
    if device := config.getoption("--device"):
        return [device]
    return [*LEVELS[: LEVELS.index(entrenar.cpu_level()) + 1]]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends(metafunc.config), indirect=True)


@pytest.fixture
def backend(request):
    """Run the test with all kernels that can compute its ops."""
    before = entrenar.cpu_level()
    if request.param in LEVELS:
        entrenar.set_cpu_level(request.param)
    yield request.param
    entrenar.set_cpu_level(before)


@pytest.fixture(autouse=True)
def device(request):
    """Make tensors on the device that was named."""
    torch.set_default_device(request.config.getoption("--device"))
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill the memory that kernels allocate with NaN (bytes with 255), so that what they leave unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
