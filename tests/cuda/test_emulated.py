"""The CUDA kernels, compiled as C++ and run thread by thread on the CPU, pass the tests of the ops."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulated"
TESTS = [
    "tests/autograd/test_ops.py",
    "tests/autograd/test_int4.py",
    "tests/optim/test_adamw.py",
    "tests/autograd/test_pointwise_kernels.py",
    "tests/autograd/test_cross_entropy_kernel.py",
    "tests/autograd/test_linear_cross_entropy.py",
    "tests/autograd/test_norm.py",
    "tests/autograd/test_rotary.py",
    "tests/autograd/test_swiglu.py",
    "tests/autograd/test_add_rms_norm.py",
    "tests/cuda/test_assertion.py",
    "tests/autograd/test_int4_linear.py",
    "tests/autograd/test_int4_lora_linears.py",
    "tests/optim/test_codes.py",
    "tests/optim/test_fused_clip.py",
    "tests/optim/test_rules.py",
]


@pytest.fixture(scope="module")
def library() -> pathlib.Path:
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    subprocess.run(
        ["cmake", "-S", HERE / "emulator", "-B", BUILD, "-G", "Ninja", python], check=True, env=environment()
    )
    subprocess.run(["cmake", "--build", BUILD], check=True, env=environment())
    return BUILD / "libentrenar_emulated.so"


def environment(**extra: str) -> dict[str, str]:
    """The environment, with the build tools that are installed beside this Python."""
    return os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"} | extra


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_ops(library, order):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--emulated-cuda={library}", *TESTS]
    done = subprocess.run(
        [*command, "-k", "emulated"],
        cwd=ROOT,
        env=environment(ENTRENAR_EMULATOR_ORDER=order),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
