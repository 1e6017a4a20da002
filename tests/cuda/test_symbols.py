"""The CUDA library loads beside a torch, and on a machine, without CUDA: what only those with CUDA have, it asks for
weakly."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest

LIBRARY = pathlib.Path(__file__).parents[2] / "build" / "cuda" / "libentrenar_cuda.so"


@pytest.mark.skipif(not LIBRARY.exists(), reason="`make cuda`, which needs nvcc, was not run here")
def test_symbols_of_cuda_are_weak():
    listed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True)
    kinds = dict(reversed(line.split()) for line in listed.stdout.splitlines())
    # The run-time's and the driver's, and what torch has in libtorch_cuda.so; the CPU has aoti_torch_device_type_cuda.
    of_cuda = {name for name in kinds if re.match(r"_*cu", name) or "_cuda_" in name}
    assert "aoti_torch_get_current_cuda_stream" in of_cuda
    assert {name for name in of_cuda if kinds[name] != "w"} == set()
