"""The CUDA kernels, compiled as C++ and run thread by thread on the CPU, pass the tests of the ops."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulated"
TESTS = [
    "tests/autograd/test_ops.py",
    "tests/autograd/test_int4.py",
    "tests/autograd/test_int4_fit.py",
    "tests/optim/test_adamw.py",
    "tests/optim/test_states.py",
    "tests/autograd/test_pointwise_kernels.py",
    "tests/autograd/test_cross_entropy_kernel.py",
    "tests/autograd/test_linear_cross_entropy.py",
    "tests/autograd/test_norm.py",
    "tests/autograd/test_rotary.py",
    "tests/autograd/test_swiglu.py",
    "tests/autograd/test_swiglu_int4_lora_linear.py",
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


def sanitizer() -> dict[str, str]:
    """What AddressSanitizer needs in a program that was built without it: to be there first, with C++'s exceptions.

    Python keeps what it allocated until it ends, so that leaks are none.
    """
    names = ("libasan.so", "libstdc++.so.6")
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}


def in_either_order(*command: str | pathlib.Path) -> dict[str, str]:
    """What a program that must succeed printed, in each order of the threads. They run at once: each takes one core."""
    with contextlib.ExitStack() as stack:
        runs = {}
        for order in ("forward", "reversed"):
            logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            of_order = environment(ENTRENAR_EMULATOR_ORDER=order, OMP_NUM_THREADS="1", **sanitizer())
            run = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=of_order, stdout=logs[0], stderr=logs[1])
            runs[order] = stack.enter_context(run), logs
        printed = {}
        for order, (run, logs) in runs.items():
            status = run.wait()
            for log in logs:
                log.seek(0)
            printed[order], errors = (log.read() for log in logs)
            assert status == 0, f"{order}:\n{printed[order]}\n{errors}"
        return printed


def test_ops_in_either_order_of_the_threads(library):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--emulated-cuda={library}", *TESTS, "-k", "emulated"]
    for printed in in_either_order(*command).values():
        assert " passed" in printed


def test_the_same_bits_in_either_order_of_the_threads(library):
    printed = in_either_order(HERE / "calls.py", library)
    assert printed["forward"]
    assert printed["forward"].splitlines() == printed["reversed"].splitlines()
